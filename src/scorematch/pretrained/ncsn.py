"""Checkpoints of ermongroup/ncsn, ermongroup/ncsnv2 and AlexiaJM/AdversarialConsistentScoreMatching.

A checkpoint of NCSN is a list [weights, optimizer]. One of NCSNv2 or of adversarial consistent score matching continues
with the epoch, the step and, where there is one, an exponential moving average of the weights, from which the published
samples are drawn. The weights determine the family (only the norms of NCSN have a table of noise levels), the depth,
the width and the channels. The noise levels are a buffer among the weights of NCSNv2; for other checkpoints they are in
config.yml.

Two options of adversarial consistent score matching leave no trace in its files, ``--target dae`` and ``--std``: the
networks trained with them are not scores, and cannot be told from those that are. Networks of ``--no_dilation`` and its
U-Net are refused, since their weights have other names.

References:
    Song & Ermon, 2019, arXiv:1907.05600; Song & Ermon, 2020, arXiv:2006.09011;
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling, arXiv:2009.05475.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scorematch.noise import NoiseSchedule
from scorematch.pretrained.configuration import FORMAT_VERSION, Stored, checked
from scorematch.pretrained.weights import as_weights
from scorematch.sampling.settings import SamplerSettings
from scorematch.schema import Field, check

_FIRST, _TABLE = "begin_conv.weight", "normalizer.embed.weight"
_SIGMA = Field(float, low=0, high=1e30)
_COUNT = Field(int, low=1, high=1_000_000)
_FLAG = Field(bool)
# The options of config.yml that are read, by section; others change nothing here.
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
    },
}


def recognizes(content: Any) -> bool:
    """Whether the content of a checkpoint is of this format."""
    return any(_name(key) == _FIRST for key in _parts(content)[0])


def read(content: Any, path: Path, config: Path | None = None, *, raw: bool = False) -> Stored:
    """The network of a checkpoint.

    Args:
        content: of the checkpoint.
        path: of the checkpoint, for messages.
        config: the config.yml beside it. Without it an NCSN of 10 levels has the published ones.
        raw: whether to take the weights themselves where there is a moving average of them.

    Raises:
        FileNotFoundError: if there is no such config.yml.
        ImportError: for a config.yml without PyYAML.
        ValueError: for weights or options that are not supported.
    """
    options = _read_options(config)
    weights = _weights(content, path, raw=raw)
    width, channels = weights[_FIRST].shape[:2]
    depth = "standard"
    if "res5.0.conv1.weight" in weights:
        depth = "deepest" if "res31.0.conv1.weight" in weights else "deeper"
    conditional = _TABLE in weights
    levels = weights[_TABLE].shape[0] if conditional else None
    schedule = _schedule(weights.pop("sigmas", None), levels, options["model"], path, config)
    rescaled = bool(options["data"].get("rescaled"))
    if rescaled:
        # Trained on images in [-1, 1]: noise of twice the level, and a score of half the size.
        schedule = NoiseSchedule(schedule.sigmas / 2)
        if conditional:
            weights |= {name: 2 * weights[name] for name in ("end_conv.weight", "end_conv.bias") if name in weights}
    size = options["data"].get("image_size")
    settings = _settings(options["sampling"], schedule, rescaled=rescaled)
    family = "ncsn" if conditional else "ncsnv2"
    stored = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "channels": channels,
        "width": width,
        "depth": depth,
        "precondition": family,
        "sample_shape": None if size is None else [channels, size, size],
        "value_range": [0.0, 1.0],
        "predicts_variance": False,
        "sampler_settings": None if settings is None else settings.to_dict(),
        "schedule": schedule.to_dict(),
    }
    return Stored(checked(stored, path), weights, path)


# -- Weights ----------------------------------------------------------------------------------------------------------


def _parts(content: Any) -> tuple[Mapping[Any, Any], Mapping[Any, Any] | None]:
    """The weights of a checkpoint, and their moving average, if there is one."""
    average = None
    if isinstance(content, list | tuple) and content:
        average = content[-1] if len(content) >= 5 and isinstance(content[-1], Mapping) else None
        content = content[0]
    return content if isinstance(content, Mapping) else {}, average


def _weights(content: Any, path: Path, *, raw: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under their names in the network."""
    last, average = _parts(content)
    weights = {_name(name): tensor for name, tensor in last.items()}
    if average is not None and not raw:
        weights.update({_name(name): tensor for name, tensor in average.items()})
    weights = as_weights(weights, path)
    if weights[_FIRST].ndim != 4 or (_TABLE in weights and weights[_TABLE].ndim != 2):
        raise ValueError(f"{path} does not hold the weights of a network, a mapping of names to tensors.")
    return weights


