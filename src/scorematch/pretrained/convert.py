"""Reading checkpoints of other projects.

Each format has one module, which recognizes and reads its checkpoints, and lists the names that their pickles may refer
to. No code in a checkpoint is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from scorematch.core.messages import quote, reason
from scorematch.pretrained import edm, improved_diffusion, ncsn, score_sde
from scorematch.pretrained.configuration import Stored
from scorematch.pretrained.interpreter import Globals
from scorematch.pretrained.pickles import StoredTensor, read_pickle


class _Format(Protocol):
    """The interface of a module that reads a format of checkpoints."""

    NAMES: tuple[str, ...]  # of the projects
    GLOBALS: Globals

    def recognizes(self, content: Any) -> bool: ...

    def read(
        self, content: Any, path: Path, config: str | os.PathLike[str] | None = None, *, raw: bool = False
    ) -> Stored: ...


_FORMATS: tuple[_Format, ...] = (ncsn, score_sde, edm, improved_diffusion)
_GLOBALS: Globals = {name: made for form in _FORMATS for name, made in form.GLOBALS.items()}
# What a file is, by a key that it contains or by its type.
_OTHERS = {
    "conv_norm_out.weight": "the weights of a U-Net of diffusers (load their folder with ScoreNet.from_pretrained)",
    "pytorch-lightning_version": "a PyTorch Lightning checkpoint",
    "G_ema": "a StyleGAN pickle",
}
_NAMES = {
    list: "a list",
    tuple: "a tuple",
    int: "a number",
    float: "a number",
    str: "a string",
    StoredTensor: "a tensor",
}


def read_checkpoint(
    checkpoint: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, raw: bool = False
) -> Stored:
    """Reads the network of a checkpoint, with the arguments and errors of ``ScoreNet.from_checkpoint``."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder, and a checkpoint is one file. Folders of this package and of diffusers need no "
            "conversion: pass them to ScoreNet.from_pretrained and to the other commands."
        )
    found = read_pickle(path, _GLOBALS)
    form = next((form for form in _FORMATS if form.recognizes(found.content)), None)
    if form is None:
        raise ValueError(f"{path} is {_kind(found.content)}, not a checkpoint of {_one_of(*_FORMATS)}.")
    foreign = found.globals - form.GLOBALS.keys()
    if foreign:
        raise ValueError(
            f"{path} refers to {min(foreign)!r}, which a checkpoint of {_one_of(form)} does not need; it was not "
            "loaded, because a pickle can run code."
        )
    try:
        return form.read(found.content, path, config, raw=raw)
    except (LookupError, TypeError, RuntimeError, AttributeError) as error:  # of tensors with an unexpected shape
        raise ValueError(f"{path} does not hold a network of {_one_of(form)}: {reason(error)}.") from error


def _kind(content: Any) -> str:
    """What a file is whose content no format recognizes."""
    if isinstance(content, list | tuple) and content and isinstance(content[0], dict):
        # As in checkpoints of NCSN, which are lists of the weights and of other things.
        return f"{_NAMES[type(content)]} whose first item has the keys {quote(list(content[0]))}"
    if not isinstance(content, dict):
        return _NAMES.get(type(content), "a pickle")
    other = next((what for key, what in _OTHERS.items() if key in content), None)
    return f"a mapping with the keys {quote(list(content))}" if other is None else other


def _one_of(*forms: _Format) -> str:
    """The projects of formats, as a message lists them."""
    *names, last = (name for form in forms for name in form.NAMES)
    return f"{', '.join(names)} or {last}" if names else last
