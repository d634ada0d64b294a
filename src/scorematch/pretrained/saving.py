"""Saving networks to folders and to the Hugging Face Hub.

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
not know; in its layout the noise levels are therefore in a separate file. If ``DDPMPipeline`` can run the network, the
folder is a pipeline: it also holds model_index.json and scheduler_config.json, which this package does not read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scorematch.nets import FAMILIES, Condition
from scorematch.pretrained import diffusers as pipelines
from scorematch.pretrained import hub
from scorematch.pretrained.configuration import CONFIG_FILE, SCHEDULE_FILE, architecture, checked
from scorematch.pretrained.model_card import model_card
from scorematch.pretrained.weights import DIFFUSERS_WEIGHTS_FILE, WEIGHTS_FILE


def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    diffusers: bool = False,
) -> None:
    """Saves a network to a folder. If saving is interrupted, the previous network in the folder remains.

    Args:
        folder: created if it does not exist. Files in it that do not belong to a network are kept.
        config: the configuration, with the keys of ``ScoreNet.config``.
        state_dict: the weights of the backbone by name.
        diffusers: whether to refuse networks that a ``DDPMPipeline`` of diffusers cannot run.

    Raises:
        TypeError, ValueError: if the configuration is invalid and could not be loaded.
        ValueError: if ``diffusers`` is True and a ``DDPMPipeline`` cannot run the network.
        NotADirectoryError: if ``folder`` is a file.
        FileExistsError: if ``folder`` holds another network in unet/.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a network is saved into a folder.")
    if (folder / "unet" / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} holds another network in unet/. Save into another folder.")
    texts, weights_file = _layout(config, diffusers)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        old.mkdir()
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        try:
            save_file(_separate(state_dict), new / weights_file, metadata={"format": "pt"})
        except SafetensorError as error:  # if the disk is full, for example
            raise OSError(f"{folder} could not be written: {error}") from error
        shutil.copymode(new / CONFIG_FILE, new / weights_file)  # safetensors makes the file readable only by its owner
        _replace(folder, new, old)


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
            f"a DDPMPipeline of diffusers cannot run this network: {obstacle}. Leave out diffusers=True to save it for "
            "scorematch."
        )
    family = FAMILIES.get(config["family"])
    name = None if family is None else family.diffusers_class(architecture(config), config["precondition"])
    if name is None:
        return {CONFIG_FILE: _json(config)}, WEIGHTS_FILE
    size = None if config["sample_shape"] is None else config["sample_shape"][1:]
    size = size[0] if size is not None and size[0] == size[1] else size
    files = {
        CONFIG_FILE: {"_class_name": name, "sample_size": size, **config, "schedule": SCHEDULE_FILE},
        SCHEDULE_FILE: config["schedule"],
        **(pipelines.pipeline(config) if obstacle is None else {}),
    }
    return {file: _json(content) for file, content in files.items()}, DIFFUSERS_WEIGHTS_FILE


def _json(content: Any) -> str:
    try:
        return json.dumps(content, indent=2) + "\n"
    except TypeError as error:
        raise TypeError(f"the configuration must hold only numbers, strings, lists and dicts ({error}).") from error


def _replace(folder: Path, new: Path, old: Path) -> None:
    """Moves the network of ``folder`` to ``old``, and that of ``new`` to ``folder``; either all files move or none."""
    moves = [(path, old / path.name) for path in _network_files(folder)]
    moves += [(path, folder / path.name) for path in new.iterdir()]
    begun = []
    try:
        for source, target in moves:
            begun.append((source, target))
            os.replace(source, target)
    except BaseException:  # Ctrl-C too
        for source, target in reversed(begun):
            if not source.exists():
                os.replace(target, source)
        raise


def _network_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that belong to its network."""
    named = {CONFIG_FILE, SCHEDULE_FILE, WEIGHTS_FILE, pipelines.SCHEDULER_FILE, pipelines.INDEX_FILE}
    diffusers = r"diffusion_pytorch_model[\w.-]*"
    return (
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name in named or re.fullmatch(diffusers, path.name))
    )


def push(
    repo_id: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    conditioning: Condition | None = None,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    datasets: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a score network",
) -> str:
    """Uploads a network to the Hub, with the arguments and errors of ``ScoreNet.push_to_hub``.

    Args:
        repo_id: ``owner/name``, created if it does not exist.
        config: the configuration, with the keys of ``ScoreNet.config``.
        state_dict: the weights of the backbone by name.
        conditioning: what the network takes as its condition, for the code on the model card.
        license: the license for a new model card, as the Hub abbreviates it, such as "mit".
        datasets: the names of the training data on the Hub, for a new model card.
        private: whether a new repository is private; None is the owner's default.
        revision: the branch, created if it does not exist; None is the main branch.
        token: a token with write access; None uses the token of ``hf auth login``.
        commit_message: the message of the commit.

    Returns:
        The URL of the commit.
    """
    if not hub.is_repository(repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}.")
    count = sum(tensor.numel() for tensor in state_dict.values())
    card = model_card(repo_id, config, count, conditioning=conditioning, license=license, datasets=datasets)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, config, state_dict)
        return hub.upload(
            Path(folder),
            repo_id,
            card,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )
