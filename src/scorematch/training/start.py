"""Begins a training run with the weights of another network, of the same size or smaller."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from scorematch.core.arguments import argument
from scorematch.core.messages import quote
from scorematch.core.records import as_stored
from scorematch.pretrained import load, locate
from scorematch.pretrained.configuration import FREE_KEYS
from scorematch.pretrained.weights import fill
from scorematch.score import ScoreNet

# The keys in which the configurations of ``net`` and ``start`` may differ.
_FREE = {"sample_shape", *FREE_KEYS}


def begin_with(net: ScoreNet, start: str | os.PathLike[str]) -> None:
    """Copies the weights of the trained network ``start`` to ``net``.

    If ``net`` is larger, the additional weights are such that both networks have the same output at first.

    Raises:
        FileNotFoundError: if there is no such network.
        ValueError: if ``net`` is another network, and not a larger one that can begin with these weights.
    """
    stored = load(locate(start))
    grows = growth(net, stored.config, start)
    weights = stored.weights
    if net.family is not None and grows:
        weights = net.family.grow(ScoreNet.from_pretrained(start).backbone, net.backbone)
    fill(net.backbone, weights, stored.source)


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
        grows = net.family.growth(small, config)
    differing = [
        f"{key} is {quote(small.get(key))} instead of {quote(config.get(key))}"
        for key in sorted({*small, *config} - _FREE - grows)
        if small.get(key) != config.get(key)
    ]
    if differing:
        raise ValueError(
            f"{argument('start', os.fspath(start))} is not the same network as the one to train: "
            f"{'; '.join(differing)}. Pass net=ScoreNet.from_pretrained(start), or on the command line leave out "
            "--recipe."
        )
    return grows
