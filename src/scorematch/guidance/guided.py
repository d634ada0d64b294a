r"""Guidance: a score that is computed from a network and a second network or a classifier, for any sampler.

Let c be a class, and :math:`s(x, \sigma | c)` the score of its noisy images. Guidance makes samples fit c better, at
the cost of diversity. At weight w = 1 there is no guidance (for a classifier, w = 1 is Bayes' rule); larger
weights guide more strongly. The table omits the noise level.

================  ==========================================  =====================================
function          score                                       density, up to a constant factor
================  ==========================================  =====================================
classifier_free   :math:`s(x) + w (s(x | c) - s(x))`          :math:`p(x)^{1-w} p(x | c)^w`
autoguidance      :math:`s_0(x) + w (s_1(x) - s_0(x))`        :math:`p_0(x)^{1-w} p_1(x)^w`
classifier        :math:`s(x) + w \nabla_x \log p(c | x)`     :math:`p(x) p(c | x)^w`
================  ==========================================  =====================================

- Classifier-free: one network is trained with and without the class. w = 0 is the network without a class, and w = 1
  the network with the class. Ho & Salimans (2022) write 1 + w instead of w. One call of the network with a batch of 2N
  computes both scores.
- Autoguidance: :math:`s_1` is the network, and :math:`s_0` a weaker version of it, for example a smaller network for
  the same task, or the same network after less training. w = 0 is the weaker network, and w = 1 the network.
- Classifier: w = 0 is the network without the classifier. If the network takes no class, w = 1 is the score of the
  class by Bayes' rule.

Each density is that of noisy images at one noise level. For weights other than 0 and 1, the densities at different
levels do not belong to one distribution of clean images, so the samples do not have the density in the table at
sigma = 0.

Guidance helps mainly at medium noise levels: at high levels it reduces the diversity, and at low levels it has little
effect. ``interval`` limits it to a range of levels (Kynkäänniemi et al., 2024).

Large weights make contrast and colors too strong. ``rescale`` reduces this, as Lin et al. (2024) do. Let
:math:`D = x + \sigma^2 s` be the denoised image of the guided score, :math:`D_c` that of the network with the class,
[.] the mean over the values of an image, and std their standard deviation. The denoised image becomes

.. math:: D + \phi \left(\frac{\operatorname{std} D_c}{\operatorname{std} D} - 1\right) (D - [D]).

Lin et al. rescale the output of a network that predicts v, without subtracting the mean. The formula here depends
neither on what the network predicts nor on the range of the images.

References:
    Ho & Salimans, 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598, Eq. 6.
    Karras et al., 2024, Guiding a Diffusion Model with a Bad Version of Itself, arXiv:2406.02507.
    Dhariwal & Nichol, 2021, Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233, Sec. 4.
    Kynkäänniemi et al., 2024, Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models, arXiv:2404.07724.
    Lin et al., 2024, Common Diffusion Noise Schedules and Sample Steps Are Flawed, arXiv:2305.08891, Eq. 15, 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.batches import as_sigma, check_data, per_image
from scorematch.core.conditions import Condition, as_condition, joined, map_parts, without
from scorematch.core.derived import DerivedScore, call
from scorematch.core.scores import (
    Given,
    Score,
    attribute,
    check_differentiable,
    has_inference_copy,
    inference_copy_of,
    noise_ratios,
)

Interval = tuple[float, float]


def classifier_free(
    net: Score, weight: float, *, interval: Interval | None = None, rescale: float = 0.0
) -> GuidedScore:
    r"""Classifier-free guidance: :math:`s(x) + w\,(s(x | c) - s(x))`, with one network call on a batch of 2N.

    Args:
        net: a score that takes a class or a vector and was trained without it too: a ScoreNet that was built with
            ``null_class=True`` or ``condition_features`` and trained with ``label_drop``, its inference copy, or any
            callable with an attribute ``conditioning``, such as ``Condition(classes=10, null_class=True)`` of
            ``scorematch.nets``.
        weight: w. 0 is the network without a class, 1 the network with the class; values above 1 are guidance. Ho &
            Salimans call w - 1 the weight.
        interval: (low, high), the range of noise levels with guidance, low < sigma <= high, in the units of x. At other
            levels the score is that of the network with the class, with a batch of N, if sigma is passed as a float.
            None is all levels.
        rescale: phi, from 0 to 1. 0 does not rescale; 1 gives each denoised image the standard deviation that it has
            without guidance. See the module docstring.

    Returns:
        A score, ``score(x, sigma, condition)``, with the condition of net, which must be given.

    Raises:
        TypeError: if net is not callable.
        ValueError: if net has no null class, or the weight, the interval or rescale is out of range.

    Example:
        >>> from scorematch import NoiseSchedule, ScoreNet
        >>> from scorematch.sampling import ODESampler
        >>> net = ScoreNet.unet(1, 8, widths=(8, 8), classes=10, null_class=True)
        >>> ODESampler(classifier_free(net, 2.0), levels=3).sample(4, condition=7, progress=False).shape
        torch.Size([4, 1, 8, 8])

    References:
        Ho & Salimans, 2022, arXiv:2207.12598. Kynkäänniemi et al., 2024, arXiv:2404.07724. Lin et al., 2024,
        arXiv:2305.08891.
    """
    takes = attribute(net, "conditioning")
    if callable(net) and not (isinstance(takes, Condition) and takes.null_class):
        raise ValueError(
            "classifier_free needs a network with a null class, which was trained with label_drop. Write "
            "ScoreNet.unet(classes=..., null_class=True), or autoguidance(net, weaker, weight) with a network without "
            "classes as the weaker one."
        )
    return _ClassifierFree(net, None, weight, interval, rescale)


def autoguidance(
    net: Score, weaker: Score, weight: float, *, interval: Interval | None = None, rescale: float = 0.0
) -> GuidedScore:
    r"""Autoguidance: :math:`s_0 + w\,(s_1 - s_0)`, where :math:`s_0` is a weaker version of the network :math:`s_1`.

    Args:
        net: a score, with or without a condition.
        weaker: a score of the same data in the same units. It gets the condition too, unless it takes none; a network
            without classes as the weaker version of one with classes gives classifier-free guidance with two networks.
        weight: w. 0 is the weaker network, 1 the network; values above 1 are guidance.
        interval: the range of noise levels with guidance, as for ``classifier_free``. At other levels the score is that
            of net, without a call of ``weaker``.
        rescale: phi, as for ``classifier_free``, with the denoised image of net.

    Returns:
        A score that is called in the same way as net.

    Raises:
        TypeError: if net or weaker is not callable.
        ValueError: if the two networks have different value ranges or sample shapes, and as for ``classifier_free``.

    References:
        Karras et al., 2024, arXiv:2406.02507.
    """
    if not callable(weaker):
        raise TypeError(f"weaker must be a score, called as weaker(x, sigma), got {type(weaker).__name__}.")
    for name in ("value_range", "sample_shape"):
        expected, found = attribute(net, name), attribute(weaker, name)
        if None not in (expected, found) and tuple(expected) != tuple(found):
            raise ValueError(
                f"weaker must be a score of the data of net, whose {name} is {tuple(expected)}, got {tuple(found)}."
            )
    return _Autoguidance(net, weaker, weight, interval, rescale)


def classifier(
    net: Score, classifier: Callable[..., Tensor], weight: float, *, interval: Interval | None = None
) -> GuidedScore:
    r"""Classifier guidance: :math:`s(x) + w\,\nabla_x \log p(c | x, \sigma)`, with the gradient of a classifier.

    Args:
        net: a score. If it takes a class, as its attribute ``conditioning`` says, or has a classifier of its own, it
            gets the condition too.
        classifier: a function that returns the logits of the classes (N, K), called as ``classifier(x, sigma)`` with x
            (N, ...) and sigma (N,), in the units of net. It must be differentiable in x, and trained on noisy data.
        weight: w. 0 is net; values above 1 sharpen the classifier.
        interval: the range of noise levels with guidance, as for ``classifier_free``. At other levels the score is that
            of net, without a call of the classifier.

    Returns:
        A score, ``score(x, sigma, condition)``, with classes as its condition, int64 (N,) or an int.

    References:
        Dhariwal & Nichol, 2021, arXiv:2105.05233, Alg. 1 and 2.
    """
    if not callable(classifier):
        raise TypeError(
            f"classifier must be a function, called as classifier(x, sigma), got {type(classifier).__name__}."
        )
    return _Classifier(net, classifier, weight, interval)


class GuidedScore(DerivedScore):
    """A score with guidance, which every sampler accepts; see ``scorematch.guidance.guided``.

    Its schedule, value range, sample shape and sampler settings are those of the network that it guides. Samplers call
    the inference copies of its networks, as they do for a ScoreNet. If the network predicts the variance of ancestral
    sampling, so does the guided score, with the value of the network for the class.

    Attributes:
        net: the score that is guided.
        other: the weaker score or the classifier; None for classifier-free guidance.
        weight: the weight w.
        interval: (low, high), the range of noise levels with guidance, or None.
        rescale: phi, from 0 (not rescaled) to 1 (the contrast without guidance).
        predicts_variance: whether ``score_and_variance`` can be called.
        schedule: the noise levels that the network was trained on; None for a plain function, as for all that follow.
        value_range: the range of the data.
        data_std: their standard deviation, if the score has this attribute.
        sample_shape: the shape of one sample.
        sampler_settings: the SamplerSettings recommended for the network.
        class_names: the names of the classes.
        preconditioning: the preconditioning of the network.
        device: the device of an inference copy.
    """

    other: Callable[..., Tensor] | None
    _unguided: ClassVar[float] = 1.0  # the weight without guidance

    def __init__(
        self,
        net: Score,
        other: Callable[..., Tensor] | None,
        weight: float,
        interval: Interval | None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(net)
        if not isinstance(weight, int | float | np.integer | np.floating) or not math.isfinite(weight):
            raise ValueError(f"{argument('weight')} must be a finite number, got {weight!r}.")
        pair = isinstance(interval, Sequence) and len(interval) == 2
        if interval is not None and not (pair and 0 <= interval[0] < interval[1]):
            raise ValueError(
                f"{argument('interval')} must be (low, high), noise levels with 0 <= low < high, got {interval!r}."
            )
        if not isinstance(rescale, int | float | np.integer | np.floating) or not 0 <= rescale <= 1:
            raise ValueError(f"{argument('rescale')} must be a number from 0 to 1, got {rescale!r}.")
        self.other = other
        self.weight = float(weight)
        self.interval = None if interval is None else (float(interval[0]), float(interval[1]))
        self.rescale = float(rescale)

    def inference_copy(self, *, compile: bool = False) -> GuidedScore:  # noqa: A002  (torch's word)
        """Returns the same guidance of the inference copies of its networks.

        Args:
            compile: whether to compile the copies, as in ``ScoreNet.inference_copy``.

        Raises:
            ValueError: for ``compile=True`` if it holds no network that can be compiled.
        """
        if compile and not (has_inference_copy(self.net) or has_inference_copy(self.other)):
            raise ValueError("compile=True needs a ScoreNet. For any other score, pass torch.compile(net).")
        net, other = (inference_copy_of(part, compile=compile) for part in (self.net, self.other))
        return type(self)(net, other, self.weight, self.interval, self.rescale)

    def definition(self) -> list[Any]:
        """Its scores, the weight, the interval and the rescaling."""
        return [self.net, self.other, self.weight, self.interval, self.rescale]

    @property
    def is_inference_copy(self) -> bool:  # type: ignore[override]
        """Whether one of its networks is an inference copy."""
        return any(attribute(part, "is_inference_copy") for part in (self.net, self.other))

    def extra_repr(self) -> str:
        """The weight, and the other options that are used, which ``print`` shows."""
        interval = "" if self.interval is None else f", interval={self.interval}"
        return f"weight={self.weight:g}{interval}" + (f", rescale={self.rescale:g}" if self.rescale else "")

    # -- What the methods share ---------------------------------------------------------------------------------------

    def _weight(self, sigma: float | Tensor, x: Tensor) -> float | Tensor:
        """The weight at noise levels: a float, or for a tensor sigma with an interval a tensor that broadcasts to x."""
        if self.interval is None:
            return self.weight
        low, high = self.interval
        if not isinstance(sigma, Tensor):
            return self.weight if low < sigma <= high else self._unguided
        inside = (sigma > low) & (sigma <= high)  # compared on the device of sigma, without waiting for it
        weight = sigma.new_full((), self.weight, dtype=x.dtype)  # where() of two numbers is in float32
        return per_image(torch.where(inside, weight, self._unguided).to(x.device), x)

    def _guided(
        self, weaker: Tensor, stronger: Tensor, weight: float | Tensor, x: Tensor, sigma: float | Tensor
    ) -> Tensor:
        """The score from the weaker (w = 0) to the stronger one (w = 1) and beyond, with the rescaled contrast."""
        score = torch.lerp(weaker, stronger, weight)
        if self.rescale == 0:
            return score
        variance = cast(Tensor, per_image(as_sigma(sigma, x), x)).square()  # at least float32, in which it is accurate
        axes, dtype = tuple(range(1, x.ndim)), variance.dtype
        ratios = noise_ratios(self, x)  # in x / ratios the noise of all channels is the same
        denoised, unguided = (x.to(dtype) / ratios + variance * each.to(dtype) * ratios for each in (score, stronger))
        centered = denoised - denoised.mean(axes, keepdim=True)
        spread = denoised.std(axes, correction=0, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        # Divided first: for a constant image the ratio of the deviations can be infinite.
        change = centered / spread * unguided.std(axes, correction=0, keepdim=True) - centered
        return score + (self.rescale * change / variance / ratios).to(score.dtype)


class _ClassifierFree(GuidedScore):
    @property
    def conditioning(self) -> Condition | None:
        """That of the network. No condition is not accepted, since it would turn guidance off."""
        takes = super().conditioning
        return None if takes is None else takes._replace(null_class=False)

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        takes = attribute(self.net, "conditioning")
        given = as_condition(condition, x, self.conditioning)
        null = without(given, takes)
        weight = self._weight(sigma, x)
        if isinstance(weight, float) and (weight == 1 or (weight == 0 and not variance and not self.rescale)):
            return call(self.net, x, sigma, given if weight else null, variance=variance)
        level = sigma
        if isinstance(sigma, Tensor) and sigma.ndim == 1:
            sigma = torch.cat([sigma, sigma])
        outputs = call(self.net, torch.cat([x, x]), sigma, joined([given, null]), variance=variance)
        conditional, unconditional = outputs[0].unflatten(0, (2, -1))
        score = self._guided(unconditional, conditional, weight, x, level)
        return score, *(share[: len(x)] for share in outputs[1:])


class _Autoguidance(GuidedScore):
    other: Score

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        condition = as_condition(condition, x, self.conditioning)
        takes_none = attribute(self.other, "conditioning") == Condition()
        weight = self._weight(sigma, x)
        if isinstance(weight, float) and weight == 1:
            return call(self.net, x, sigma, condition, variance=variance)
        weaker = call(self.other, x, sigma, None if takes_none else condition)
        if isinstance(weight, float) and weight == 0 and not variance and not self.rescale:
            return weaker
        score, *share = call(self.net, x, sigma, condition, variance=variance)
        return self._guided(weaker[0], score, weight, x, sigma), *share


class _Classifier(GuidedScore):
    other: Callable[..., Tensor]
    _unguided = 0.0

    @property
    def conditioning(self) -> Condition | None:
        """The classes of the network; None for a network without classes, since only the classifier knows them."""
        takes = super().conditioning
        return None if takes is None or takes.classes is None else takes._replace(null_class=False)

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        takes = self.conditioning
        given = as_condition(condition, x, takes)
        labels = given["class"] if isinstance(given, dict) else given
        net = self.net
        while isinstance(net, DerivedScore) and not isinstance(net, _Classifier):
            net = net.net
        known = takes is not None or isinstance(net, _Classifier)
        score, *share = call(self.net, x, sigma, given if known else None, variance=variance)
        weight = self._weight(sigma, x)
        if not (isinstance(weight, float) and weight == 0):
            score = score + weight * self._gradient(x, as_sigma(sigma, x).expand(len(x)), labels)
        return score, *share

    def _gradient(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The gradient of log p(c | x, sigma) in x, itself differentiable if x is."""
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():  # samplers turn gradients off
            if not differentiable:
                # Clones, since autograd cannot use tensors that were created in inference mode.
                x, sigma = x.detach().clone().requires_grad_(), sigma.detach().clone()
                labels = map_parts(torch.clone, labels)
            logits = self.other(x, sigma)
            check_differentiable(logits, "the classifier")
            if logits.ndim != 2 or len(logits) != len(x):
                raise ValueError(
                    f"classifier must return logits ({len(x)}, K), one row for each sample, got shape "
                    f"{tuple(logits.shape)}."
                )
            labels = cast(Tensor, as_condition(labels, x, Condition(classes=logits.shape[1])))
            logs = logits.log_softmax(1).gather(1, labels[:, None].long())
            (gradient,) = torch.autograd.grad(logs.sum(), x, create_graph=differentiable)
        return gradient
