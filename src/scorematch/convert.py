"""Checkpoints of other projects, converted into folders of this package.

    python -m scorematch convert checkpoint_300000.pth FOLDER --config cifar10.yml

Each format has one file in ``scorematch.pretrained``, which recognizes its checkpoints and reads them. Nothing in a
checkpoint is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from scorematch.pretrained import Stored, ncsn
from scorematch.pretrained.weights import read_pickle
from scorematch.score import ScoreNet


class _Format(Protocol):
    """What a file in ``scorematch.pretrained`` has for a format of checkpoints."""

    def recognizes(self, content: Any) -> bool: ...

    def read(self, content: Any, path: Path, config: Path | None = None, *, raw: bool = False) -> Stored: ...


_FORMATS: tuple[_Format, ...] = (ncsn,)


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    raw: bool = False,
) -> ScoreNet:
    """Converts a checkpoint of NCSN, NCSNv2 or adversarial consistent score matching.

    Args:
        checkpoint: the authors' file, ``checkpoint_<step>.pth``.
        folder: for ``ScoreNet.from_pretrained``, created if it does not exist.
        config: the config.yml that the network was trained with, for the noise levels, the image size and the sampler
            settings. Without it an NCSN of 10 levels has the published ones, and a checkpoint that does not hold its
            levels is refused.
        raw: whether to take the weights themselves where there is a moving average of them.

    Returns:
        The network, in eval mode.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: for a config without PyYAML.
        ValueError: for a file of another format, or options that are not supported.
    """
    path = Path(checkpoint)
    content = read_pickle(path)
    form = next((form for form in _FORMATS if form.recognizes(content)), None)
    if form is None:
        raise ValueError(
            f"{path} is not a checkpoint of NCSN or NCSNv2: expected a mapping that holds "
            "begin_conv.weight, or a list that begins with one."
        )
    net = ScoreNet._of(form.read(content, path, None if config is None else Path(config), raw=raw), None)
    net.save_pretrained(folder)
    return net
