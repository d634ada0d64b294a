"""Saving networks to folders.

A U-Net that diffusers can run with the same result is saved in the layout of diffusers, every other network in this
package's own layout:

=========  =====================================  ============================
..         layout of diffusers                    own layout
=========  =====================================  ============================
config     config.json, with ``_class_name``      config.json
schedule   schedule.json                          in config.json
weights    diffusion_pytorch_model.safetensors    model.safetensors
=========  =====================================  ============================

diffusers refuses the second layout, because it finds no weights there. It prints all keys of config.json that it does
not know; in its layout the noise levels are therefore in a separate file. If a pipeline of diffusers can run the
network, the folder is a pipeline: it also holds model_index.json and scheduler_config.json, which only diffusers uses.
A scheduler with which the network came is kept there as it was. The preconditioning "karras" has the layout of
diffusers only if it is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from scorematch.core.files import new_files
from scorematch.nets import FAMILIES
from scorematch.pretrained import diffusers as pipelines
from scorematch.pretrained.configuration import CONFIG_FILE, SCHEDULE_FILE, Stored, checked
from scorematch.pretrained.loading import build
from scorematch.pretrained.weights import DIFFUSERS_WEIGHTS_FILE, WEIGHTS_FILE


def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    diffusers: bool = False,
    condition_encoder: nn.Module | None = None,
) -> None:
    """Saves a network to a folder.

    If there is an error or a KeyboardInterrupt, the folder is as it was. If the process is killed at any time,
    the folder has the previous network or the new one for ``load``, and the next call deletes incomplete files
    (``scorematch.core.files.new_files``). Several processes may save to one folder; the network of the last one
    remains.

    Args:
        folder: created if it does not exist. Files in it that do not belong to a network are kept.
        config: the configuration, with the keys of ``ScoreNet.config``.
        state_dict: the weights of the backbone by name.
        diffusers: whether to refuse networks that no pipeline of diffusers can run.
        condition_encoder: the encoder of the condition of the network, if it has one, which is not changed.

    Raises:
        TypeError: if the configuration has values that JSON cannot store.
        ValueError: if the configuration is invalid, the weights do not have the names and shapes that it requires, or
            ``diffusers`` is True and no pipeline can run the network.
        NotADirectoryError: if ``folder`` is a file.
        FileExistsError: if ``folder`` holds another network in unet/, or is the folder of a training run.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a network is saved into a folder.")
    if (folder / "unet" / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} holds another network in unet/. Save into another folder.")
    if (folder / "network" / CONFIG_FILE).is_file():
        raise FileExistsError(
            f"{folder} is the folder of a training run, whose network is in network/. Save into another folder."
        )
    texts, weights_file = _layout(config, diffusers)
    _check_names(config, state_dict, condition_encoder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_files(folder, _network_files) as new:
            for name, text in texts.items():
                (new / name).write_text(text, encoding="utf-8")
            save_file(_separate(state_dict), new / weights_file, metadata={"format": "pt"})
            shutil.copymode(new / CONFIG_FILE, new / weights_file)  # safetensors gives only the owner access
    except (SafetensorError, OSError) as error:  # safetensors has its own error if the disk is full
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        message = f"{folder} could not be written: {reason or error}"
        raise (OSError(message) if number is None else OSError(number, message)) from error


def _check_names(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], encoder: nn.Module | None) -> None:
    """Checks that a network could be loaded; wrappers and parametrizations change the names of the weights."""
    other = next((name for name, value in state_dict.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ValueError(
            f"the backbone stores {other!r} in its state_dict, which is not a tensor, and only tensors are saved. Keep "
            "it in an attribute of your class."
        )
    if config["family"] not in FAMILIES:
        return
    expected = build(Stored(dict(config), {}, Path(), has_weights=False), None, encoder).state_dict()
    wrong = expected.keys() ^ state_dict.keys()
    wrong |= {name for name in expected.keys() - wrong if expected[name].shape != state_dict[name].shape}
    if wrong:
        raise ValueError(
            f"the weights of the backbone do not fit its configuration, for example {min(wrong)!r}. Set net.backbone "
            "to the original network, without wrappers and parametrizations."
        )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, with copies of those that share memory, which safetensors does not write."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        separate[name] = tensor
    return separate


def _layout(config: Mapping[str, Any], diffusers: bool) -> tuple[dict[str, str], str]:
    """The texts of a network's JSON files by file name, and the name of its weights file."""
    config = checked(config, "the configuration")
    obstacle = pipelines.obstacle(config)
    if diffusers and obstacle is not None:
        raise ValueError(
            f"no pipeline of diffusers can run this network: {obstacle}. Leave out diffusers=True to save it for "
            "scorematch."
        )
    name = pipelines.class_of(config)
    if name is None or (config["precondition"] == pipelines.KARRAS and not diffusers):
        return {CONFIG_FILE: _json(config)}, WEIGHTS_FILE
    size = None if config["sample_shape"] is None else config["sample_shape"][1:]
    size = size[0] if size is not None and size[0] == size[1] else size
    files = {
        CONFIG_FILE: {"_class_name": name, "sample_size": size, **config, "schedule": SCHEDULE_FILE},
        SCHEDULE_FILE: config["schedule"],
    }
    if config.get("scheduler") is not None:
        files[CONFIG_FILE]["scheduler"] = pipelines.SCHEDULER_FILE
        files[pipelines.SCHEDULER_FILE] = config["scheduler"]
    if obstacle is None:
        files |= pipelines.pipeline(config)
    return {file: _json(content) for file, content in files.items()}, DIFFUSERS_WEIGHTS_FILE


def _json(content: Any) -> str:
    try:
        return json.dumps(content, indent=2) + "\n"
    except TypeError as error:
        raise TypeError(f"the configuration must hold only numbers, strings, lists and dicts ({error}).") from error


def _network_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that belong to its network."""
    named = {CONFIG_FILE, SCHEDULE_FILE, WEIGHTS_FILE, pipelines.SCHEDULER_FILE, pipelines.INDEX_FILE}
    diffusers = r"diffusion_pytorch_model[\w.-]*"
    return (
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name in named or re.fullmatch(diffusers, path.name))
    )
