r"""Checkpoints of yang-song/score_sde_pytorch: NCSN++, DDPM++ and DDPM, trained with one of three SDEs.

A checkpoint is a dict of the optimizer, the weights (``model``), their moving average (``ema``) and the step. The
average is a list in the order of the trained weights, which are all weights except the noise levels and the frequencies
of Fourier features. The samples of the paper are drawn with the average.

The file does not contain the configuration, without which the output of the network cannot be interpreted. The table
lists the noise levels, and the row of the table in ``scorematch.nets.precondition`` that interprets the output. With
:math:`q = \tfrac12 (\beta_{max} - \beta_{min}) t^2 + \beta_{min} t` the noise levels, in units of images in [0, 1], are

========================  ==================================================  =============
equation                  noise levels                                        row
========================  ==================================================  =============
VE (``vesde``)            geometric from sigma_max to sigma_min               ncsnpp
VE, discrete              the same                                            ncsnpp_index
VP (``vpsde``)            :math:`\tfrac12 \sqrt{e^q - 1}`                     vp
VP, discrete              those of a DDPM with betas from beta_min / N        ddpm
                          to beta_max / N
sub-VP (``subvpsde``)     :math:`\sinh(q / 2)`                                subvp
========================  ==================================================  =============

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456;
    https://github.com/yang-song/score_sde_pytorch (Apache-2.0), whose configurations are those of ``CONFIGURATIONS``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.messages import about
from scorematch.core.schema import Field
from scorematch.nets.unet_blocks import block_types
from scorematch.noise import NoiseSchedule
from scorematch.pretrained.cards import configurations
from scorematch.pretrained.configuration import Stored, translated
from scorematch.pretrained.interpreter import Globals
from scorematch.pretrained.options import checked_options, named_options
from scorematch.pretrained.pickles import NUMBERS, TENSORS, StoredTensor, load_tensors
from scorematch.pretrained.renaming import module_names, renamed
from scorematch.sampling.settings import SamplerSettings

NAMES: tuple[str, ...] = ("score_sde",)
GLOBALS: Globals = {**TENSORS, **NUMBERS}

_FLAG = Field(bool, required=True)
_COUNT = Field(int, required=True, low=1, high=65_536)
_POSITIVE = Field(float, required=True, low=0, high=1e30)
_INTEGERS = Field(list, required=True, low=1, high=16, each=Field(int, low=1, high=65_536))
_SECTIONS: Mapping[str, Mapping[str, Field]] = {
    "training": {"sde": Field(str, required=True, choices=("vesde", "vpsde", "subvpsde")), "continuous": _FLAG},
    "data": {"image_size": _COUNT, "num_channels": _COUNT, "centered": _FLAG},
    "model": {
        "name": Field(str, required=True, choices=("ncsnpp", "ddpm")),
        "nf": _COUNT,
        "ch_mult": _INTEGERS,
        "num_res_blocks": _COUNT,
        "attn_resolutions": Field(list, required=True, high=16, each=Field(int, low=1)),
        "scale_by_sigma": _FLAG,
        "num_scales": Field(int, required=True, low=2, high=1_000_000),
        "dropout": Field(float, low=0, high=1),
        # No published network uses other values.
        "conditional": Field(bool, choices=(True,)),
        "nonlinearity": Field(str, choices=("swish",)),
        "resamp_with_conv": Field(bool, choices=(True,)),
    },
    "sampling": {
        "predictor": Field(str),
        "corrector": Field(str),
        "n_steps_each": Field(int, low=1, high=1_000_000),
        "snr": Field(float, low=0, high=1),
    },
}
_BETAS = {"beta_min": _POSITIVE, "beta_max": _POSITIVE}
_SDE: Mapping[str, Mapping[str, Field]] = {
    "vesde": {"sigma_min": _POSITIVE, "sigma_max": _POSITIVE},
    "vpsde": _BETAS,
    "subvpsde": _BETAS,
}
_NCSNPP: Mapping[str, Field] = {
    "fir": _FLAG,
    "fir_kernel": Field(list, choices=([1, 3, 3, 1],)),
    "skip_rescale": _FLAG,
    "embedding_type": Field(str, required=True, choices=("fourier", "positional")),
    "progressive": Field(str, required=True, choices=("none", "output_skip", "residual")),
    "progressive_input": Field(str, required=True, choices=("none", "input_skip", "residual")),
    "progressive_combine": Field(str, choices=("sum",)),
    "resblock_type": Field(str, choices=("biggan",)),
}
_PYRAMIDS = {"none": "none", "output_skip": "skip", "input_skip": "skip", "residual": "residual"}
_PREDICTORS = {
    "ancestral_sampling": "ancestral",
    "reverse_diffusion": "reverse-diffusion",
    "euler_maruyama": "reverse-diffusion",
}
# By the path in the authors' folder of checkpoints, and by that in their folder configs where it differs.
CONFIGURATIONS = configurations("score_sde")
_TIME_SCALE = 999.0  # the factor of the time in [0, 1] of a continuous network
# The row of the preconditioning table of a variance preserving diffusion, and its noise levels as a function of q.
_DIFFUSIONS: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "vpsde": ("vp", lambda q: np.sqrt(np.expm1(q)) / 2),
    "subvpsde": ("subvp", lambda q: np.sinh(q / 2)),
}
_EARLIEST = 1e-3  # the time at which the authors' samplers of VP and sub-VP end


def recognizes(content: Any) -> bool:
    """Whether the content of a checkpoint has this format."""
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and any("all_modules.0." in str(name) for name in model)


def read(content: Any, path: Path, config: str | os.PathLike[str] | None = None, *, raw: bool = False) -> Stored:
    """Reads the network of a checkpoint, for ``read_checkpoint``.

    Args:
        content: the content of the checkpoint.
        path: the path of the checkpoint, for error messages.
        config: the name of a published configuration, such as "ve/cifar10_ncsnpp_continuous", or a file with the
            authors' options.
        raw: whether to read the weights of the last step instead of their moving average.
    """
    if config is None:
        raise ValueError(
            f"{path} is a checkpoint of score_sde, which does not hold its configuration: pass the name of a published "
            f"one, such as ve/cifar10_ncsnpp_continuous, or a file with the authors' options, as {argument('config')}."
        )
    options = _options(config)
    weights = _named(load_tensors(_weights(content, path, raw=raw), path), options, path)
    schedule, precondition = _noise(options, f"{config}")
    size, channels = options["image_size"], options["num_channels"]
    stored = {**_architecture(options), **precondition, "sample_shape": [channels, size, size]}
    return Stored(translated(stored, schedule, _settings(options), path), weights, path)


# -- Options ----------------------------------------------------------------------------------------------------------


def _options(config: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options of all sections, after checking that they describe a supported network."""
    given = named_options(config, CONFIGURATIONS)
    options: dict[str, Any] = {}
    for section, fields in _SECTIONS.items():
        options |= checked_options(given.get(section), fields, f"{config}, section {section}")
    model = {**_SDE[options["sde"]], **(_NCSNPP if options["name"] == "ncsnpp" else {})}
    options |= checked_options(given.get("model"), model, f"{config}, section model")
    if options["name"] == "ddpm":
        options["embedding_type"] = "positional"  # the value in the file is ignored
    exploding, continuous = options["sde"] == "vesde", options["continuous"] or options["sde"] == "subvpsde"
    expected = {
        "centered": not exploding,
        "scale_by_sigma": exploding,
        "embedding_type": "fourier" if exploding and continuous else "positional",
    }
    for key, value in expected.items():
        if options[key] != value:
            kind = f"{'continuous' if continuous else 'discrete'} {options['sde']}"
            raise ValueError(f"{config}: {key} must be {value!r} in a network of a {kind}, got {options[key]!r}.")
    if options["name"] == "ddpm" and options["ch_mult"][0] != 1:
        raise ValueError(f"{config}: ch_mult must begin with 1 in a network named ddpm, got {options['ch_mult']}.")
    return {**options, "exploding": exploding, "continuous": continuous}


