"""Conversion of checkpoints of other projects into folders for ``ScoreNet.from_pretrained``.

    python -m scorematch convert checkpoint_24.pth FOLDER --config ve/cifar10_ncsnpp_continuous

Each format has one module in ``scorematch.pretrained``, which recognizes and reads its checkpoints, and lists the names
that their pickles may refer to. No code in a checkpoint is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from scorematch.core.messages import quote, reason
from scorematch.pretrained import Stored, edm, improved_diffusion, ncsn, score_sde
from scorematch.pretrained.pickles import Globals, StoredTensor, read_pickle
from scorematch.score import ScoreNet


class _Format(Protocol):
    """The interface of a module in ``scorematch.pretrained`` that reads a format of checkpoints."""

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


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    raw: bool = False,
) -> ScoreNet:
    """Converts a checkpoint of another project into a folder for ``ScoreNet.from_pretrained``.

    The projects are NCSN, NCSNv2, adversarial consistent score matching, score_sde, EDM, improved-diffusion and
    guided-diffusion. No code in the file is run. The result is a score in the units of this package, with the published
    noise levels and sampler settings.

    Args:
        checkpoint: the authors' file: ``checkpoint_<step>.pth`` (NCSN, NCSNv2, score_sde), ``.pkl`` (EDM), or ``.pt``
            (improved-diffusion, guided-diffusion).
        folder: the folder to write, for ``ScoreNet.from_pretrained``; created if it does not exist.
        config: the configuration that the network was trained with. For score_sde, improved-diffusion and
            guided-diffusion it is required: the name of a published one, such as "ve/cifar10_ncsnpp_continuous" or
            "cifar10_uncond_50M_500K", or a JSON, YAML or text file with the authors' options
            (``scorematch.pretrained.options``). For NCSN and NCSNv2 it is config.yml, which is required unless the
            checkpoint contains its noise levels or is an NCSN with 10 levels. A file of EDM contains its options.
        raw: whether to convert the weights of the last step instead of their moving average. For EDM,
            improved-diffusion and guided-diffusion True is an error.

    Returns:
        The network, in eval mode.

    Raises:
        IsADirectoryError: if ``checkpoint`` is a folder.
        FileNotFoundError: if a file is missing, or there is no published configuration with this name.
        ImportError: if ``config`` is a YAML file and PyYAML is not installed.
        ValueError: if the file is damaged, has an unknown format, refers to anything but tensors and plain values, or
            needs an option that is not supported; or if the configuration is missing or does not fit.
    """
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
        stored = form.read(found.content, path, config, raw=raw)
    except (LookupError, TypeError, RuntimeError, AttributeError) as error:  # of tensors with an unexpected shape
        raise ValueError(f"{path} does not hold a network of {_one_of(form)}: {reason(error)}.") from error
    del found  # the file is closed when its tensors have been copied
    net = ScoreNet.from_stored(stored)
    del stored
    net.save_pretrained(folder)
    return net


def _kind(content: Any) -> str:
    """What a file is whose content no format recognizes."""
    if not isinstance(content, dict):
        return _NAMES.get(type(content), "a pickle")
    other = next((what for key, what in _OTHERS.items() if key in content), None)
    return f"a mapping with the keys {quote(list(content))}" if other is None else other


def _one_of(*forms: _Format) -> str:
    """The projects of formats, as a message lists them."""
    *names, last = (name for form in forms for name in form.NAMES)
    return f"{', '.join(names)} or {last}" if names else last
