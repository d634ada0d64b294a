"""Scores that are computed from the score of a network: their base class, and one with other units."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from scorematch.core.batches import as_sigma
from scorematch.core.conditions import Condition
from scorematch.core.scores import (
    Given,
    NetworkScore,
    Score,
    attribute,
    check_score,
    has_inference_copy,
    inference_copy_of,
    noise_ratios,
)


def _of_net(name: str) -> Any:
    """An attribute that is that of the network."""
    return property(lambda derived: attribute(derived.net, name))


class DerivedScore(NetworkScore, nn.Module):
    """A score that is computed from another one, with its schedule, range, deviation of the data and sampler settings.

    Args:
        net: the other score.

    Raises:
        TypeError: if it is not callable.
    """

    net: Score
    schedule: Any = _of_net("schedule")
    value_range: tuple[float, float] | None = _of_net("value_range")
    data_std: float | None = _of_net("data_std")
    units: Any = _of_net("units")
    axes: tuple[str, ...] | None = _of_net("axes")
    sample_shape: tuple[int, ...] | None = _of_net("sample_shape")
    sampler_settings: Any = _of_net("sampler_settings")
    class_names: tuple[str, ...] | None = _of_net("class_names")
    preconditioning: Any = _of_net("preconditioning")
    device: torch.device | None = _of_net("device")
    is_inference_copy: bool = _of_net("is_inference_copy")

    def __init__(self, net: Score) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"net must be a score, called as net(x, sigma), got {type(net).__name__}.")
        self.net = net
        self.predicts_variance = bool(attribute(net, "predicts_variance"))

    def forward(self, x: Tensor, sigma: float | Tensor, condition: Given = None) -> Tensor:
        """The score of x (N, ...) at a noise level sigma: a float, () or (N,).

        Args:
            x: noisy data (N, ...), images in [0, 1] plus noise.
            sigma: the noise level in the units of x.
            condition: the condition of the network.

        Returns:
            The score, with the shape of x.
        """
        return self._outputs(x, sigma, condition)[0]

    @property
    def conditioning(self) -> Condition | None:
        """The condition that the score takes; None if it is not known."""
        takes = attribute(self.net, "conditioning")
        return takes if isinstance(takes, Condition) else None


def call(
    score: Score, x: Tensor, sigma: float | Tensor, condition: Any, *, variance: bool = False
) -> tuple[Tensor, ...]:
    """The score of x, and the variance if ``variance`` is True. A plain function gets a tensor as its noise level."""
    if not has_inference_copy(score):
        sigma = as_sigma(sigma, x)
    arguments = (x, sigma) if condition is None else (x, sigma, condition)
    outputs = attribute(score, "score_and_variance")(*arguments) if variance else (score(*arguments),)
    return tuple(check_score(output, x).to(x.dtype) for output in outputs)


class Isotropic(DerivedScore):
    r"""A score of data with noise of :math:`\sigma r` in each channel, as that of u = x / r, whose noise is sigma.

    .. math:: \nabla_u \log p = r\, \nabla_x \log p

    Its value range is that of x.

    Args:
        net: the score of x.
    """

    @property
    def units(self) -> Any:
        """The mean and the standard deviation of each channel of u."""
        return attribute(self.net, "units").isotropic()

    @property
    def preconditioning(self) -> Any:
        """That of the network, with the units of u."""
        return dataclasses.replace(attribute(self.net, "preconditioning"), data=self.units)

    def inference_copy(self, *, compile: bool = False) -> Isotropic:  # noqa: A002  (torch's word)
        """The same of the inference copy of the network."""
        return Isotropic(inference_copy_of(self.net, compile=compile))

    def definition(self) -> list[Any]:
        """The network."""
        return [self.net]

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        ratios = noise_ratios(self.net, x)
        score, *share = call(self.net, x * ratios, sigma, condition, variance=variance)
        return score * ratios, *share


def ratios_of(score: Score, u: Tensor) -> float | Tensor:
    """The r in x = r u for samples u of an ``Isotropic`` score; 1 for any other score."""
    return noise_ratios(score.net, u) if isinstance(score, Isotropic) else 1.0


def isotropic(score: Score) -> Score:
    """The score of x / r, with the noise sigma in all channels; the score itself if that of x has this noise."""
    units = attribute(score, "units")
    return Isotropic(score) if units is not None and len(set(units.ratios)) > 1 else score