def _noise(options: Mapping[str, Any], where: str) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Returns the noise levels, and the part of the configuration that interprets the output."""
    count = options["num_scales"]
    with about(f"{where}, section model: the options do not define valid noise levels"):
        if options["exploding"]:
            schedule = NoiseSchedule.geometric(options["sigma_max"], options["sigma_min"], count)
            return schedule, {"precondition": "ncsnpp" if options["continuous"] else "ncsnpp_index"}
        low, high = options["beta_min"], options["beta_max"]
        if not options["continuous"]:
            return NoiseSchedule.from_betas(np.linspace(low / count, high / count, count)), {"precondition": "ddpm"}
        t = np.linspace(1, _EARLIEST, count)
        q = (high - low) * t**2 / 2 + low * t
        with np.errstate(over="ignore"):  # infinite levels are an error
            row, sigmas = _DIFFUSIONS[options["sde"]]
            schedule = NoiseSchedule(sigmas(q))
    scale = {"beta_min": low, "beta_max": high, "time_scale": _TIME_SCALE}
    return schedule, {"precondition": row, "precondition_options": scale}


def _settings(options: Mapping[str, Any]) -> SamplerSettings | None:
    r"""Returns the settings of the authors' sampler, or None if the options name none that is supported.

    The corrector is that of the authors, with which the samples of one call depend on each other (``published``).

    A step of the reverse SDE of VP or sub-VP adds noise of variance :math:`\sigma_{i-1}^2 - \sigma_i^2`, relative to
    the scaled image and to first order in the size of the step. A step of Euler-Maruyama does the same.
    """
    predictor, corrector = options.get("predictor"), options.get("corrector", "none")
    levels = options["num_scales"]
    if predictor == "ancestral_sampling" and corrector == "none":
        return SamplerSettings("ancestral", levels=levels, variance="small" if options["exploding"] else "large")
    if predictor not in _PREDICTORS or corrector not in ("none", "langevin"):
        return None
    correction: dict[str, Any] = {"corrector_steps": 0}
    if corrector == "langevin":
        steps, snr = options.get("n_steps_each", 1), options.get("snr")
        correction = {"corrector_steps": steps, "snr": snr, "published": True}
    return SamplerSettings("predictor-corrector", levels=levels, predictor=_PREDICTORS[predictor], **correction)


def _attention(options: Mapping[str, Any]) -> list[bool]:
    """Whether each scale has attention, from the resolution of the image downward."""
    return [options["image_size"] // 2**i in options["attn_resolutions"] for i in range(len(options["ch_mult"]))]


def _architecture(options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of NCSN++ and DDPM++, or of the U-Net for DDPM."""
    shared = {
        "in_channels": options["num_channels"],
        "out_channels": options["num_channels"],
        "block_out_channels": [options["nf"] * factor for factor in options["ch_mult"]],
        "layers_per_block": options["num_res_blocks"],
        "dropout": options.get("dropout", 0.0),
        "center_input_sample": not options["centered"],
    }
    if options["name"] == "ddpm":
        return {
            "family": "unet",
            **shared,
            **block_types(_attention(options)),
            "attention_head_dim": None,
            "norm_num_groups": 32,
            "norm_eps": 1e-6,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
        }
    unfiltered = options["progressive_input"] == "residual" and not options["fir"]
    return {
        "family": "ncsnpp",
        **shared,
        "model_channels": options["nf"],
        "attention": _attention(options),
        "time_embedding_type": options["embedding_type"],
        "resample_filter": [1, 3, 3, 1] if options["fir"] else [1, 1],
        "input_pyramid": _PYRAMIDS[options["progressive_input"]],
        "output_pyramid": _PYRAMIDS[options["progressive"]],
        "skip_rescale": options["skip_rescale"],
        **({"pyramid_filter": False} if unfiltered else {}),
    }


