"""The interface of a score: a callable ``score(x, sigma)`` or ``score(x, sigma, condition)``.

x is a batch (N, ...), sigma its noise level, () or (N,), and the result has the shape of x. Losses, samplers and
``log_likelihood`` accept any such callable. A score may have attributes: ``schedule``, the noise levels that it was
trained on; ``value_range``, the range of its data; ``data_std``, their standard deviation; and ``sample_shape``, the
shape of one sample. A score without these attributes is called a plain function.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from scorematch.core.batches import as_sigma, check_data, per_image

__all__ = ["Denoiser", "NetworkScore", "Score", "Tweedie"]

Score = Callable[..., Tensor]
Given: TypeAlias = Tensor | int | Mapping[str, Any] | None  # a condition; a mapping has its parts by name


# -- Attributes -------------------------------------------------------------------------------------------------------


def attribute(score: object, name: str) -> Any:
    """An attribute of a network, or of the network inside DistributedDataParallel and similar wrappers, or None."""
    inner = getattr(score, "module", None) if isinstance(score, nn.Module) else None
    return getattr(score, name, getattr(inner, name, None))


def middle_of(score: object, x: Tensor) -> float | Tensor:
    """The mean of a sampler's initial noise: that of each channel of x, the middle of the value range, or 0."""
    units = attribute(score, "units")
    if units is not None:
        mean: Tensor = units.center(x).to(x.dtype)
        return mean.view(-1, *[1] * (x.ndim - 2))
    value_range = attribute(score, "value_range")
    return 0.0 if value_range is None else (value_range[0] + value_range[1]) / 2


def noise_ratios(score: object, x: Tensor) -> float | Tensor:
    """The standard deviation r of the noise of each channel of x (N, C, ...), relative to sigma: (C, ...), or 1."""
    units = attribute(score, "units")
    if units is None or not units.relative:
        return 1.0
    ratios: Tensor = units.noise(x)
    return ratios.view(-1, *[1] * (x.ndim - 2))


def variance_of(score: object) -> float:
    """The variance of the data: that of the score or its preconditioning, of a quarter of the value range, or 1."""
    value_range = attribute(score, "value_range")
    for own in (score, attribute(score, "preconditioning")):
        if std := attribute(own, "data_std"):
            return float(std) ** 2
    return 1.0 if value_range is None else ((value_range[1] - value_range[0]) / 4) ** 2


def device_of(score: object, otherwise: torch.device | str = "cpu") -> torch.device:
    """The device of a network, also that of an inference copy; ``otherwise`` for any other score."""
    parameter = next(score.parameters(), None) if isinstance(score, nn.Module) else None
    device = attribute(score, "device") if parameter is None else parameter.device
    if isinstance(score, nn.Module) and parameter is not None and parameter.is_meta:
        # Accelerate keeps offloaded weights on the meta device; its hooks know the device that computes.
        hooks = (getattr(module, "_hf_hook", None) for module in score.modules())
        used = (getattr(hook, "execution_device", None) for hook in hooks)
        device = torch.device(next((one for one in used if one is not None), parameter.device))
    return device if isinstance(device, torch.device) else torch.device(otherwise)


def has_inference_copy(score: object) -> bool:
    """Whether a score has the method ``inference_copy``, as the networks of this package and guided scores do."""
    return hasattr(type(score), "inference_copy")


def inference_copy_of(score: Any, *, compile: bool = False) -> Any:  # noqa: A002  (torch's word)
    """The inference copy of a score, or the score itself if it has none."""
    return score.inference_copy(compile=compile) if has_inference_copy(score) else score


def check_score(score: Tensor, x: Tensor) -> Tensor:
    """Returns the score if it has the shape of x; a score is never broadcast.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it has another shape.
    """
    if not isinstance(score, Tensor):
        raise TypeError(
            f"the network returned {type(score).__name__}, but a score must be a tensor of the shape of x, "
            f"{tuple(x.shape)}."
        )
    if score.shape != x.shape:
        raise ValueError(
            f"the network returned shape {tuple(score.shape)} for x of shape {tuple(x.shape)}, but a score must have "
            "the shape of x."
        )
    return score


def score_at(net: Score, x: Tensor, sigma: float | Tensor, condition: Tensor | None) -> Tensor:
    """The checked score of x in x's dtype; without a condition, the score is called with two arguments."""
    return check_score(net(x, sigma) if condition is None else net(x, sigma, condition), x).to(x.dtype)


class WithoutGradientsError(ValueError):
    """A score was computed without gradients, but they are needed."""


def check_differentiable(score: Tensor, name: str = "the score") -> None:
    """Raises WithoutGradientsError if a score that was computed with gradients enabled does not depend on x."""
    if not score.requires_grad:
        raise WithoutGradientsError(
            f"{name} must be differentiable in x, but it was computed without gradients. Remove torch.no_grad() and "
            "detach() from the function that computes it."
        )


