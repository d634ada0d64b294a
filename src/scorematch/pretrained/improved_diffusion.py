r"""Checkpoints of openai/improved-diffusion and openai/guided-diffusion.

A checkpoint is a mapping of names to tensors, either averaged (``ema_<rate>_<step>.pt``) or not (``model<step>.pt``).
It does not hold the options that the network was trained with. The keys of a configuration are the arguments of the
authors' ``create_model_and_diffusion``, with their defaults; ``channel_mult`` and ``num_classes``, which the authors
derive from ``image_size`` and ``class_cond``, may be given too. guided-diffusion has three more options, for the number
of attention heads, the resampling, and the order of queries, keys and values. The default of ``rescale_timesteps`` is
True in improved-diffusion and False in guided-diffusion. For 1000 steps it has no effect; for another number it must be
given, unless one of those three options is.

The noise levels are those of a DDPM with T steps. For ``linear``, its betas go from 0.1 / T to 20 / T. For ``cosine``,

.. math:: \beta_i = \min\Bigl(1 - \frac{f((i + 1) / T)}{f(i / T)},\ 0.999\Bigr), \qquad
          f(t) = \cos^2\Bigl(\frac{t + 0.008}{1.008} \frac{\pi}{2}\Bigr) .

The authors' sampler is ancestral sampling with all T steps. Each step clamps the denoised image. With ``learn_sigma``
the network predicts the variances of the steps.

References:
    Nichol & Dhariwal, 2021, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672;
    Dhariwal & Nichol, 2021, Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233;
    https://github.com/openai/improved-diffusion and https://github.com/openai/guided-diffusion (MIT), whose published
    options are those of ``CONFIGURATIONS``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.messages import plain
from scorematch.core.schema import Field
from scorematch.nets.unet_blocks import block_types
from scorematch.noise import NoiseSchedule
from scorematch.pretrained.cards import configurations
from scorematch.pretrained.configuration import Stored, translated
from scorematch.pretrained.interpreter import Globals
from scorematch.pretrained.options import checked_options, named_options
from scorematch.pretrained.pickles import TENSORS, load_tensors
from scorematch.pretrained.renaming import module_names, renamed
from scorematch.sampling.settings import SamplerSettings

NAMES: tuple[str, ...] = ("improved-diffusion", "guided-diffusion")
GLOBALS: Globals = TENSORS

_COUNT = Field(int, low=1, high=65_536)
_FLAG = Field(bool)
# The authors' options, each with its default; None is derived from other options.
_OPTIONS: Mapping[str, tuple[Field, Any]] = {
    "image_size": (_COUNT, 64),
    "num_channels": (_COUNT, 128),
    "num_res_blocks": (_COUNT, 2),
    "num_heads": (_COUNT, 4),
    "num_heads_upsample": (Field(int, low=-1, high=65_536), -1),
    "attention_resolutions": (Field(list, high=16, each=Field(int, low=1, high=65_536)), [16, 8]),
    "dropout": (Field(float, low=0, high=1), 0.0),
    "learn_sigma": (_FLAG, False),
    "sigma_small": (_FLAG, False),
    "class_cond": (_FLAG, False),
    "diffusion_steps": (Field(int, low=2, high=1_000_000), 1000),
    "noise_schedule": (Field(str, choices=("linear", "cosine")), "linear"),
    "predict_xstart": (_FLAG, False),
    "rescale_timesteps": (_FLAG, None),
    "use_scale_shift_norm": (_FLAG, True),
    "channel_mult": (Field(list, low=1, high=16, each=Field(float, low=0.125, high=65_536)), None),
    "num_classes": (Field(int, low=1, high=10_000_000), 1000),
    # Of guided-diffusion only:
    "num_head_channels": (Field(int, low=-1, high=65_536), -1),
    "resblock_updown": (_FLAG, False),
    "use_new_attention_order": (_FLAG, False),
}
# Options of the authors' programs that do not change the network or its noise levels.
_OTHER = {
    *("batch_size", "microbatch", "lr", "lr_anneal_steps", "weight_decay", "ema_rate", "use_fp16", "fp16_scale_growth"),
    *("data_dir", "log_interval", "save_interval", "resume_checkpoint", "model_path", "use_checkpoint"),
    *("schedule_sampler", "use_kl", "rescale_learned_sigmas"),
    *("num_samples", "clip_denoised", "use_ddim", "timestep_respacing"),
}
CONFIGURATIONS = configurations("improved_diffusion")  # by the name of the file, without .pt
# channel_mult by image_size.
_MULTIPLES: Mapping[int, list[float]] = {
    32: [1, 2, 2, 2],
    64: [1, 2, 3, 4],
    128: [1, 1, 2, 3, 4],
    256: [1, 1, 2, 2, 4, 4],
    512: [0.5, 1, 1, 2, 2, 4, 4],
}


def recognizes(content: Any) -> bool:
    """Whether the content of a checkpoint has this format."""
    return isinstance(content, dict) and {"time_embed.0.weight", "input_blocks.0.0.weight"} <= content.keys()


def read(content: Any, path: Path, config: str | os.PathLike[str] | None = None, *, raw: bool = False) -> Stored:
    """Reads the network of a checkpoint, for ``read_checkpoint``.

    Args:
        content: the content of the checkpoint.
        path: the path of the checkpoint, for error messages.
        config: the name of a published checkpoint, such as "cifar10_uncond_50M_500K", or a file with the authors'
            options.
        raw: must be False; a file holds either the weights or their moving average.
    """
    if raw:
        raise ValueError(
            f"{path} is a checkpoint of improved-diffusion or guided-diffusion, which holds one set of weights: leave "
            f"out {argument('raw')}."
        )
    tensors = load_tensors(content, path)
    first, last = tensors["input_blocks.0.0.weight"], tensors.get("out.2.bias")
    channels, outputs = first.shape[1] if first.ndim == 4 else 0, 0 if last is None else len(last)
    # A network that enlarges images takes a noisy image and a small one, of three channels each.
    if channels in (0, 6) or outputs not in (channels, 2 * channels):
        raise ValueError(
            f"{path} holds a network of improved-diffusion or guided-diffusion with {channels} input and {outputs} "
            "output channels: classifiers and networks that enlarge an image are not supported."
        )
    if config is None:
        raise ValueError(
            f"{path} is a checkpoint of improved-diffusion or guided-diffusion, which does not hold its options: pass "
            "the name of a published one, such as cifar10_uncond_50M_500K, or a file with the authors' options, as "
            f"{argument('config')}."
        )
    options = _options(config)
    weights = _named(tensors, options, path)
    size, widths = options["image_size"], _widths(options)
    heads, heads_up = (
        [_heads(options, width, key) if here else 1 for here, width in zip(_attended(options), widths, strict=True)]
        for key in ("num_heads", "num_heads_upsample")
    )
    steps = options["diffusion_steps"]
    variance = "learned" if options["learn_sigma"] else "small" if options["sigma_small"] else "large"
    settings = SamplerSettings("ancestral", levels=steps, variance=variance, clamp_denoised=True)
    stored = {
        "family": "unet",
        "in_channels": channels,
        "out_channels": channels * (2 if options["learn_sigma"] else 1),
        "block_out_channels": widths,
        **block_types(_attention(options), residual=options["resblock_updown"]),
        "layers_per_block": options["num_res_blocks"],
        "attention_heads": heads,
        "attention_heads_up": heads_up,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_factor": 1000 / steps if options["rescale_timesteps"] else 1.0,
        "time_proj_dim": options["num_channels"],
        "time_embedding_dim": 4 * options["num_channels"],
        "resnet_time_scale_shift": "scale_shift" if options["use_scale_shift_norm"] else "default",
        "dropout": options["dropout"],
        "num_class_embeds": options["num_classes"] if options["class_cond"] else None,
        "precondition": "ddpm_x0" if options["predict_xstart"] else "ddpm",
        "sample_shape": [channels, size, size],
        "predicts_variance": options["learn_sigma"],
    }
    return Stored(translated(stored, _schedule(options, config), settings, path), weights, path)


# -- Options ----------------------------------------------------------------------------------------------------------


def _options(config: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options with the authors' defaults, after checking that they describe a supported network."""
    given = {key: value for key, value in named_options(config, CONFIGURATIONS).items() if value != ""}  # the default
    for key in ("attention_resolutions", "channel_mult"):  # the authors write "16,8"
        if isinstance(given.get(key), str | int):
            given[key] = [int(word) if word.strip().isdecimal() else word for word in str(given[key]).split(",")]
    unknown = sorted(given.keys() - _OPTIONS.keys() - _OTHER)
    if unknown:
        raise ValueError(
            f"{config}: {plain(unknown[0])} is not a supported option of improved-diffusion or guided-diffusion. The "
            f"most similar ones are {', '.join(difflib.get_close_matches(unknown[0], _OPTIONS, cutoff=0))}."
        )
    guided = {"num_head_channels", "resblock_updown", "use_new_attention_order"} & given.keys()
    checks = {key: field for key, (field, _) in _OPTIONS.items()}
    defaults = {key: default for key, (_, default) in _OPTIONS.items()}
    options = {**defaults, **checked_options(given, checks, f"{config}")}
    if options["rescale_timesteps"] is None:
        if not guided and options["diffusion_steps"] != 1000:
            raise ValueError(
                f"{config}: rescale_timesteps must be given for {options['diffusion_steps']} steps. Its default is "
                "True in improved-diffusion and False in guided-diffusion, whose options have the same names."
            )
        options["rescale_timesteps"] = False
    if options["channel_mult"] is None:
        if options["image_size"] not in _MULTIPLES:
            raise ValueError(
                f"{config}: image_size {options['image_size']} has no default channel_mult: add channel_mult."
            )
        options["channel_mult"] = _MULTIPLES[options["image_size"]]
    if options["num_heads_upsample"] < 1:
        options["num_heads_upsample"] = options["num_heads"]
    width, scales = options["num_head_channels"], zip(_widths(options), _attended(options), strict=True)
    if width > 0 and any(here and channels % width for channels, here in scales):
        raise ValueError(
            f"{config}: num_head_channels must divide the number of channels at each scale with attention, got {width}."
        )
    return options


