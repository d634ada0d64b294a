"""Checkpoints of ermongroup/ncsn, ermongroup/ncsnv2 and AlexiaJM/AdversarialConsistentScoreMatching.

A checkpoint of NCSN is a list [weights, optimizer]. In a checkpoint of NCSNv2 or of adversarial consistent score
matching the list continues with the epoch, the step and, if there is one, an exponential moving average of the weights,
with which the published samples were drawn. The weights determine the family (only the norms of NCSN have a table of
noise levels), the depth, the width and the channels. The noise levels are a buffer among the weights of NCSNv2; for
other checkpoints they are in config.yml.

Two options of adversarial consistent score matching, ``--target dae`` and ``--std``, are not recorded in its files.
Networks that were trained with them are not scores, but cannot be distinguished from scores. Networks trained with
``--no_dilation``, and the U-Net of this project, are rejected because their weights have other names.

References:
    Song & Ermon, 2019, arXiv:1907.05600; Song & Ermon, 2020, arXiv:2006.09011;
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling, arXiv:2009.05475.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scorematch.core.messages import about
from scorematch.core.schema import Field
from scorematch.noise import NoiseSchedule
from scorematch.pretrained.configuration import Stored, translated
from scorematch.pretrained.interpreter import Globals
from scorematch.pretrained.options import checked_options, read_options
from scorematch.pretrained.pickles import TENSORS, load_tensors
from scorematch.sampling.settings import SamplerSettings

NAMES: tuple[str, ...] = ("NCSN", "NCSNv2", "adversarial consistent score matching")
GLOBALS: Globals = TENSORS

# The options that the authors' program of NCSN contains: steps at each level, and the step size.
_STEPS, _STEP_SIZE = 100, 2e-5
# Those of the published networks of NCSNv2, by the highest noise level and the number of levels.
_PUBLISHED: Mapping[tuple[float, int], tuple[int, float]] = {
    (50, 232): (5, 6.2e-6),
    (90, 500): (5, 3.3e-6),
    (140, 788): (4, 4.9e-6),
    (190, 1086): (3, 1.8e-6),
    (348, 2311): (3, 9e-7),
}
_FIRST, _TABLE = "begin_conv.weight", "normalizer.embed.weight"
_SIGMA = Field(float, low=0, high=1e30)
_COUNT = Field(int, low=1, high=1_000_000)
_FLAG = Field(bool)
# The options of config.yml that are read, by section; other options are ignored.
_OPTIONS: Mapping[str, Mapping[str, Field]] = {
    "model": {
        "sigma_begin": _SIGMA,
        "sigma_end": _SIGMA,
        "num_classes": _COUNT,
        "sigma_dist": Field(str, choices=("geometric", "uniform", "linear")),
        "normalization": Field(str, choices=("InstanceNorm++",)),
        "nonlinearity": Field(str, choices=("elu",)),
    },
    "data": {"image_size": _COUNT, "rescaled": _FLAG, "logit_transform": _FLAG},
    "sampling": {
        "n_steps_each": _COUNT,
        "nsigma": _COUNT,
        "step_lr": Field(float, low=0, high=1e30),
        "consistent": _FLAG,
        "denoise": _FLAG,
    },
}


def recognizes(content: Any) -> bool:
    """Whether the content of a checkpoint has this format."""
    return any(_name(key) == _FIRST for key in _parts(content)[0])


def read(content: Any, path: Path, config: str | os.PathLike[str] | None = None, *, raw: bool = False) -> Stored:
    """Reads the network of a checkpoint, for ``read_checkpoint``.

    Args:
        content: the content of the checkpoint.
        path: the path of the checkpoint, for error messages.
        config: the path of its config.yml. If None, an NCSN with 10 noise levels gets the published ones, 1 to 0.01.
        raw: whether to read the weights of the last step even if there is a moving average of the weights.
    """
    config_path = None if config is None else Path(config).expanduser()
    options = _read_options(config_path)
    weights = _weights(content, path, raw=raw)
    width, channels = weights[_FIRST].shape[:2]
    depth = "standard"
    if "res5.0.conv1.weight" in weights:
        depth = "deepest" if "res31.0.conv1.weight" in weights else "deeper"
    conditional = _TABLE in weights
    levels = weights[_TABLE].shape[0] if conditional else None
    schedule = _schedule(weights.pop("sigmas", None), levels, options["model"], path, config_path)
    rescaled = bool(options["data"].get("rescaled"))
    if rescaled:
        # The network was trained on images in [-1, 1], where noise levels are twice as large and scores half as large.
        schedule = NoiseSchedule(schedule.sigmas / 2)
        if conditional:
            weights |= {name: 2 * weights[name] for name in ("end_conv.weight", "end_conv.bias") if name in weights}
    size = options["data"].get("image_size")
    settings = _settings(options["sampling"], schedule, conditional=conditional, rescaled=rescaled)
    family = "ncsn" if conditional else "ncsnv2"
    stored = {
        "family": family,
        "channels": channels,
        "width": width,
        "depth": depth,
        "precondition": family,
        "sample_shape": None if size is None else [channels, size, size],
    }
    return Stored(translated(stored, schedule, settings, path), weights, path)


# -- Weights ----------------------------------------------------------------------------------------------------------


def _parts(content: Any) -> tuple[Mapping[Any, Any], Mapping[Any, Any] | None]:
    """The weights of a checkpoint, and their moving average or None."""
    average = None
    if isinstance(content, list | tuple) and content:
        average = content[-1] if len(content) >= 5 and isinstance(content[-1], Mapping) else None
        content = content[0]
    return content if isinstance(content, Mapping) else {}, average


def _weights(content: Any, path: Path, *, raw: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the network."""
    last, average = _parts(content)
    weights = {_name(name): tensor for name, tensor in last.items()}
    if average is not None and not raw:
        weights.update({_name(name): tensor for name, tensor in average.items()})
    loaded = load_tensors(weights, path)
    if loaded[_FIRST].ndim != 4 or (_TABLE in loaded and loaded[_TABLE].ndim != 2):
        raise ValueError(f"{path} does not hold the weights of a network, a mapping of names to tensors.")
    return loaded