# -- Weights ----------------------------------------------------------------------------------------------------------

_NOT_TRAINED = r"sigmas|all_modules\.\d+\.W"  # the noise levels, and the frequencies of Fourier features


def _weights(content: Mapping[str, Any], path: Path, *, raw: bool) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the authors' names, without the noise levels."""
    model = {re.sub(r"^(module\.)+", "", str(name)): tensor for name, tensor in content["model"].items()}
    if not raw:
        average = content.get("ema")
        values = average.get("shadow_params") if isinstance(average, dict) else None
        trained = [name for name in model if not re.fullmatch(_NOT_TRAINED, name)]
        if not isinstance(values, list):
            raise ValueError(
                f"{path} holds no moving average of the weights: pass {argument('raw', True)} to read those of the "
                "last step."
            )
        shapes = [
            [getattr(tensor, "shape", None) for tensor in tensors] for tensors in (values, map(model.get, trained))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path} holds a moving average whose shapes differ from those of its weights.")
        model |= dict(zip(trained, values, strict=True))
    return {name: tensor for name, tensor in model.items() if name != "sigmas"}


_RESIDUAL = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
    "NIN_0": "conv_shortcut",
}
_ATTENTION = {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}
# The convolution of a module that resamples or adds a pyramid; Conv is an earlier name.
_OTHERS = {"": "", "Conv_0": "", "Conv2d_0": "", "Conv": ""}
_LEAVES = {"W": "weight", "b": "bias"}


