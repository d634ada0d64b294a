"""Checks that the network, the data and the settings of a training fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.data.images import Data, ImageData
from scorematch.score import ScoreNet
from scorematch.training.levels import check_levels, levels_for, weighting_for
from scorematch.training.settings import Settings


def check_network(net: object) -> None:
    """Raises TypeError if an object is not a ScoreNet."""
    if not isinstance(net, ScoreNet):
        raise TypeError(f"net must be a ScoreNet, got {type(net).__name__}. Write ScoreNet(backbone, schedule).")


def check_arguments(net: ScoreNet, data: Data, settings: Settings, processes: int) -> None:
    """Checks that the network, the data and the settings fit together."""
    check_network(net)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("the network has no trainable weights. Write net.requires_grad_(True).")
    if not hasattr(data, "fingerprint"):
        raise TypeError(f"data must be the result of open_images, got {type(data).__name__}. Write open_images(data).")
    if net.sample_shape is not None and tuple(data.shape) != net.sample_shape:
        raise ValueError(
            f"the data must have samples of the network's sample_shape, {net.sample_shape}, got {tuple(data.shape)}."
        )
    if len(data) < settings.batch_size:
        most = argument("batch_size", len(data)) + (" or less" if len(data) > 1 else "")
        raise ValueError(
            f"a batch of {settings.batch_size} is more than the {len(data)} images of the data. Pass {most}."
        )
    if settings.batch_size % processes:
        raise ValueError(
            f"{argument('batch_size')} must be a multiple of the number of processes, {processes}, got "
            f"{settings.batch_size}."
        )
    check_levels(levels_for(net, settings.levels))
    weighting_for(net, settings.weighting, settings.p)
    takes = net.conditioning
    if settings.condition is not None and takes is not None and takes.channels == 0:
        raise ValueError(
            "condition= is for networks that take an image as their condition, which net does not. Write "
            "ScoreNet.unet(condition_channels=...)."
        )
    if takes is not None and takes.channels > 0 and settings.condition is None:
        raise ValueError(
            f"the network takes an image of {takes.channels} channels as its condition. Pass condition=, such as "
            "scorematch.restoration.palette.Colorization()."
        )
    classes = class_count(net, settings)
    if settings.label_drop > 0 and not (classes is not None and takes is not None and takes.null_class):
        raise ValueError(
            "label_drop needs a network with a null class, which replaces the dropped labels. Write "
            "ScoreNet.unet(classes=..., null_class=True), or leave out label_drop."
        )
    if classes is not None:
        check_labels(
            data.labels
            if isinstance(data, ImageData)
            else data.read(torch.zeros(1, dtype=torch.int64, device="cpu"))[1],
            classes,
        )


def class_count(net: ScoreNet, settings: Settings) -> int | None:
    """The number of classes of a network that is trained with labels, with the null class, or None."""
    takes = net.conditioning
    if takes is None or takes.classes is None or settings.condition is not None:
        return None
    return takes.classes + takes.null_class


def check_labels(labels: Tensor | None, classes: int) -> None:
    """Raises ValueError if there are no labels, or one is not a class of the network."""
    if labels is None:
        raise ValueError("the network is class-conditional, but the data have no labels. Open them with labels=True.")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"labels must be classes of the network, from 0 to {classes - 1}, got {int(wrong.max())}.")
