"""Trained networks on disk: a folder with a configuration and weights, and the networks that ship with the package.

A folder of this package holds ``config.json`` (what rebuilds the network: family, sizes, preconditioning, ladder,
recommended sampler settings, and the version of this format) and the weights under their published names, in
``model.safetensors`` or, for a U-Net, in ``diffusion_pytorch_model.safetensors``. Folders in the layout of diffusers
are read too: ``layout`` translates their configurations.

No file can run code. JSON and safetensors hold numbers only, and of a pickle (``.bin``) only tensors are accepted.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scorematch import cards, hub, layout
from scorematch.nets.unet import UNet

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
UNET_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# Where a U-Net's weights may be, in the order of preference; an index names the parts of weights in several files.
_UNET_WEIGHTS_FILES = (
    UNET_WEIGHTS_FILE,
    f"{UNET_WEIGHTS_FILE}.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)

_REFINENET = {"family": str, "channels": int, "width": int, "depth": str}
_REQUIRED: dict[str, dict[str, type]] = {  # by which each family's backbone is rebuilt
    "ncsn": _REFINENET,
    "ncsnv2": _REFINENET,
    "unet": {"family": str, "block_out_channels": list},
    "custom": {"family": str},
}
_COMMON = ("precondition", "sample_shape", "value_range", "sampler", "schedule")

_SHIPPED = Path(__file__).parent / "weights"


def locate(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, cards.Card | None]:
    """The folder with a network of that name, fetched from the Hub if need be, and its card, if it has one."""
    name = name_or_folder if isinstance(name_or_folder, str) else None
    card = None if name is None else cards.find(name)
    if card is not None and card.repository is None:
        return _SHIPPED / str(card.name), card
    if card is not None and not Path(str(name)).is_dir():
        name, revision = card.repository, card.revision if revision is None else revision
    elif Path(name_or_folder).is_dir():
        return Path(name_or_folder), None
    if name is not None and hub.is_repository(name):
        folder = hub.fetch(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return folder, card
    known = ", ".join(repr(card.name) for card in cards.CARDS if card.name is not None)
    raise FileNotFoundError(
        f"{os.fspath(name_or_folder)!r} is neither a known network ({known}), nor a folder, nor a repository of the "
        "Hub (owner/name)."
    )


@contextmanager
def unaltered(folder: Path) -> Iterator[None]:
    """Where reading a folder fails, says so if a file of it is not what the Hub sent."""
    try:
        yield
    except ValueError as error:
        altered = hub.altered_file(folder)
        if altered is None:
            raise
        raise ValueError(
            f"{altered} is not what the Hub sent (its hash is another): delete it and load again to fetch it anew."
        ) from error


def read_config(folder: Path, card: cards.Card | None = None) -> dict[str, Any]:
    """The checked configuration of a folder, whichever layout it has, corrected by its card."""
    home = _home(folder)
    config = _read_json(home / CONFIG_FILE)
    if "format_version" not in config and config.get("_class_name") in layout.UNET_CLASSES:
        _refuse_latents(home)
        scheduler = _scheduler(folder)
        if card is not None and card.correction:
            corrected = {"sigma_max": card.sigmas[0], "sigma_min": card.sigmas[1], "num_train_timesteps": card.levels}
            scheduler = {**(scheduler or {}), **corrected}
        return layout.translate(config, scheduler)
    path = home / CONFIG_FILE
    if "format_version" not in config:
        raise ValueError(
            f"{path} has no format_version: it was not written by save_pretrained, and its class, "
            f"{config.get('_class_name')!r}, is not one of those of diffusers that are read, "
            f"{' and '.join(layout.UNET_CLASSES)}."
        )
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {config['format_version']!r}, this version of scorematch reads "
            f"{FORMAT_VERSION}. A newer scorematch may read it."
        )
    if config.get("family") not in _REQUIRED:
        known = ", ".join(map(repr, _REQUIRED))
        raise ValueError(f"{path} names the family {config.get('family')!r}; known are {known}.")
    required = _REQUIRED[config["family"]]
    absent = [key for key in (*required, *_COMMON) if key not in config]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}.")
    for key, kind in required.items():
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise ValueError(f"{path}: {key} must be {kind.__name__}, got {config[key]!r}.")
    return config


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says how the backbone is built."""
    keys = ("family", *layout.UNET_KEYS) if config["family"] == "unet" else _REQUIRED[config["family"]]
    return {key: config[key] for key in keys if key in config}


def _home(folder: Path) -> Path:
    """Where a folder's network is: in it, or, of a pipeline, in its unet/."""
    if not (folder / "unet" / CONFIG_FILE).is_file():
        return folder
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds two networks, one in it and one in unet/: pass the folder of one of them.")
    return folder / "unet"


