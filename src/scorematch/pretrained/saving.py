"""Writing networks, into folders and onto the Hugging Face Hub.

A U-Net that diffusers computes alike is written in the layout of diffusers, every other network in this package's own:

=========  =====================================  ============================
..         layout of diffusers                    own layout
=========  =====================================  ============================
config     config.json, with ``_class_name``      config.json
schedule   schedule.json                          in config.json
weights    diffusion_pytorch_model.safetensors    model.safetensors
=========  =====================================  ============================

diffusers refuses the second layout, in which it finds no weights. It prints all keys of config.json that it does not
know; in the first layout the noise levels therefore have a file of their own.
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
from scorematch.pretrained import hub
from scorematch.pretrained.configuration import CONFIG_FILE, SCHEDULE_FILE, architecture, checked
from scorematch.pretrained.model_card import model_card
from scorematch.pretrained.weights import DIFFUSERS_WEIGHTS_FILE, WEIGHTS_FILE


def save(folder: str | os.PathLike[str], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Writes a network into a folder; an interruption leaves the folder's old network in place.

    Args:
        folder: created if it does not exist; files that do not belong to a network stay.
        config: with the keys of ``ScoreNet.config``.
        state_dict: the weights of the backbone.

    Raises:
        TypeError, ValueError: for a configuration that could not be loaded.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a network is saved into a folder.")
    if (folder / "unet" / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} holds another network in unet/. Save into another folder.")
    texts, weights_file = _layout(config)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        old.mkdir()
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        weights = {
            # Copies: tied weights share memory, which safetensors does not write.
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state_dict.items()
        }
        try:
            save_file(weights, new / weights_file, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, among others
            raise OSError(f"{folder} could not be written: {error}") from error
        shutil.copymode(new / CONFIG_FILE, new / weights_file)  # safetensors makes it readable by its owner only
        _replace(folder, new, old)


def _layout(config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The JSON files of a network by name, and the name of its weights file."""
    config = checked(config, "the configuration")
    family = FAMILIES.get(config["family"])
    name = None if family is None else family.diffusers_class(architecture(config), config["precondition"])
    if name is None:
        return {CONFIG_FILE: _json(config)}, WEIGHTS_FILE
    size = None if config["sample_shape"] is None else config["sample_shape"][-1]
    files = {
        CONFIG_FILE: {"_class_name": name, "sample_size": size, **config, "schedule": SCHEDULE_FILE},
        SCHEDULE_FILE: config["schedule"],
    }
    return {file: _json(content) for file, content in files.items()}, DIFFUSERS_WEIGHTS_FILE


def _json(content: Any) -> str:
    try:
        return json.dumps(content, indent=2) + "\n"
    except TypeError as error:
        raise TypeError(f"the configuration must be plain numbers, strings, lists and dicts ({error}).") from error


def _replace(folder: Path, new: Path, old: Path) -> None:
    """Replaces the network of a folder by that in ``new``, which moves to ``old``; all files move or none."""
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
    names = rf"{re.escape(CONFIG_FILE)}|{re.escape(SCHEDULE_FILE)}|model\.safetensors|diffusion_pytorch_model[\w.-]*"
    return (path for path in folder.iterdir() if path.is_file() and re.fullmatch(names, path.name))


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
    """Uploads a network to the Hub; arguments and errors as ``ScoreNet.push_to_hub``.

    Args:
        repo_id: ``owner/name``.
        config: of the network.
        state_dict: the weights of its backbone.
        conditioning: what the network takes as its condition, for the code on the model card.
        license: as in ``push_to_hub``, and so are the others.
        datasets: names on the Hub.
        private: whether a new repository is private.
        revision: the branch.
        token: a token that may write.
        commit_message: of the commit.

    Returns:
        The address of the commit.
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