def _modules(options: Mapping[str, Any]) -> Iterator[str]:
    """Yields our names of the modules with weights, in the authors' order."""
    attention, scales, count = _attention(options), len(options["ch_mult"]), options["num_res_blocks"]
    skips, skips_in = options.get("progressive", "none"), options.get("progressive_input", "none")
    down, up, attention_up = "resnet_down", "resnet_up", 0
    if options["name"] == "ddpm":
        down, up, attention_up = "downsamplers.0.conv", "upsamplers.0.conv", count
    if options["embedding_type"] == "fourier":
        yield "time_proj"
    yield from ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in")
    for i in range(scales):
        for j in range(count):
            yield f"down_blocks.{i}.resnets.{j}"
            if attention[i]:
                yield f"down_blocks.{i}.attentions.{j}"
        if i < scales - 1:
            yield f"down_blocks.{i}.{down}"
            if skips_in != "none":
                yield f"down_blocks.{i}.skip_conv"
    yield from ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    for i in range(scales):
        last = i == scales - 1
        for j in range(count + 1):
            yield f"up_blocks.{i}.resnets.{j}"
        if attention[scales - 1 - i]:
            yield f"up_blocks.{i}.attentions.{attention_up}"
        if (skips == "output_skip" and not last) or (skips == "residual" and i == 0):
            yield f"up_blocks.{i}.skip_norm"
        if skips == "residual" or (skips == "output_skip" and not last):
            yield f"up_blocks.{i}.skip_conv"
        if not last:
            yield f"up_blocks.{i}.{up}"
    yield from ("conv_norm_out", "conv_out")


def _named(weights: Mapping[str, Tensor], options: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors by their names in our network."""
    modules = list(_modules(options))
    numbers = sorted({int(found[1]) for name in weights if (found := re.match(r"all_modules\.(\d{1,6})\.", name))})
    if len(numbers) != len(modules):
        raise ValueError(
            f"{path} holds the weights of {len(numbers)} modules, and a network of its configuration has "
            f"{len(modules)}: it was trained with another configuration."
        )
    places = [(f"all_modules.{number}", ours) for number, ours in zip(numbers, modules, strict=True)]
    tensors = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        is_matrix = leaf == "W" and tensor.ndim == 2  # (in, out)
        tensors[f"{module}.{_LEAVES.get(leaf, leaf)}"] = tensor.T if is_matrix else tensor
    named = renamed(tensors, module_names(places, _RESIDUAL, _ATTENTION, _OTHERS), path)
    if options["name"] == "ddpm":
        _add_attention(named, len(options["ch_mult"]), options["num_res_blocks"])
    return named


def _add_attention(weights: dict[str, Tensor], scales: int, count: int) -> None:
    """Adds attention modules without effect: upward, the authors have one per scale, and our U-Net one per block."""
    for i in range(scales):
        last = f"up_blocks.{i}.attentions.{count}."
        parts = {name.removeprefix(last): tensor for name, tensor in weights.items() if name.startswith(last)}
        for part, tensor in parts.items():
            for j in range(count):
                zero = part.startswith("to_out")
                weights[f"up_blocks.{i}.attentions.{j}.{part}"] = torch.zeros_like(tensor) if zero else tensor
