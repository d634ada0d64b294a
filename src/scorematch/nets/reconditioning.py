r"""The weights of a network that is trained further with other classes, a vector, or no condition.

A U-Net adds the embedding of its condition to that of the noise level, e + c, where c is a sum if it has a class and a
vector. A class that both networks have keeps its row of the table of embeddings, and a vector of the same length its
embedding, so that the network has the same output for it. Every other condition begins with the embedding of no
condition: that of the null class or of a missing vector, the mean over the classes of a network without a null class,
and zero for a network without a condition. A network without a condition has no c: for an embedding
:math:`W_2\, a(W_1 e + b_1) + b_2` of the level, c becomes part of :math:`b_2`, or, where it is added to e, of
:math:`b_1`, so that the output is that without a condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEYS = ("num_class_embeds", "null_class", "condition_features")
_CLASS, _VECTOR = "class_embedding.", "vector_embedding."


def kept_classes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[int | None]:
    """For each class of a network the same class of an earlier one; None for a new class.

    Classes are the same if they have the same name, or the same number if one of the networks has no names.

    Args:
        before: the configuration of the earlier network.
        now: that of the network.
    """
    old, new = (config.get("num_class_embeds") or 0 for config in (before, now))
    if before.get("class_names") and now.get("class_names"):
        known = {name: k for k, name in enumerate(before["class_names"])}
        return [known.get(name) for name in now["class_names"]]
    return [k if k < old else None for k in range(new)]


def is_reconditioned(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a network has another condition than an earlier one, or its classes in another order."""
    if before.get("class_embed_type") is not None:
        return False
    rows = kept_classes(before, now)
    return rows != list(range(len(rows))) or any((before.get(key) or 0) != (now.get(key) or 0) for key in _KEYS)


def _vector_of(config: Mapping[str, Any]) -> str:
    """The prefix of the weights of the embedding of a vector, which is ``class_embedding`` without classes."""
    return _CLASS if config.get("num_class_embeds") is None else _VECTOR


def reconditioned_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an earlier network with the condition of a network."""
    others = {key: value for key, value in before.items() if key not in (*_KEYS, "class_names")}
    return others | {key: now[key] for key in (*_KEYS, "class_names") if key in now}


def reconditioned(
    weights: Mapping[str, Tensor],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    own: Mapping[str, Tensor],
    *,
    added_first: bool,
) -> dict[str, Tensor]:
    """The weights of an earlier network with the condition of a network.

    Args:
        weights: the weights of the earlier network.
        before: its configuration.
        now: the configuration of the network.
        own: the weights of the network, for the embedding of a vector; not used for classes.
        added_first: whether c is added before the linear layers of the embedding of the level.
    """
    kept = {name: weight for name, weight in weights.items() if not name.startswith((_CLASS, _VECTOR))}
    level = f"time_embedding.linear_{1 if added_first else 2}"
    matrix, table = kept[f"{level}.weight"], weights.get(f"{_CLASS}weight")
    zero = matrix.new_zeros(matrix.shape[1 if added_first else 0])
    no_class = zero if table is None else table[-1] if before.get("null_class") else table.mean(0)
    no_vector = weights.get(f"{_vector_of(before)}null", zero)
    features, classes = now.get("condition_features") or 0, now.get("num_class_embeds")
    same = features == (before.get("condition_features") or 0)
    if classes is not None:
        lost = zero if same else no_vector
        rows = [no_class if row is None or table is None else table[row] for row in kept_classes(before, now)]
        kept[f"{_CLASS}weight"] = torch.stack([*rows, *([no_class] if now.get("null_class") else [])]) + lost
    if features:
        old, new = _vector_of(before), _vector_of(now)
        source, prefix = (weights, old) if same else (own, new)
        own_names = [name for name in source if name.startswith(prefix)]
        kept |= {new + name.removeprefix(prefix): source[name].clone() for name in own_names}
        if not same:
            kept[f"{new}embedding.linear_2.weight"].zero_()
            kept[f"{new}embedding.linear_2.bias"] = kept[f"{new}null"] = zero if classes is not None else no_vector
        start = zero if classes is not None else no_class
        for name in ("embedding.linear_2.bias", "null"):
            kept[new + name] = kept[new + name] + start
    elif classes is None:
        none = no_class + no_vector
        kept[f"{level}.bias"] = kept[f"{level}.bias"] + (matrix @ none if added_first else none)
    return kept


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What a network keeps of the condition of an earlier one, in one line; None if it has the same condition."""
    if not is_reconditioned(before, now):
        return None
    rows, old = kept_classes(before, now), before.get("num_class_embeds") or 0
    new = rows.count(None)
    kept = len(rows) - new
    parts = [f"{kept or 'none'} of its {old} classes {'is' if kept == 1 else 'are'} kept" if old else ""]
    parts += [f"{new} {'class is' if new == 1 else 'classes are'} new" if new else ""]
    vectors = [config.get("condition_features") or 0 for config in (before, now)]
    parts += ["the vector of its condition is new" if vectors[1] and vectors[0] != vectors[1] else ""]
    return ", ".join(filter(None, parts)) or "its condition is left out"