# -- The denoised data -------------------------------------------------------------------------------------------------


class Tweedie:
    """A base class of scores, with the methods that follow from Tweedie's formula."""

    def denoise(self, x: Tensor, sigma: float | Tensor, condition: Given = None) -> Tensor:
        r"""The denoised image, the mean of the clean data given x: :math:`x + \sigma^2 \nabla_x \log p_\sigma(x)`.

        This is Tweedie's formula. If the noise of a channel is :math:`\sigma r` (``units``), its :math:`\sigma` is
        multiplied by r. Arguments and errors are those of the call ``net(x, sigma, condition)``. The result
        has the shape and dtype of x.
        """
        check_data(x)
        # The score in float32 also for half-precision x: at sigma = 40 its rounding error is multiplied by 1600.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        score = cast(Score, self)(wide, sigma, condition)
        level = per_image(as_sigma(sigma, wide), wide) * noise_ratios(self, wide)
        return (wide + level**2 * score).to(x.dtype)

    def as_denoiser(self) -> Denoiser:
        """The denoised image as a module, ``denoiser(x, sigma)``, as other packages expect it (azula, deepinv, sbi).

        Returns:
            A Denoiser that holds this score, not a copy of it.
        """
        return Denoiser(self)


class NetworkScore(Tweedie, ABC):
    """The base class of the scores of a network, alone or guided, which may predict the variance of a sampler too."""

    predicts_variance: bool

    def score_and_variance(self, x: Tensor, sigma: float | Tensor, condition: Given = None) -> tuple[Tensor, Tensor]:
        r"""The score, and the variance that the network predicts for a step of ``AncestralSampler``, in one call.

        Arguments and errors are those of the call ``net(x, sigma, condition)``.

        Returns:
            The score, and w, each with the shape and dtype of x. w is the share of the large variance in the variance v
            of the step: :math:`\log v = w \log v_{large} + (1 - w) \log v_{small}`. It is not limited to [0, 1].

        Raises:
            ValueError: if the network predicts no variance.

        References:
            Nichol & Dhariwal, 2021, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672, Eq. 15.
        """
        if not self.predicts_variance:
            raise ValueError("this network predicts no variance. Call net(x, sigma) for the score alone.")
        score, variance = self._outputs(x, sigma, condition, variance=True)
        return score, variance

    @abstractmethod
    def definition(self) -> list[Any]:
        """Everything that determines the score: numbers, strings, tensors, modules, scores, and lists or dicts of them.

        The hash of a network in the settings of bulk sampling and evaluation is computed from it.
        """

    @abstractmethod
    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        """The score, and the share of the large variance if ``variance`` is True."""


class Denoiser(nn.Module):
    r"""A score as a denoiser, :math:`D(x, \sigma) = x + \sigma^2 \nabla_x \log p_\sigma(x)`, for other packages.

    Args:
        score: a score with the method ``denoise``: a ScoreNet, its inference copy, or a guided score.

    Example:
        >>> from scorematch import ScoreNet
        >>> denoiser = ScoreNet.from_pretrained("mnist").as_denoiser()
        >>> denoiser(torch.rand(2, 1, 28, 28), torch.tensor([0.1, 0.5]).view(2, 1, 1, 1)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, score: Tweedie) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor, sigma: float | Tensor, condition: Given = None) -> Tensor:
        """The denoised image, with the shape and dtype of x.

        Args:
            x: noisy data (N, ...), images in [0, 1] plus noise.
            sigma: the noise level in the units of x: a float, or a tensor with one value or N values, of any shape. At
                0 the denoised image is x.
            condition: the condition of the score.
        """
        if isinstance(sigma, int | float) and sigma == 0:
            check_data(x)
            return x
        if not isinstance(sigma, Tensor):
            return self.score.denoise(x, sigma, condition)
        sigma = sigma.reshape(()) if sigma.numel() == 1 else sigma.flatten()
        clean = sigma == 0
        denoised = self.score.denoise(x, sigma.masked_fill(clean, 1), condition)  # without reading sigma on the host
        return torch.where(cast(Tensor, per_image(clean.to(x.device), x)), x, denoised)


# -- Eval mode --------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(net: object) -> Iterator[None]:
    """Within this context a network is in eval mode; afterwards the previous mode of each module is restored.

    Several threads may use it for one network at the same time; the last one to leave restores the modes.
    """
    if not isinstance(net, nn.Module):
        yield
        return
    with _lock:
        count, training = _users.get(net, (0, []))
        if count == 0:
            training = [module for module in net.modules() if module.training]
            for module in training:
                module.training = False
        _users[net] = (count + 1, training)
    try:
        yield
    finally:
        with _lock:
            count, training = _users[net]
            if count > 1:
                _users[net] = (count - 1, training)
            else:
                del _users[net]
                for module in training:
                    module.training = True
