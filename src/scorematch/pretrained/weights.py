"""Reading weights from files, and loading them into a backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scorematch.core.messages import few, plain, quote, reason
from scorematch.pretrained.configuration import missing, read_json, remedy
from scorematch.pretrained.pickles import load_tensors, read_pickle

WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# Weights in float16, which diffusers loads with variant="fp16".
HALF_WEIGHTS_FILES = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin")
# The files of diffusers that hold weights, in order of preference. An index lists the parts of weights that are split.
DIFFUSERS_WEIGHTS_FILES = (
    DIFFUSERS_WEIGHTS_FILE,
    f"{DIFFUSERS_WEIGHTS_FILE}.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    *HALF_WEIGHTS_FILES,
)


# -- Files ------------------------------------------------------------------------------------------------------------


def read_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a folder, from the first of the named files that exists.

    Raises:
        FileNotFoundError: if none of the files exists, or a part that an index lists is missing.
        ValueError: if a file is damaged, or does not hold weights.
    """
    names = tuple(names)
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise missing(folder / names[0])
    return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".index.json"):
        parts = read_json(path).get("weight_map")
        wrong = [name for name in parts.values() if not _is_name(name)] if isinstance(parts, dict) else [parts]
        if not isinstance(parts, dict) or wrong:
            raise ValueError(
                f"{path}: weight_map must be an object that names the file of each tensor, got {quote(wrong[0])}. "
                f"{remedy(path)}"
            )
        weights: dict[str, Tensor] = {}
        for name in sorted({Path(name).name for name in parts.values()}):  # only files in the folder of the index
            part = path.parent / name
            if not part.is_file():
                raise missing(part)
            if part.suffix == ".json":
                raise ValueError(f"{path}: weight_map must name files of tensors, got {quote(name)}.")
            weights.update(_read(part))
        return weights
    if path.suffix != ".safetensors":
        return load_tensors(read_pickle(path).content, path)
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights. Run git lfs pull, or download the file.")
    try:
        with torch.device("cpu"):  # safetensors 0.4 uses torch's default device
            return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is not a complete safetensors file ({reason(error)}). {remedy(path)}"
        ) from error


def _is_name(name: Any) -> bool:
    """Whether a value is the path of a file that can exist."""
    return isinstance(name, str) and name.isprintable() and 0 < len(Path(name).name) <= 200


# -- Backbones --------------------------------------------------------------------------------------------------------


def fill(backbone: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Loads weights into a backbone, cast to the dtypes of the backbone. The names must match exactly.

    Args:
        backbone: a backbone on any device. If it is on the meta device, its tensors are created on the CPU, and the
            ``reset_buffers`` method of each module that has one computes the buffers that are not stored.
        weights: the tensors by name.
        source: the folder or file that the weights come from, for error messages.

    Raises:
        ValueError: if a weight is missing or unknown, has another shape, or is an integer tensor in place of a
            floating-point tensor or the reverse; or if a weight of a backbone on the meta device is not finite.
    """
    expected = backbone.state_dict()
    lacking, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if lacking:
        raise ValueError(f"{source} lacks {len(lacking)} tensor(s) that the network needs: {few(map(plain, lacking))}.")
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} tensor(s) that the network lacks: {few(map(plain, unknown))}.")
    wrong = [
        f"{plain(name)} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the weights in {source} belong to a network of other sizes: {few(wrong)}.")
    wrong = [
        f"{plain(name)} {weights[name].dtype} instead of {tensor.dtype}"
        for name, tensor in expected.items()
        if weights[name].is_floating_point() != tensor.is_floating_point()
    ]
    if wrong:
        raise ValueError(f"the weights in {source} have the wrong dtype: {few(wrong)}.")
    if not any(tensor.is_meta for tensor in expected.values()):
        backbone.load_state_dict(weights)
        return
    # Copies, because tensors of a safetensors file are views of the file, and change if the file changes.
    copies = {
        name: weights[name].to(tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in expected.items()
    }
    # The sum is not finite if a value is not; it takes a tenth of the time.
    wrong = [plain(name) for name, tensor in copies.items() if not (tensor.sum().isfinite() or tensor.isfinite().all())]
    if wrong:
        raise ValueError(f"the weights in {source} hold NaN or infinity: {few(wrong)}.")
    backbone.load_state_dict(copies, assign=True)
    for module in backbone.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset(torch.device("cpu"))
