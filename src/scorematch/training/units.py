"""The units of data that are not pictures, which a new network gets at the start of its training.

The mean and the standard deviation of each channel are measured once, and are stored in the network. A run that
continues, or that begins with the weights of another network, has the units with which these weights were trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from scorematch.core.arguments import argument
from scorematch.core.batches import is_outside
from scorematch.data import ArrayData
from scorematch.data.images import Data
from scorematch.data.moments import Moments, moments
from scorematch.data.pictures import is_picture
from scorematch.nets.precondition import ROWS
from scorematch.pretrained import load, locate
from scorematch.score import ScoreNet

_UNIT_RANGE = (0, 1)


def take_units(
    net: ScoreNet,
    data: Data,
    record: Mapping[str, Any] | None = None,
    start: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
) -> None:
    """Gives a network the units of the run that continues, or of the network ``start``, or else those of its data.

    Units are measured for a new network without a range, and for data outside of the range (0, 1) of images.

    Args:
        net: the network, which is changed.
        data: the data.
        record: the configuration of the network in the record of the run; None for a new run.
        start: the network with whose weights a new run begins.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the data are not finite, a channel is constant, or they are outside of the range of the network.
    """
    if record is None and start is not None:
        record = load(locate(start), weights=False).config
    if record is not None:
        if net.units is None:
            net.take_units(record)
    elif net.is_new and net.units is None and _may_have_units(net, data):
        net.axes = data.axes if isinstance(data, ArrayData) else None
        found, of_condition = moments(data, takes=net.conditioning, progress=progress)
        image = of_condition.get("image")
        if _has_units(net, data, found) or (image is not None and is_outside(*_ends(image), _UNIT_RANGE)):
            net.take_moments(found, of_condition)
    net.is_new = False


def _may_have_units(net: ScoreNet, data: Data) -> bool:
    pictures = is_picture(data.shape) and net.value_range == _UNIT_RANGE and not isinstance(data, ArrayData)
    return not pictures and data.read(torch.zeros(1, dtype=torch.int64, device="cpu"))[0].is_floating_point()


def _has_units(net: ScoreNet, data: Data, found: Moments) -> bool:
    """Whether the units of data are those that were measured; False if they are those of the network's range."""
    (low, high), own = _ends(found), net.value_range
    outside = own is not None and is_outside(low, high, own)
    if own == _UNIT_RANGE and not outside:
        return False
    got = f"got values from {low:.3g} to {high:.3g}"
    if not ROWS[net.precondition].centered:
        if outside:
            raise ValueError(
                f"the data must have values in {own}, {got}. For data in other units build the network with "
                f"{argument('precondition', 'karras')}."
            )
        return False
    if outside and own != _UNIT_RANGE:
        raise ValueError(
            f"the data must have values in the network's value_range, {own}, {got}. Write net.value_range = None for "
            "data without a range."
        )
    return True


def _ends(found: Moments) -> tuple[float, float]:
    return float(found.low.min()), float(found.high.max())
