"""Files of tensors, and how a backbone receives them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scorematch.pretrained.configuration import missing, read_json, remedy

WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# Where diffusers may keep weights, in the order of preference; an index names the parts of weights in several files.
DIFFUSERS_WEIGHTS_FILES = (
    DIFFUSERS_WEIGHTS_FILE,
    f"{DIFFUSERS_WEIGHTS_FILE}.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)


# -- Files ------------------------------------------------------------------------------------------------------------


def read_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a folder, from the first of the named files that exists.

    Raises:
        FileNotFoundError: if none of them exists, or a part that an index names is missing.
        ValueError: if a file is damaged, or holds something else.
    """
    names = tuple(names)
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise missing(folder / names[0])
    return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".index.json"):
        parts = read_json(path).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(name, str) and Path(name).name for name in parts.values()):
            raise ValueError(f"{path}: weight_map must be an object that names the file of each tensor. {remedy(path)}")
        weights: dict[str, Tensor] = {}
        for name in sorted({Path(name).name for name in parts.values()}):  # files beside the index, nothing elsewhere
            part = path.parent / name
            if not part.is_file():
                raise missing(part)
            if part.suffix == ".json":
                raise ValueError(f"{path}: weight_map must name files of tensors, got {name!r}.")
            weights.update(_read(part))
        return weights
    if path.suffix != ".safetensors":
        return as_weights(read_pickle(path), path)
    _refuse_pointer(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _incomplete(path, f" ({error})") from error


def as_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The content of a pickle as weights.

    Raises:
        ValueError: if it is not a mapping of names to plain tensors.
    """
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        for tensor in content.values()
    ):
        raise ValueError(f"{path} does not hold the weights of a network, a mapping of names to tensors.")
    return {str(name): tensor for name, tensor in content.items()}


def read_pickle(path: Path) -> Any:
    """The content of a file that ``torch.save`` wrote: tensors, numbers, strings, lists and dicts.

    Raises:
        ValueError: if the file holds anything else, or is damaged.
    """
    _refuse_pointer(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch's message suggests weights_only=False, which runs the code in a pickle: do not repeat it.
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|Unsupported class) (\w[\w.]*\w)", str(error))
        raise ValueError(
            f"{path} holds more than tensors{'' if asked is None else f' ({asked[1]})'}, or is damaged, and was not "
            "opened, since a pickle can run code."
        ) from error
    except Exception as error:  # a damaged file raises at any place: IndexError, struct.error, ...
        raise _incomplete(path) from error


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights. Run git lfs pull, or download the file.")


def _incomplete(path: Path, why: str = "") -> ValueError:
    size = path.stat().st_size
    return ValueError(f"{path} ({size} bytes) is not a complete {path.suffix[1:]} file{why}. {remedy(path)}")


# -- Backbones --------------------------------------------------------------------------------------------------------


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Gives a backbone its weights: every one of them, and no others, cast to its dtypes.

    Args:
        backbone: on any device; on the meta device its tensors are created on the CPU, including buffers that are not
            stored, which ``reset_buffers`` of their module computes.
        weights: by name.
        source: of the weights, as messages name it.

    Raises:
        ValueError: if a weight is missing, unknown, or of another shape or kind.
    """
    expected = backbone.state_dict()
    lacking, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if lacking:
        raise ValueError(f"{source} lacks {len(lacking)} tensor(s) that the network needs: {_first(lacking)}.")
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} tensor(s) that the network lacks: {_first(unknown)}.")
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the weights in {source} belong to a network of other sizes: {_first(wrong)}.")
    wrong = [
        f"{name} {weights[name].dtype} instead of {tensor.dtype}"
        for name, tensor in expected.items()
        if weights[name].is_floating_point() != tensor.is_floating_point()
    ]
    if wrong:
        raise ValueError(f"the weights in {source} are of another kind of number: {_first(wrong)}.")
    if not any(tensor.is_meta for tensor in expected.values()):
        backbone.load_state_dict(weights)
        return
    # Copies: tensors of a safetensors file are views of that file, and change with it.
    copies = {
        name: weights[name].to(tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in expected.items()
    }
    backbone.load_state_dict(copies, assign=True)
    for module in backbone.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset(torch.device("cpu"))


def _first(words: list[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
