"""Begins a training run with the weights of another network, of the same size or smaller."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.messages import quote
from scorematch.core.records import as_stored
from scorematch.data.images import Data, ImageData
from scorematch.data.pictures import is_picture
from scorematch.nets import FAMILIES
from scorematch.pretrained import load, locate
from scorematch.pretrained.configuration import FREE_KEYS, Stored
from scorematch.pretrained.weights import fill
from scorematch.score import ScoreNet
from scorematch.training.augment import can_be_told
from scorematch.training.settings import Settings

# The keys in which the configurations of ``net`` and ``start`` may differ.
_FREE = {"sample_shape", *FREE_KEYS}


# Of a run without --recipe that begins with a trained network: epochs of the data, the fewest images and steps, and the
# rate. With 500 pictures, 780 steps of 32 images led to far better samples than 196 steps of 128 (docs/training.md).
_EPOCHS, _FEWEST, _STEPS, _RATE = 50, 20_000, 750, 5e-4
_PARAMETERS = 8e6  # up to which this rate holds; above, it is inversely proportional to the width (arXiv:2203.03466)
_MULTIPLE = 8  # of images in a batch
SMALL = 2_000  # images; of smaller data the report looks for copies
_FEW = 100  # images; smaller data, which such a run sees more than 200 times, are augmented without leaking


def fine_tuning(net: ScoreNet, data: Data, settings: Settings) -> dict[str, Any]:
    """The options of ``train`` with which a command trains a trained network further.

    A run has 50 epochs, but at least 20,000 images and at most those of ``settings``. The learning rate is half of that
    of a new network, and lower for more than 8 million parameters. The batch size is such that the run has at least 750
    steps; it is 8 or more, but not more than the number of images. Fewer than 100 pictures are augmented without
    leaking, if the network can be told.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters())
    rate = float(f"{_RATE * min(1.0, math.sqrt(_PARAMETERS / parameters)):.2g}")
    images = min(max(_EPOCHS * len(data), _FEWEST), settings.images)
    batch_size = max(_MULTIPLE, images // _STEPS // _MULTIPLE * _MULTIPLE)
    options = {"images": images, "lr": rate, "batch_size": min(batch_size, len(data), settings.batch_size)}
    few = isinstance(data, ImageData) and len(data) < _FEW and is_picture(data.shape) and can_be_told(net)
    return {**options, "augment": ("nonleaking",)} if few else options


def begin_with(net: ScoreNet, start: str | os.PathLike[str]) -> None:
    """Copies the weights of the trained network ``start`` to ``net``.

    If ``net`` is larger, the additional weights are such that both networks have the same output at first. If it has
    other classes or another condition, those that both have are kept (``scorematch.nets.reconditioning``).

    Raises:
        FileNotFoundError: if there is no such network.
        ValueError: if ``net`` is another network, and not a larger one that can begin with these weights.
    """
    stored = load(locate(start))
    grows = growth(net, stored.config, start)
    weights = stored.weights
    if net.family is not None:
        stored = with_condition(stored, net.config, net.backbone.state_dict())
        weights = stored.weights
        if grows:
            weights = net.family.grow(ScoreNet.from_stored(stored).backbone, net.backbone)
    fill(net.backbone, weights, stored.source)


def with_condition(stored: Stored, config: Mapping[str, Any], own: Mapping[str, Tensor] | None = None) -> Stored:
    """A stored network with the condition of a configuration; ``own`` are the weights for what is new."""
    changed, weights = FAMILIES[stored.config["family"]].recondition(stored.weights, stored.config, config, own or {})
    return stored._replace(config=changed, weights=weights)


def growth(net: ScoreNet, small: Mapping[str, Any], start: str | os.PathLike[str]) -> set[str]:
    """The keys of the configuration in which ``net`` exceeds the starting network.

    Args:
        net: the network to train.
        small: the configuration of the starting network.
        start: its name or folder, for the message.

    Raises:
        ValueError: if ``net`` is another network, and not a larger one that can begin with these weights.
    """
    config = as_stored(net.config)
    grows: set[str] = set()
    if net.family is not None and small["family"] == config["family"]:
        small, _ = net.family.recondition({}, small, config, {})
        grows = net.family.growth(small, config)
    keys = {*small, *config} - _FREE - grows if small["family"] == config["family"] else {"family"}
    differing = [
        f"{key} is {quote(small.get(key))} instead of {quote(config.get(key))}"
        for key in sorted(keys)
        if small.get(key) != config.get(key)
    ]
    if differing:
        raise ValueError(
            f"{argument('start', os.fspath(start))} is not the same network as the one to train: "
            f"{'; '.join(differing)}. Pass net=ScoreNet.from_pretrained(start), or on the command line leave out "
            "--recipe."
        )
    return grows
