"""Stages of a run, between which the network grows.

A small network learns more in a second than a large one, until its loss stops falling. A run may therefore have several
stages. The first one trains the given network. At the end of a stage the average of its weights is continued as a
larger network, which computes the same function at first: additional residual blocks and attention are the identity,
and additional channels have no influence (Chen et al., 2016).

At the beginning of a stage

- the weights are those of the first average of the stage before, and the additional ones are drawn from ``seed``;
- the moments of the optimizer are zero, and the learning rate rises and falls anew;
- the averages begin anew: their lengths are relative to the stage. So does the layer of
  ``scorematch.training.nonleaking``.

The order of the images and all noise depend on the number of the image in the run, and continue. The larger network
depends on the last checkpoint of a stage and on ``seed`` only, so that a run which is interrupted at any time, also
between two stages, ends with the same bits.

References:
    Chen et al., 2016, Net2Net: Accelerating Learning via Knowledge Transfer, arXiv:1511.05641.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.records import as_stored
from scorematch.pretrained.configuration import Stored, architecture
from scorematch.score import ScoreNet


@dataclass(frozen=True)
class Stage:
    """A later stage of a run, at whose beginning the network grows.

    Args:
        share: the part of all images up to the end of this stage that belong to it, above 0 and below 1. With the
            shares 0.5 and 0.5 the three stages of a run have 25, 25 and 50 % of its images.
        network: the arguments of ``ScoreNet.unet`` that change: larger ``layers_per_block``, ``pixel_layers`` or
            ``pixel_channels`` (up to 64), and ``attention`` at more scales.
        training: the arguments of ``train`` that change for this stage, such as ``lr`` or ``levels``.
        fewest: the fewest images of a run that has this stage; a shorter run ends with the stage before.

    Example:
        >>> Stage(0.5, {"layers_per_block": 2}, {"lr": 7e-4}).share
        0.5
    """

    share: float
    network: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    fewest: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {self.share!r}.")
        if not self.network:
            raise ValueError('network must have an argument of ScoreNet.unet, such as {"layers_per_block": 2}.')


def parts(stages: Iterable[Stage]) -> list[float]:
    """The part of the images of a run in its first stage, and in each of the later ones.

    Args:
        stages: the later stages.

    Example:
        >>> parts([Stage(0.5, {"pixel_layers": 2}), Stage(0.5, {"layers_per_block": 2})])
        [0.25, 0.25, 0.5]
    """
    found = [1.0]
    for stage in stages:
        found = [*(part * (1 - stage.share) for part in found), stage.share]
    return found


def enlarged(net: ScoreNet, changes: Mapping[str, Any], seed: int = 0) -> ScoreNet:
    """A larger network that computes the same function as ``net``, which is not changed.

    Args:
        net: a U-Net.
        changes: the arguments of ``ScoreNet.unet`` that change.
        seed: the seed of the additional weights.

    Raises:
        ValueError: if the network cannot grow in this way.

    Example:
        >>> net = ScoreNet.unet(1, 8, widths=(8, 8), layers_per_block=1)
        >>> enlarged(net, {"layers_per_block": 2}).config["layers_per_block"]
        2
    """
    family, before = net.family, as_stored(net.config)
    if family is None:
        raise ValueError("a network with a backbone of your own cannot grow. Use ScoreNet.unet.")
    if before.get("condition_encoder"):
        raise ValueError("a network with an encoder of its condition cannot grow. Leave out growth.")
    config = {**before, **native(family.larger(before, changes))}
    grows = family.growth(before, config)
    wrong = [
        f"{key} from {quote(before.get(key))} to {quote(config[key])}"
        for key in config
        if config[key] != before.get(key) and key not in grows
    ]
    if wrong or config == before:
        raise ValueError(
            f"the network cannot grow with {dict(changes)}: {'; '.join(wrong) or 'it is the same network'}. Every part "
            "must stay as it is or become larger, pixel_channels up to 64."
        )
    keys = {key: value for key, value in architecture(config).items() if key != "family"}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # and not those of other devices
        backbone = family.build(keys, levels=len(net.schedule), precondition=net.precondition)
    dtype = next(net.parameters()).dtype
    weights = family.grow(net.backbone, backbone.to(dtype))
    larger = ScoreNet.from_stored(Stored(config, dict(weights), "the larger network")).to(dtype)
    larger.backbone.load_state_dict(weights)  # from_stored rounds to float32
    return larger
