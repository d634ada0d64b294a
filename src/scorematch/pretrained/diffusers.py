r"""U-Nets in the format of diffusers, in a folder or as objects in memory.

A flat folder has ``config.json`` and ``scheduler_config.json`` side by side; a pipeline has ``unet/config.json`` and
``scheduler/scheduler_config.json``. The first file says how to build the U-Net. The second says what its output means
and on which noise levels it was trained:

- the betas of a DDPM (linear, scaled_linear, squaredcos_cap_v2, sigmoid, or a list; rescaled or not), for an output
  that is the noise, v or the clean image, in units of images in [-1, 1];
- the noise levels of a variance-exploding network, in units of images in [0, 1], or in [-1, 1] for KarrasVeScheduler.
  The network is NCSN++, whose output is sigma times the score and whose time input is log sigma, or the NCSN of the
  project diffusers-ncsn, whose output is the score and whose time input is the index of the level.

The other way round, ``pipeline`` returns the files that make a saved network a pipeline of diffusers: a
``DDPMPipeline``, or for the preconditioning "karras" a ``ConsistencyModelPipeline`` with the scheduler of EDM, which is
the pipeline that scales the input of the U-Net and takes classes.

This module does not import diffusers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scorematch.core.json_files import native
from scorematch.core.messages import about
from scorematch.core.schema import Field, check
from scorematch.nets import FAMILIES
from scorematch.nets.unet import OWN_KEYS
from scorematch.noise import NoiseSchedule
from scorematch.pretrained.cards import Card
from scorematch.pretrained.configuration import CONFIG_FILE, Stored, architecture, read_json, translated
from scorematch.pretrained.weights import DIFFUSERS_WEIGHTS_FILES, read_weights
from scorematch.sampling.settings import SamplerSettings

# The class of diffusers, and that of diffusers-ncsn, whose time input is the index of the level.
_NCSN = "UNet2DModelForNCSN"
CLASSES = ("UNet2DModel", _NCSN)
SCHEDULER_FILE = "scheduler_config.json"
INDEX_FILE = "model_index.json"

# The keys of the family "unet" that diffusers has as well.
_UNET = {key: field for key, field in FAMILIES["unet"].keys.items() if key not in OWN_KEYS}
# Keys that are left out of a configuration with these values, so that it and its hash are those of earlier versions.
_UNLESS = {"class_embed_type": None, "mid_block_type": "UNetMidBlock2D"}
_NETWORK: Mapping[str, Field] = {
    **_UNET,
    "sample_size": Field(list, optional=True, low=2, high=2, each=Field(int, low=1, high=65_536)),
}
# Options of schedulers that change the time input or the noise levels and are not supported, with the value that leaves
# the option unused. Schedulers with sigma_data are those of EDM and of consistency models, and those with
# timestep_scaling are of latent consistency models.
_UNSUPPORTED = {
    "timestep_type": "discrete",
    "snr_shift_scale": 1.0,
    "use_flow_sigmas": False,
    "sigma_data": None,
    "timestep_scaling": None,
}

KARRAS = "karras"  # the row of EDM
# The schedulers that a ``DDPMPipeline`` can sample with.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
# What the output of a DDPM means (prediction_type) -> the row of the preconditioning table.
_PREDICTIONS = {"epsilon": "ddpm", "v_prediction": "ddpm_v", "sample": "ddpm_x0"}
_BETA = Field(float, low=0, high=1)
_DDPM: Mapping[str, Field] = {
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": Field(str, choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")),
    "trained_betas": Field(list, optional=True, low=1, high=1_000_000, each=_BETA),
    "num_train_timesteps": Field(int, low=1, high=1_000_000),
    "prediction_type": Field(str, choices=tuple(_PREDICTIONS)),
    "predict_epsilon": Field(bool),
    "rescale_betas_zero_snr": Field(bool),
}
_SIGMA = Field(float, required=True, low=0, high=1e30)
_VARIANCE_EXPLODING: Mapping[str, Field] = {
    "sigma_max": _SIGMA,
    "sigma_min": _SIGMA,
    "num_train_timesteps": Field(int, optional=True, low=2, high=1_000_000),
    # Of diffusers-ncsn: the steps at each level and the step size. In other schedulers sampling_eps is a time.
    "num_annealed_steps": Field(int, low=1, high=1_000_000),
    "sampling_eps": Field(float, low=0, high=1e30),
    # Of ScoreSdeVeScheduler: the Langevin steps at each level, and their signal-to-noise ratio.
    "correct_steps": Field(int, low=0, high=1_000_000),
    "snr": Field(float, above=0, below=1),
}


# -- Reading the two configurations and the weights -------------------------------------------------------------------


def read(
    home: Path, config: Mapping[str, Any], card: Card | None, complete: Callable[[Sequence[str]], None] | None
) -> Stored:
    """Reads the network of a folder.

    Args:
        home: the folder with the network's config.json, which is unet/ in a pipeline.
        config: the content of that file.
        card: the card of the network, or None. If ``card.correction`` is True, the noise levels are those of the card.
        complete: downloads the first of the named files of weights that exists; called when the configurations have
            been checked. None reads no weights, nor the noise levels that some networks store with them.

    Returns:
        The network, with its configuration translated to that of a ScoreNet.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if the network is not a score of pixels, the scheduler's configuration is missing or not that of a
            DDPM or a variance-exploding network, or an option is not supported.
    """
    pipeline = home.parent if home.name == "unet" else home
    _refuse_latents(home, pipeline)
    places = (home / "scheduler", home, pipeline / "scheduler", pipeline)
    path = next((place / SCHEDULER_FILE for place in places if (place / SCHEDULER_FILE).is_file()), None)
    if path is None:
        raise ValueError(
            f"{pipeline} has no {SCHEDULER_FILE}, which says what the output of the network means and which noise "
            "levels it was trained on. Download it from the same repository, into the folder or into scheduler/."
        )
    scheduler = read_json(path)
    if card is not None and card.correction:
        corrected = {"sigma_max": card.sigmas[0], "sigma_min": card.sigmas[1], "num_train_timesteps": card.levels}
        scheduler = {**scheduler, **corrected}
    where = str(home / CONFIG_FILE), str(path)
    network = _translate(config, scheduler, *where, None)
    if complete is None:
        return Stored(network, {}, home, has_weights=False)
    complete(DIFFUSERS_WEIGHTS_FILES)
    weights = current_names(read_weights(home, DIFFUSERS_WEIGHTS_FILES))
    stored_levels = weights.pop("sigmas", None)
    if stored_levels is not None:
        network = _translate(config, scheduler, *where, stored_levels)
    return Stored(network, weights, home)


def read_objects(unet: nn.Module, scheduler: Any) -> Stored:
    """Reads a network from objects in memory: a UNet2DModel and its scheduler.

    The weights of a U-Net on the CPU are not copied; they share its memory.

    Raises:
        TypeError: if an object has no ``config``.
        ValueError: if the class of the U-Net or an option is not supported.
    """
    unet = getattr(unet, "_orig_mod", unet)  # without torch.compile
    network, training = _config_of(unet, "unet", "UNet2DModel"), _config_of(scheduler, "scheduler", "DDPMScheduler")
    if network["_class_name"] not in CLASSES:
        raise ValueError(
            f"unet must be one of {' and '.join(CLASSES)}, the networks of diffusers that are supported, got "
            f"{network['_class_name']}."
        )
    weights = current_names({name: tensor.detach().cpu() for name, tensor in unet.state_dict().items()})
    source, scheduler_source = f"the {network['_class_name']}", f"the {training['_class_name']}"
    config = _translate(
        network, training, f"the config of {source}", f"the config of {scheduler_source}", weights.pop("sigmas", None)
    )
    return Stored(config, weights, source)


def _config_of(thing: Any, name: str, example: str) -> dict[str, Any]:
    config = getattr(thing, "config", None)
    if isinstance(thing, type) or not isinstance(config, Mapping):
        found = repr(thing) if isinstance(thing, type) else type(thing).__name__
        raise TypeError(f"{name} must be an object of diffusers with a config, such as a {example}, got {found}.")
    return {"_class_name": type(thing).__name__, **{key: native(value) for key, value in config.items()}}


def _refuse_latents(home: Path, pipeline: Path) -> None:
    """Raises an error for a latent pipeline, whose U-Net does not draw pixels."""
    index = read_json(pipeline / INDEX_FILE) if (pipeline / INDEX_FILE).is_file() else {}
    for part in ("vae", "vqvae"):
        # A pipeline that can be latent or not has [null, null] for a part that it lacks.
        if index.get(part) not in (None, [None, None]) or (home != pipeline and (pipeline / part).is_dir()):
            raise ValueError(
                f"{pipeline} is a latent pipeline, with a {part}/: its U-Net is a score of latents, not of pixels."
            )


# -- Translation ------------------------------------------------------------------------------------------------------


def _translate(
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    where: str,
    where_scheduler: str,
    stored_levels: Tensor | None,
) -> dict[str, Any]:
    """Translates diffusers' configurations of a network and its scheduler to the configuration of a ScoreNet.

    Args:
        network: the content of the network's config.json.
        scheduler: the content of scheduler_config.json.
        where: the name of the network's configuration in error messages.
        where_scheduler: the name of the scheduler's configuration in error messages.
        stored_levels: the noise levels that are stored with the weights, which replace those of the scheduler; None if
            there are none.
    """
    for key, unused in _UNSUPPORTED.items():
        if scheduler.get(key, unused) != unused:
            raise ValueError(f"{where_scheduler}: {key} {scheduler[key]!r} is not supported.")
    size = network.get("sample_size")
    size = [size, size] if isinstance(size, int) else size
    check({**network, "sample_size": size}, _NETWORK, where)
    # A missing key means diffusers' default, which is also the default of this package's U-Net.
    unet = {key: network[key] for key in _UNET if key in network and network[key] != _UNLESS.get(key, ...)}
    inputs, outputs = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if outputs > inputs and outputs != 2 * inputs:
        raise ValueError(
            f"{where}: out_channels must be at most in_channels, {inputs}, or twice as many for a network that also "
            f"predicts a variance, got {outputs}."
        )
    variance = scheduler.get("variance_type")
    # A network that also takes a conditioning image has no more output than input channels.
    predicts_variance = outputs == 2 * inputs or (variance in ("learned", "learned_range") and outputs % 2 == 0)
    if predicts_variance and variance == "learned":
        raise ValueError(
            f"{where_scheduler}: variance_type 'learned' is not supported; a network that predicts a variance must "
            "have 'learned_range', a value between two fixed variances."
        )
    exploding = network.get("_class_name") == _NCSN or network.get("time_embedding_type") == "fourier"
    schedule, precondition = (_variance_exploding if exploding else _ddpm)(network, scheduler, where_scheduler)
    if stored_levels is not None:
        schedule = _stored_schedule(stored_levels, schedule, where, where_scheduler)
    config = {
        "family": "unet",
        **unet,
        "precondition": precondition,
        "sample_shape": None if size is None else [outputs // 2 if predicts_variance else outputs, *size],
        "predicts_variance": predicts_variance,
    }
    settings = None
    if network.get("_class_name") == _NCSN:
        settings = _settings_of_ncsn(scheduler, schedule)
    elif len(schedule) > 1:
        of_ddpm = partial(_settings_of_ddpm, predicts_variance=predicts_variance)
        settings = (_settings_of_ncsnpp if exploding else of_ddpm)(scheduler, len(schedule))
    kept = {key: value for key, value in scheduler.items() if not key.startswith("_") or key == "_class_name"}
    return translated({**config, "scheduler": kept}, schedule, settings, where)


def _settings_of_ncsn(scheduler: Mapping[str, Any], schedule: NoiseSchedule) -> SamplerSettings | None:
    """The sampler of diffusers-ncsn; None if its step size is too large for the noise levels."""
    steps, step_size = scheduler.get("num_annealed_steps", 100), scheduler.get("sampling_eps", 1e-5)
    if not 0 < step_size < 2 * schedule.sigma_min**2:
        return None
    levels = len(schedule) if len(schedule) > 1 else None
    return SamplerSettings(levels=levels, steps_per_level=steps, step_size=step_size, exact_noise=False, denoise=False)


def _settings_of_ncsnpp(scheduler: Mapping[str, Any], levels: int) -> SamplerSettings:
    """The sampler of score_sde with all levels; the defaults are those of ScoreSdeVeScheduler."""
    steps, snr = scheduler.get("correct_steps", 1), scheduler.get("snr", 0.15)
    corrector = {"corrector_steps": steps, "snr": snr, "published": True}
    return SamplerSettings("predictor-corrector", levels=levels, predictor="reverse-diffusion", **corrector)


def _settings_of_ddpm(scheduler: Mapping[str, Any], levels: int, *, predicts_variance: bool) -> SamplerSettings:
    """The ancestral sampler with all levels; the defaults are those of DDPMScheduler."""
    fixed = "large" if "large" in str(scheduler.get("variance_type")) else "small"
    clamped = bool(scheduler.get("clip_sample", True)) and scheduler.get("clip_sample_range", 1) == 1
    variance = "learned" if predicts_variance else fixed
    return SamplerSettings("ancestral", levels=levels, variance=variance, clamp_denoised=clamped)


def _variance_exploding(
    network: Mapping[str, Any], scheduler: Mapping[str, Any], where: str
) -> tuple[NoiseSchedule, str]:
    """The noise levels and the preconditioning of NCSN++ or NCSN."""
    if "beta_start" in scheduler or scheduler.get("trained_betas") is not None:
        raise ValueError(
            f"{where} is the configuration of a DDPM (_class_name {scheduler.get('_class_name')!r}), and the network "
            f"is a variance-exploding one (time_embedding_type 'fourier', or {_NCSN}), which needs that of its own "
            "scheduler, such as ScoreSdeVeScheduler."
        )
    check(scheduler, _VARIANCE_EXPLODING, where)
    scale = 2 if scheduler.get("_class_name") == "KarrasVeScheduler" else 1  # its levels are for images in [-1, 1]
    with about(where):
        schedule = NoiseSchedule.geometric(
            scheduler["sigma_max"] / scale, scheduler["sigma_min"] / scale, scheduler.get("num_train_timesteps") or 2000
        )
    return schedule, "ncsn" if network.get("_class_name") == _NCSN else "ncsnpp"


def _ddpm(network: Mapping[str, Any], scheduler: Mapping[str, Any], where: str) -> tuple[NoiseSchedule, str]:
    """The noise levels and the preconditioning of a DDPM."""
    if "beta_start" not in scheduler and scheduler.get("trained_betas") is None:
        raise ValueError(
            f"{where} is not the configuration of a DDPM: it has no beta_start and no trained_betas (_class_name "
            f"{scheduler.get('_class_name')!r})."
        )
    check(scheduler, _DDPM, where)
    # Until the end of 2022 diffusers wrote predict_epsilon instead of prediction_type.
    prediction = scheduler.get("prediction_type", "epsilon" if scheduler.get("predict_epsilon", True) else "sample")
    # In float32, as in diffusers' schedulers: at the lowest levels 1 - alpha_bar has a relative error of 1e-5, and the
    # network was trained with that error.
    with torch.device("cpu"):  # whatever torch's default device is
        alphas = 1 - _betas(scheduler)
        if scheduler.get("rescale_betas_zero_snr"):
            alphas = _without_signal_at_the_end(alphas)
        alpha_bar = torch.cumprod(alphas, 0).double()
    with about(f"{where}: the betas do not define valid noise levels"):
        return NoiseSchedule(0.5 * (1 / alpha_bar - 1).sqrt().flip(0)), _PREDICTIONS[prediction]


def _betas(scheduler: Mapping[str, Any]) -> Tensor:
    """The betas of a DDPM, (T,) float32, in the order of the time steps, from low to high noise."""
    if scheduler.get("trained_betas") is not None:
        return torch.tensor(scheduler["trained_betas"], dtype=torch.float32)
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    steps, kind = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal, 2021, arXiv:2102.09672, Eq. 17
        alpha_bar = torch.cos((torch.arange(steps + 1).double() / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()
    return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float32)) * (end - start) + start


def _without_signal_at_the_end(alphas: Tensor) -> Tensor:
    """The alphas of steps at the end of which no signal remains, without the last one, 0: its level is infinite.

    References:
        Lin et al., 2024, Common Diffusion Noise Schedules and Sample Steps Are Flawed, arXiv:2305.08891, Algorithm 1.
    """
    roots = torch.cumprod(alphas, 0).sqrt()
    alpha_bar = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1])))[:-1] ** 2
    return torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def _stored_schedule(levels: Tensor, configured: NoiseSchedule, where: str, where_scheduler: str) -> NoiseSchedule:
    """The noise levels that are stored with the weights, with a warning if those of the scheduler differ."""
    with about(f"the weights beside {where} do not hold valid noise levels"):
        schedule = NoiseSchedule(levels)
    if len(schedule) == len(configured) and np.allclose(schedule.sigmas, configured.sigmas, rtol=1e-4):
        return configured  # its levels are not rounded to float32
    warnings.warn(
        f"the weights hold the noise levels {schedule}, but {where_scheduler} has {configured}; the levels in the "
        "weights are used.",
        stacklevel=7,
    )
    return schedule


# -- Writing a pipeline -----------------------------------------------------------------------------------------------


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class of diffusers that has the backbone of a network; None if there is none."""
    family, row = FAMILIES.get(config["family"]), config["precondition"]
    # The U-Net of a DDPM; EDMEulerScheduler computes the other input and the meaning of the output.
    return None if family is None else family.diffusers_class(architecture(config), "ddpm" if row == KARRAS else row)