def _refuse_latents(home: Path) -> None:
    """Raises for the U-Net of a latent pipeline: what it draws are no pixels."""
    pipeline = home.parent if home.name == "unet" else home
    index = _read_json(pipeline / "model_index.json") if (pipeline / "model_index.json").is_file() else {}
    for part in ("vae", "vqvae"):
        if part in index or (home.name == "unet" and (pipeline / part).is_dir()):
            raise ValueError(
                f"{pipeline} is a latent pipeline, with a {part}/: its U-Net is a score of latents, not of pixels."
            )


def _scheduler(folder: Path) -> dict[str, Any] | None:
    # Given the unet/ of a pipeline itself, the scheduler is its neighbor.
    for path in (folder / "scheduler", folder, folder.parent / "scheduler"):
        if (path / "scheduler_config.json").is_file():
            return _read_json(path / "scheduler_config.json")
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(path.parent, path.name) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save or fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no format_version: it holds a {type(content).__name__}, not a configuration.")
    return content


def load_weights(backbone: nn.Module, folder: Path) -> Tensor | None:
    """Fills a backbone with a folder's weights, every one of them, cast to the backbone's dtypes.

    Returns:
        The ladder that is stored among the weights, if there is one.
    """
    home = _home(folder)
    names = _UNET_WEIGHTS_FILES if isinstance(backbone, UNet) else (WEIGHTS_FILE,)
    path = next((home / name for name in names if (home / name).is_file()), None)
    if path is None:
        raise _missing(home, names[0])
    weights = _read_weights(path)
    if isinstance(backbone, UNet):
        weights = layout.current_names(weights)
    ladder = weights.pop("sigmas", None) if "sigmas" not in backbone.state_dict() else None
    fill(backbone, weights, path)
    return ladder


def fill(backbone: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Gives a backbone its weights, which were in the file ``path``: all of them, and no others."""
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


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the files that an index names."""
    if path.name.endswith(".index.json"):
        parts = _read_json(path).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
            raise ValueError(f"{path} does not say, in weight_map, which file holds which tensor; fetch it again.")
        weights: dict[str, Tensor] = {}
        for name in sorted(set(parts.values())):
            part = path.parent / Path(name).name  # an index names files beside it, nothing elsewhere
            if not part.is_file():
                raise _missing(path.parent, part.name)
            weights.update(_read_weights(part))
        return weights
    if path.suffix != ".safetensors":
        weights = read_pickle(path)
        if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise ValueError(f"{path} does not hold a network's weights, a mapping of names to tensors.")
        return {str(name): tensor for name, tensor in weights.items()}
    _refuse_pointer(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, f" ({error})") from error


def read_pickle(path: Path) -> Any:
    """What a file of torch's holds, if that is tensors, numbers, strings, lists and dicts: no other is opened."""
    _refuse_pointer(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # What torch says of a refusal is how to open the file all the same, which is the last thing to tell of it.
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|Unsupported class) (\w[\w.]*\w)", str(error))
        raise ValueError(
            f"{path} holds more than tensors{'' if asked is None else f' ({asked[1]})'}, or is damaged, and was not "
            "opened: a pickle can run code."
        ) from error
    except Exception as error:  # damage can be met anywhere in the reading: IndexError, struct.error, ...
        raise _incomplete(path) from error


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights: run git lfs pull, or fetch the file itself."
            )


def _incomplete(path: Path, why: str = "") -> ValueError:
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) is not a complete {path.suffix[1:]} file{why}; fetch or save it again."
    )


def save(folder: str | os.PathLike[str], config: dict[str, Any], backbone: nn.Module) -> None:
    """Writes both files of a network; an interruption leaves the folder's old network in place."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a network is saved into a folder.")
    weights_file = WEIGHTS_FILE
    if isinstance(backbone, UNet):  # diffusers' own keys beside ours: it reads the folder too
        weights_file = UNET_WEIGHTS_FILE
        size = None if config["sample_shape"] is None else config["sample_shape"][-1]
        config = {"_class_name": "UNet2DModel", "sample_size": size, **config}
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
        (staged / CONFIG_FILE).write_text(text, encoding="utf-8")
        try:
            save_file(weights, staged / weights_file, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, among others
            raise OSError(f"{folder} could not be written: {error}") from error
        shutil.copymode(staged / CONFIG_FILE, staged / weights_file)  # safetensors makes it readable by its owner only
        _replace(staged, folder, (weights_file, CONFIG_FILE))


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
    weights = WEIGHTS_FILE if name == CONFIG_FILE else name
    return FileNotFoundError(f"{folder} has no {name}; it holds {found}. A network is {CONFIG_FILE} and {weights}.")


def _first(words: list[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