def _heads(options: Mapping[str, Any], width: int, key: str = "num_heads") -> int:
    """The number of attention heads for features of a width; ``key`` is the option that holds it if it is fixed."""
    head_width: int = options["num_head_channels"]
    return options[key] if head_width < 1 else max(1, width // head_width)


def _widths(options: Mapping[str, Any]) -> list[int]:
    """The number of channels at each scale, from the resolution of the image downward."""
    return [int(options["num_channels"] * factor) for factor in options["channel_mult"]]


def _schedule(options: Mapping[str, Any], config: str | os.PathLike[str]) -> NoiseSchedule:
    try:
        return NoiseSchedule.from_betas(_betas(options["noise_schedule"], options["diffusion_steps"]))
    except ValueError as error:
        raise ValueError(
            f"{config}: noise_schedule and diffusion_steps do not define valid noise levels, since the variance of a "
            f"step is not between 0 and 1: linear needs more than 20 steps, got {options['diffusion_steps']}."
        ) from error


def _betas(kind: str, steps: int) -> np.ndarray:
    """The variances of the steps, (steps,) float64, the first step first."""
    if kind == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps)
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _attention(options: Mapping[str, Any]) -> list[bool]:
    """Whether each scale has attention, from the resolution of the image downward."""
    factors = [options["image_size"] // resolution for resolution in options["attention_resolutions"]]
    return [2**i in factors for i in range(len(options["channel_mult"]))]


def _attended(options: Mapping[str, Any]) -> list[bool]:
    """The same, but the last entry is for the middle, which has attention, with the heads of the last scale."""
    return [*_attention(options)[:-1], True]


# -- Weights ----------------------------------------------------------------------------------------------------------

_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _places(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the authors' name and our name of each module."""
    attention, count = _attention(options), options["num_res_blocks"]
    scales, inner = len(attention), "" if options["resblock_updown"] else ".conv"
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "label_emb", "class_embedding"
    yield "input_blocks.0.0", "conv_in"
    number = 1
    for i in range(scales):
        for j in range(count):
            yield f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{j}"
            yield f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{j}"
            number += 1
        yield f"input_blocks.{number}.0{'.op' if inner else ''}", f"down_blocks.{i}.downsamplers.0{inner}"
        number += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    number = 0
    for i in range(scales):
        here = attention[scales - 1 - i]
        for j in range(count + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{i}.resnets.{j}"
            if here:
                yield f"output_blocks.{number}.1", f"up_blocks.{i}.attentions.{j}"
            number += 1
        yield f"output_blocks.{number - 1}.{1 + here}{inner}", f"up_blocks.{i}.upsamplers.0{inner}"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def _named(weights: Mapping[str, Tensor], options: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors with their names in our network."""

    def split(rows: Tensor, name: str) -> Tensor:
        count = _heads(options, len(rows) // 3, "num_heads_upsample" if name.startswith("up_blocks") else "num_heads")
        if len(rows) % (3 * count):
            raise ValueError(f"its {len(rows)} rows do not have {count} heads.")
        if options["use_new_attention_order"]:
            parts = rows.reshape(3, count, -1, *rows.shape[1:])
        else:  # q, k and v of a head follow each other
            parts = rows.reshape(count, 3, -1, *rows.shape[1:]).transpose(0, 1)
        return parts.flatten(1, 2)

    return renamed(weights, module_names(_places(options), _RESIDUAL, _ATTENTION), path, split)