def obstacle(config: Mapping[str, Any]) -> str | None:
    """Why no pipeline of diffusers can run a network; None if one can.

    Args:
        config: the configuration of the network, with the keys of ``ScoreNet.config``.
    """
    row = config["precondition"]
    rows = (*_PREDICTIONS.values(), KARRAS)
    if row not in rows:
        return f"its preconditioning is {row!r}, and not one of {', '.join(map(repr, rows))}"
    if class_of(config) is None:
        own = [key for key, value in OWN_KEYS.items() if config.get(key, value) != value]
        if own:
            return f"UNet2DModel has no {', '.join(own)}, and a network for it must be trained without them"
        return "UNet2DModel does not have its architecture"
    takes_image = config.get("in_channels", 3) != config.get("out_channels", 3)
    takes_other = config.get("class_embed_type") is not None
    takes_other |= config.get("num_class_embeds") is not None and row != KARRAS
    if takes_image or takes_other or config["predicts_variance"]:
        return "it takes a condition or predicts a variance"
    if config["sample_shape"] is None or config["value_range"] is None:
        return "it has no sample_shape or no value_range"
    if row == KARRAS and config["sample_shape"][-1] != config["sample_shape"][-2]:
        return "its images are not square"
    stride = 2 ** (len(config["block_out_channels"]) - 1)
    if any(side % stride for side in config["sample_shape"][1:]):
        return f"the sides of its images are no multiples of {stride}"
    return None


