"""Checks that the network, the data and the settings of a training fit together."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.conditions import Condition, Parts, named_parts
from scorematch.data.array_data import ArrayData
from scorematch.data.images import Data, ImageData
from scorematch.score import ScoreNet
from scorematch.training.augment import augmentations
from scorematch.training.growth import enlarged
from scorematch.training.levels import check_levels, levels_for, weighting_for
from scorematch.training.settings import Settings, TrainSettings


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
            f"a batch of {settings.batch_size} is more than the {len(data)} samples of the data. Pass {most}."
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
    from_data = condition_of_data(net, settings)
    if settings.label_drop > 0 and not (from_data is not None and from_data.null_class):
        raise ValueError(
            "label_drop needs a network with a null class, which replaces the dropped labels. Write "
            "ScoreNet.unet(classes=..., null_class=True), or leave out label_drop."
        )
    if from_data is not None:
        first = data.read(torch.zeros(1, dtype=torch.int64, device="cpu"))[1]
        given = given_of(net, data.labels if isinstance(data, ImageData) else first, settings)
        check_condition(given, from_data, tuple(data.shape[1:]))
    elif takes is not None and settings.condition is None and isinstance(data, ArrayData) and data.features:
        raise ValueError(
            f"the data have a vector of {data.features} values as the condition of each sample, which the network "
            f"does not take. Build it with condition_features={data.features}, or leave out the condition."
        )
    elif takes is None and settings.condition is None:
        x, condition = data.read(torch.zeros(1, dtype=torch.int64, device="cpu"))
        try:
            inspect.signature(net.backbone.forward).bind(x, x, *([] if condition is None else [condition]))
        except TypeError as error:
            also = "" if condition is None else " and the condition of the data"
            raise ValueError(
                f"the backbone does not take x, the noise level{also}: {error}. Write forward(self, x, sigma, "
                "condition=None) in its class."
            ) from error
    if isinstance(data, ArrayData) and data.channels and takes is not None and not (takes.channels or takes.encoder):
        raise ValueError(
            f"the data have an image of {data.channels} channels as the condition of each sample, which the network "
            f"does not take. Build it with condition_channels={data.channels}, or leave out the condition."
        )
    augmentations(net, data, settings.augment)


def check_stages(net: ScoreNet, data: Data, settings: TrainSettings, processes: int) -> None:
    """Checks that the network of each stage, the data and the settings of the stage fit together."""
    for number, own in enumerate(settings.stages()):
        net = enlarged(net, settings.growth[number - 1].network) if number else net
        check_arguments(net, data, own, processes)


def condition_of_data(net: ScoreNet, settings: Settings) -> Condition | None:
    """The condition that a network takes from its data, or None; a task computes the image, if there is one."""
    takes = net.conditioning
    if takes is not None and settings.condition is not None:
        takes = takes._replace(channels=0)
    return takes if takes is not None and takes.parts() else None


def given_of(net: ScoreNet, condition: Tensor | Parts | None, settings: Settings) -> Tensor | Parts | None:
    """What a network takes of the condition of data: the labels, the vectors, the images or several of them, or None.

    It is a dict if the network takes several conditions.
    """
    takes, wanted = net.conditioning, condition_of_data(net, settings)
    if takes is None and settings.condition is None:  # a backbone of one's own gets the condition of its data
        return condition
    if takes is None or wanted is None or condition is None:
        return None
    parts = named_parts(condition, wanted)
    if isinstance(condition, dict):
        parts = {name: parts[name] for name in wanted.parts() if name in parts}
    return parts if takes.by_name else next(iter(parts.values()), None)


def check_condition(condition: Tensor | Parts | None, takes: Condition, sides: tuple[int, ...]) -> None:
    """Raises ValueError if there are no labels, vectors or images, or they are not those of the network.

    ``sides`` are those of the data.
    """
    if isinstance(condition, dict):
        for name, part in takes.parts().items():
            check_condition(condition.get(name), part, sides)
        return
    if takes.channels:
        wanted = (takes.channels, *sides)
        if condition is None or not condition.is_floating_point() or condition.shape[1:] != wanted:
            found = "none" if condition is None else f"{condition.dtype} of shape {tuple(condition.shape[1:])} for each"
            raise ValueError(
                f"the network takes an image of {takes.channels} channels as its condition. Pass condition=, such as "
                "scorematch.restoration.palette.Colorization(), or a pair (x, condition) with a floating-point "
                f"condition (N, {', '.join(map(str, wanted))}), got {found}."
            )
        return
    if takes.vector:
        fits = condition is not None and (takes.encoder or condition.shape[1:] == (takes.vector,))
        if condition is None or not condition.is_floating_point() or not fits:
            found = "none" if condition is None else f"{condition.dtype} of shape {tuple(condition.shape[1:])} for each"
            raise ValueError(
                f"the network takes a vector of {takes.vector} values as the condition of each sample, got {found}. "
                f"Pass a pair (x, condition) with a floating-point condition (N, {takes.vector})."
            )
        return
    classes = (takes.classes or 0) + takes.null_class
    if condition is None:
        raise ValueError("the network is class-conditional, but the data have no labels. Open them with labels=True.")
    wrong = condition[(condition < 0) | (condition >= classes)]
    if len(wrong):
        raise ValueError(f"labels must be classes of the network, from 0 to {classes - 1}, got {int(wrong.max())}.")