def _name(name: Any) -> str:
    """The name of a tensor in the network, without those of the wrappers that it was trained in."""
    return re.sub(r"^(module\.)+", "", str(name))


# -- Noise levels and settings ----------------------------------------------------------------------------------------


def _schedule(
    stored: Tensor | None, levels: int | None, model: Mapping[str, Any], path: Path, config: Path | None
) -> NoiseSchedule:
    """The noise levels: those of the buffer, or else of the configuration, or else the published ones of NCSN."""
    begin, end, count = model.get("sigma_begin"), model.get("sigma_end"), model.get("num_classes", levels)
    configured = None
    if begin is not None and end is not None and count is not None:
        try:
            if model.get("sigma_dist", "geometric") == "geometric":
                configured = NoiseSchedule.geometric(begin, end, count)
            else:
                configured = NoiseSchedule(np.linspace(begin, end, count))
        except ValueError as error:
            raise ValueError(
                f"{config}: sigma_begin, sigma_end and num_classes give no noise levels: {error}"
            ) from error
    if stored is not None:
        try:
            schedule = NoiseSchedule(stored)
        except ValueError as error:
            raise ValueError(f"{path}: the weight sigmas holds no noise levels: {error}") from error
        if configured is not None and not (
            len(configured) == len(schedule) and np.allclose(configured.sigmas, schedule.sigmas, rtol=1e-4)
        ):
            warnings.warn(
                f"{path} holds the noise levels {schedule}, and {config} has {configured}; those of the checkpoint are "
                "used.",
                stacklevel=4,
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


def _settings(sampling: Mapping[str, Any], schedule: NoiseSchedule, *, rescaled: bool) -> SamplerSettings | None:
    """The published settings of the sampler, if the configuration has them."""
    steps, step_size = sampling.get("n_steps_each", sampling.get("nsigma")), sampling.get("step_lr")
    if steps is None or step_size is None:
        return None
    size = step_size / (4 if rescaled else 1)  # in units of x: half the sigma is a quarter of the step
    if sampling.get("consistent"):  # one step at each level of a schedule with so many times as many levels
        return SamplerSettings(levels=(len(schedule) - 1) * steps + 1, step_size=size, consistent=True)
    return SamplerSettings(levels=len(schedule), steps_per_level=steps, step_size=size, exact_noise=False)


# -- config.yml -------------------------------------------------------------------------------------------------------


def _read_options(path: Path | None) -> dict[str, dict[str, Any]]:
    """The options of a config.yml that are set, by section; empty sections without a file."""
    if path is None:
        return {section: {} for section in _OPTIONS}
    tree = _read_yaml(path)
    options = {}
    for section, fields in _OPTIONS.items():
        given = tree.get(section)
        values = {
            key: _number(value, fields[key])
            for key, value in (given if isinstance(given, Mapping) else {}).items()
            if key in fields and value is not None
        }
        if section == "data" and values.get("logit_transform") is True:
            raise ValueError(
                f"{path}: logit_transform is not supported. The network was trained on logits of the pixels, and its "
                "noise levels do not map to pixel units."
            )
        check(values, fields, f"{path}, section {section}")
        options[section] = values
    return options


def _number(value: Any, field: Field) -> Any:
    """A number that YAML 1.1 reads as a string, such as 5e-6, as a number."""
    if field.kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('reading config.yml needs PyYAML: pip install "scorematch[convert]".') from error

    class Loader(yaml.SafeLoader):
        """A safe loader that reads the one Python tag of the authors' files, a namespace, as a mapping."""

    def namespace(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", namespace)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a configuration that can be read safely: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} is not a configuration of NCSN: it has no section model.")
    return content
