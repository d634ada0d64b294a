"""Our names for the weights of U-Nets of other projects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from scorematch.core.messages import about, quote

# Our names of the blocks that have parts: attention, and residual blocks, of which some resample.
_BLOCK = r"\.(attentions|resnets)\.\d+$|samplers\.0$|\.resnet_(?:down|up)$"


def module_names(
    places: Iterable[tuple[str, str]],
    residual: Mapping[str, str],
    attention: Mapping[str, str],
    others: Mapping[str, str] = MappingProxyType({"": ""}),
) -> dict[str, str]:
    """Our name of each module by the authors' name.

    Args:
        places: the authors' name and our name of each block, and of each module outside of blocks.
        residual: our names of the parts of a residual block, by the authors' names.
        attention: the same for a block of attention. A layer of queries, keys and values together is ``to_qkv``.
        others: the same for modules outside of blocks.
    """
    names: dict[str, str] = {}
    for theirs, ours in places:
        block = re.search(_BLOCK, ours)
        parts = others if block is None else attention if block[1] == "attentions" else residual
        names |= {".".join(filter(None, (theirs, part))): ".".join(filter(None, (ours, parts[part]))) for part in parts}
    return names


def renamed(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, str],
    path: Path,
    split: Callable[[Tensor, str], Iterable[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by our names: matrices in attention, and convolutions elsewhere.

    Args:
        tensors: the tensors by the authors' names.
        modules: our name of each module by the authors' name.
        path: the path of the checkpoint, for error messages.
        split: takes a tensor of a layer ``to_qkv`` and our name of the layer, and returns the queries, keys and values.

    Raises:
        ValueError: if a tensor belongs to another module.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            raise ValueError(
                f"{path} holds the tensor {quote(name)}, which a network with these options does not have: it was "
                "trained with other options, or is another network."
            )
        ours = modules[module]
        if ".attentions." in ours and tensor.ndim > 2:
            tensor = tensor.flatten(1)
        elif ours.endswith(".conv_shortcut") and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        if split is not None and ours.endswith(".to_qkv"):
            with about(f"{path}: {name}"):
                parts = split(tensor, ours)
            found |= {f"{ours[:-3]}{key}.{leaf}": part for key, part in zip("qkv", parts, strict=True)}
        else:
            found[f"{ours}.{leaf}"] = tensor
    return found
