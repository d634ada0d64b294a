"""Trained networks on disk: a folder with a configuration and weights, and the networks that ship with the package.

A folder holds ``config.json`` (what rebuilds the network: family, sizes, preconditioning, ladder, recommended sampler
settings, and the version of this format) and ``model.safetensors`` (the backbone's weights, under the published
names). No file can run code: JSON and safetensors hold numbers only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# The keys by which each family's backbone is rebuilt.
_REFINENET = {"family": str, "channels": int, "width": int, "depth": str}
ARCHITECTURE: dict[str, dict[str, type]] = {"ncsn": _REFINENET, "ncsnv2": _REFINENET, "custom": {"family": str}}
_COMMON = ("precondition", "sample_shape", "value_range", "sampler", "schedule")

_SHIPPED = Path(__file__).parent / "weights"


def shipped() -> list[str]:
    """The short names of the networks that ship with the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG_FILE}"))


def locate(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a short name, or the folder itself."""
    if isinstance(name_or_folder, str) and name_or_folder in shipped():
        return _SHIPPED / name_or_folder
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    known = ", ".join(map(repr, shipped()))
    raise FileNotFoundError(
        f"{os.fspath(name_or_folder)!r} is neither a network that ships with the package ({known}) nor a folder."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The checked content of a folder's config.json."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(folder, CONFIG_FILE) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the network again.") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise ValueError(f"{path} has no format_version: it was not written by save_pretrained.")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {config['format_version']!r}, this version of scorematch reads "
            f"{FORMAT_VERSION}. A newer scorematch may read it."
        )
    if config.get("family") not in ARCHITECTURE:
        known = ", ".join(map(repr, ARCHITECTURE))
        raise ValueError(f"{path} names the family {config.get('family')!r}; known are {known}.")
    architecture = ARCHITECTURE[config["family"]]
    absent = [key for key in (*architecture, *_COMMON) if key not in config]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}.")
    for key, kind in architecture.items():
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise ValueError(f"{path}: {key} must be {kind.__name__}, got {config[key]!r}.")
    return config


def load_weights(backbone: nn.Module, folder: Path) -> None:
    """Fills a backbone with a folder's weights, every one of them, cast to the backbone's dtypes."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise _missing(folder, WEIGHTS_FILE)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file ({error}); "
            "fetch or save it again."
        ) from error
    expected = backbone.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensor(s) that the network needs: {_first(missing)}.")
    if unexpected:
        raise ValueError(f"{path} holds {len(unexpected)} tensor(s) that the network lacks: {_first(unexpected)}.")
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the weights in {path} belong to a network of other sizes: {_first(wrong)}.")
    backbone.load_state_dict(weights)


def save(folder: str | os.PathLike[str], config: dict[str, Any], backbone: nn.Module) -> None:
    """Writes both files of a network; an interruption leaves the folder's old network in place."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a network is saved into a folder.")
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise TypeError(f"the configuration must be plain numbers, strings, lists and dicts ({error}).") from error
    weights: dict[str, Tensor] = {
        # Copies: tied weights share memory, which safetensors refuses to write twice.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        staged = Path(staging)
        save_file(weights, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        (staged / CONFIG_FILE).write_text(text, encoding="utf-8")
        _replace(staged, folder, (WEIGHTS_FILE, CONFIG_FILE))


def _replace(staged: Path, folder: Path, names: Iterable[str]) -> None:
    """Moves staged files into a folder, all of them or none."""
    moved: list[tuple[Path, Path]] = []
    try:
        for name in names:
            target, old = folder / name, staged / f"old-{name}"
            if target.exists():
                try:
                    os.link(target, old)  # the target stays in place until the new file takes its name
                except OSError:  # a file system without hard links
                    shutil.copy2(target, old)
            moved.append((target, old))
            os.replace(staged / name, target)
    except BaseException:  # Ctrl-C too
        for target, old in moved:
            if old.exists():
                os.replace(old, target)
            else:
                target.unlink(missing_ok=True)
        raise


def _missing(folder: Path, name: str) -> FileNotFoundError:
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    return FileNotFoundError(
        f"{folder} has no {name}; it holds {found}. A network is {CONFIG_FILE} and {WEIGHTS_FILE}."
    )


def _first(words: list[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