def pipeline(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    r"""The files, by name, that ``DiffusionPipeline.from_pretrained`` needs in addition to the U-Net.

    A network that came with a scheduler gets it back as it was. If its noise levels or its row have changed since, only
    the options that define them are replaced.

    Otherwise the betas of the scheduler are those of the network's noise levels. With s the level in units of images in
    [-1, 1], :math:`\bar\alpha_t = 1 / (1 + s_t^2)`, and :math:`\beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1} =
    (s_t^2 - s_{t-1}^2) / (1 + s_t^2)`, where :math:`s_0 = 0`.

    Args:
        config: the configuration of a network without an ``obstacle``.
    """
    low, high = config["value_range"]
    if config["precondition"] == KARRAS:
        sigmas = (2 / (high - low) * NoiseSchedule.from_dict(config["schedule"]).sigmas).tolist()
        scheduler = {"_class_name": "EDMEulerScheduler", "sigma_max": sigmas[0], "sigma_min": sigmas[-1]}
        scheduler |= {"sigma_data": config.get("precondition_options", {}).get("sigma_data", 0.5)}
        index = {
            "_class_name": "ConsistencyModelPipeline",
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        }
        return {INDEX_FILE: index, SCHEDULER_FILE: scheduler}
    kept = dict(config.get("scheduler") or {})
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", kept["_class_name"] if kept.get("_class_name") in _SCHEDULERS else _SCHEDULERS[0]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if kept and _describes(kept, config):
        return {INDEX_FILE: index, SCHEDULER_FILE: kept}
    squares = (2 / (high - low) * NoiseSchedule.from_dict(config["schedule"]).sigmas.flip(0)).square()
    betas = torch.diff(squares, prepend=squares.new_zeros(1)) / (1 + squares)
    levels = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": next(kind for kind, row in _PREDICTIONS.items() if row == config["precondition"]),
    }
    # The large variance as Ho et al. 2020 chose for CIFAR-10, and the default of AncestralSampler.
    others = {"_class_name": _SCHEDULERS[0], "variance_type": "fixed_large", "clip_sample": True}
    if kept:
        others = {key: value for key, value in kept.items() if key not in _DDPM}
    return {INDEX_FILE: index, SCHEDULER_FILE: {**others, **levels}}


def _describes(scheduler: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a scheduler has the noise levels and the row of a network."""
    try:
        schedule, row = _ddpm({}, scheduler, "")
    except ValueError:
        return False
    same = row == config["precondition"] and config["value_range"] == [0.0, 1.0]
    return same and schedule == NoiseSchedule.from_dict(config["schedule"])


# -- Names of weights -------------------------------------------------------------------------------------------------

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a U-Net under their current names, without duplicates.

    Until 2023 the layers of attention were named query, key, value and proj_attn, and some were stored as 1x1
    convolutions. ``time_proj.W`` duplicates ``time_proj.weight``, and ``downsamplers.0.op`` duplicates
    ``downsamplers.0.conv``.
    """
    current = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
        if match:
            name = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        if name == "time_proj.W":
            name = "time_proj.weight"
        current[name.replace(".downsamplers.0.op.", ".downsamplers.0.conv.")] = tensor
    return current