def _name(name: Any) -> str:
    """The name of a tensor without the prefix "module." of wrappers such as DataParallel."""
    return re.sub(r"^(module\.)+", "", str(name))


# -- Noise levels and settings ----------------------------------------------------------------------------------------


def _schedule(
    stored: Tensor | None, levels: int | None, model: Mapping[str, Any], path: Path, config: Path | None
) -> NoiseSchedule:
    """The noise levels: those of the buffer, or else those of the configuration, or else the published ones of NCSN."""
    begin, end, count = model.get("sigma_begin"), model.get("sigma_end"), model.get("num_classes", levels)
    configured = None
    if begin is not None and end is not None and count is not None:
        with about(f"{config}: sigma_begin, sigma_end and num_classes do not define valid noise levels"):
            if model.get("sigma_dist", "geometric") == "geometric":
                configured = NoiseSchedule.geometric(begin, end, count)
            else:
                configured = NoiseSchedule(np.linspace(begin, end, count))
    if stored is not None:
        with about(f"{path}: the weight sigmas does not hold valid noise levels"):
            schedule = NoiseSchedule(stored)
        if configured is not None and not (
            len(configured) == len(schedule) and np.allclose(configured.sigmas, schedule.sigmas, rtol=1e-4)
        ):
            warnings.warn(
                f"{path} holds the noise levels {schedule}, but {config} has {configured}; the levels in the "
                "checkpoint are used.",
                stacklevel=5,
            )
        return schedule
    if configured is not None:
        if levels is not None and levels != len(configured):
            raise ValueError(
                f"the weights in {path} have {levels} noise levels, but {config} has {len(configured)}. Pass the "
                "config.yml that the network was trained with."
            )
        return configured
    if levels == 10:
        return NoiseSchedule.geometric(1, 0.01, 10)
    raise ValueError(f"{path} does not hold its noise levels. Pass the config.yml that the network was trained with.")


def _settings(
    sampling: Mapping[str, Any], schedule: NoiseSchedule, *, conditional: bool, rescaled: bool
) -> SamplerSettings | None:
    """The settings of the sampler in the configuration, or else the published ones; None if there are none.

    The authors' program of NCSN does not denoise the result; the configurations of NCSNv2 do.
    """
    unit = 2 if rescaled else 1  # the authors' unit of x in ours
    steps, step_size = sampling.get("n_steps_each", sampling.get("nsigma")), sampling.get("step_lr")
    if steps is None or step_size is None:
        known = (round(unit * schedule.sigma_max, 3), len(schedule))
        published = (_STEPS, _STEP_SIZE) if conditional else _PUBLISHED.get(known)
        if published is None:
            return None
        steps, step_size = published
    if not 0 < step_size < 2 * (unit * schedule.sigma_min) ** 2:
        return None
    size = step_size / unit**2
    denoise = sampling.get("denoise", not conditional)
    final: dict[str, Any] = {} if denoise else {"denoise": False}
    if sampling.get("consistent"):  # steps times as many levels, with one step each
        return SamplerSettings(levels=(len(schedule) - 1) * steps + 1, step_size=size, consistent=True, **final)
    return SamplerSettings(levels=len(schedule), steps_per_level=steps, step_size=size, exact_noise=False, **final)


# -- config.yml -------------------------------------------------------------------------------------------------------


def _read_options(path: Path | None) -> dict[str, dict[str, Any]]:
    """The options that a config.yml sets, by section; the sections are empty if there is no file."""
    if path is None:
        return {section: {} for section in _OPTIONS}
    tree = read_options(path)
    if not isinstance(tree.get("model"), dict):
        raise ValueError(f"{path} is not a configuration of NCSN: it has no section model.")
    data = tree.get("data")
    if isinstance(data, dict) and data.get("logit_transform") is True:
        raise ValueError(
            f"{path}: logit_transform is not supported. The network was trained on logits of the pixels, and its "
            "noise levels do not map to pixel units."
        )
    return {
        section: checked_options(tree.get(section), fields, f"{path}, section {section}")
        for section, fields in _OPTIONS.items()
    }
