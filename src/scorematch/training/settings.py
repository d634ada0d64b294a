"""The options of training. Each is declared once, with its default, type, range and meaning.

From this declaration are made ``Settings`` with its checks, the arguments of ``train`` and their documentation, the
options of the command line, and the part "settings" of the config.json of a run.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter
from textwrap import TextWrapper
from typing import Any, Concatenate, Literal, ParamSpec, cast, get_args

from torch import Tensor

from scorematch.core.arguments import argument, check_value
from scorematch.core.json_files import native
from scorematch.core.precision import Autocast
from scorematch.core.schema import Field
from scorematch.noise import NoiseSchedule
from scorematch.sampling import Sampler
from scorematch.score import ScoreNet
from scorematch.training.augment import AUGMENTATIONS, Augmentation
from scorematch.training.ema import check_length
from scorematch.training.growth import Stage, parts
from scorematch.training.levels import Levels, Weighting

Decay = Literal["cosine", "linear", "constant", "inverse-sqrt"]
Optimizer = Literal["adamw", "muon"]
Loss = Callable[..., Tensor]
ConditionTask = Callable[[Tensor, Any], Tensor | tuple[Tensor, Tensor]]

# The factor of the learning rate as a function of the completed fraction of the run. "inverse-sqrt" is that of EDM2-S,
# which is constant for 70,000 of 2^20 steps (Karras et al. 2024, Table 6).
_DECAYS: dict[Decay, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
    "inverse-sqrt": lambda share: 1 / math.sqrt(max(1.0, share / 0.07)),
}


def _option(default: Any, meaning: str, kind: type | None = None, *, free: bool = False, **bounds: Any) -> Any:
    """The field of an option.

    Args:
        default: its default. None is also allowed as a value if it is the default.
        meaning: what it is, as the help of the command line and the documentation say.
        kind: the type of its value, as in ``Field``; None is that of the default, and object allows any value.
        free: whether it may change when a run continues.
        bounds: the other arguments of ``Field``.
    """
    kind = type(default) if kind is None else kind
    value = None if kind is object else Field(kind, **{"optional": default is None, **bounds})
    return field(default=default, metadata={"value": value, "meaning": meaning, "free": free})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run on which its result depends; ``train`` describes them."""

    # 40 to 100 epochs of common small data sets. The FID of a network with 16 million parameters on CIFAR-10 was 16
    # after 5 million images, 10 after 10 million and 6 after 20 million (mini_edm's published curves).
    images: int = _option(5_000_000, "the length of the run in images, rounded up to whole batches", low=1)
    # Ho et al. 2020 and Song et al. 2021 for CIFAR-10
    batch_size: int = _option(128, "the number of images per step, over all processes together", low=1)
    microbatch: int | None = _option(
        None, "the most images that a process computes at once; None is the whole batch", int, low=1, free=True
    )
    optimizer: Optimizer = _option(
        "adamw",
        "adamw, or muon, which trains linear layers and convolutions with orthogonal steps, and the rest with adamw",
        choices=get_args(Optimizer),
    )
    # Karras et al. 2022, Table 7, for CIFAR-10, with a batch of 512
    lr: float = _option(1e-3, "the largest learning rate", above=0)
    # Karras et al. 2024, Appendix B: 0.99 rather than 0.999
    betas: tuple[float, float] = _option(
        (0.9, 0.99), "the decay rates of AdamW's moments", list, low=2, high=2, each=Field(float, low=0, below=1)
    )
    # Kingma & Ba 2015
    eps: float = _option(1e-8, "AdamW's eps, which is added to the root of the second moment", above=0)
    # none in Ho et al. 2020, Song et al. 2021, Karras et al. 2022
    weight_decay: float = _option(0.0, "AdamW's weight decay; a step multiplies the weights by 1 - lr times it", low=0)
    # docs/recipes.md, "Trials"
    fixed_norms: bool = _option(False, "the weights of each output of a linear layer or convolution keep their norm")
    # published warm-ups are for longer runs
    warmup_images: int | None = _option(
        None, "images over which lr rises linearly; None is 500 steps, at most a twentieth of the run", int, low=0
    )
    # to zero: Loshchilov & Hutter 2017; Karras et al. 2024 show that some decay is needed
    decay: Decay = _option("cosine", "how the learning rate falls after the warm-up", choices=get_args(Decay))
    # Ho et al. 2020 and Song et al. 2021, whose losses are means over the values
    clip: float | None = _option(
        1.0, "the largest norm of the gradient, of the loss divided by D/2; None does not clip", above=0, optional=True
    )
    # Karras et al. 2024, Section 3.2, from which any length is reconstructed
    ema: Sequence[float] = _option(
        (0.05, 0.10), "averages of the weights: lengths to 0.289, or decays per step from 0.9", list, each=Field(float)
    )
    levels: Levels | NoiseSchedule | None = _option(None, "the noise levels; None are those of the network", object)
    weighting: Weighting | Callable[[Tensor], Tensor] | None = _option(
        None, "the weighting of the loss by noise level; None is that of the network", object
    )
    # the square of the error, whose minimum is the score
    p: float = _option(2, "the power of the error: 2, or 1 for the L1 loss", float, low=1)
    loss: Loss | None = _option(None, "a function that replaces the denoising loss", object)
    # emulated bfloat16 takes twelve times as long (scorematch.core.precision)
    precision: Autocast = _option(
        "auto",
        "auto is bfloat16 if the device multiplies it natively, else float32; float16, with loss scaling, is for "
        "other GPUs",
        choices=get_args(Autocast),
    )
    # Ho et al. 2020, Appendix B
    augment: Sequence[Augmentation] | None = _option(
        None,
        "random changes of the data: flip (left to right), rotate (by 90 degrees), shift (periodically), nonleaking "
        "(the network is told how, and samples are not changed); None is flip for pictures, which is wrong for digits, "
        "for example, and nothing for other data",
        list,
        each=Field(str, choices=AUGMENTATIONS),
    )
    # Ho & Salimans 2022 use 0.1 for guidance
    label_drop: float = _option(
        0.0, "the fraction of labels, or of vectors as conditions, that are replaced by none", low=0, below=1
    )
    condition: ConditionTask | None = _option(None, "a task that computes the condition from clean images", object)
    seed: int = _option(0, "the seed of all random numbers of the run", low=0)
    compile: bool = _option(False, "compile the backbone with ``torch.compile``", free=True)

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value, field_ = option.name, native(getattr(self, option.name)), option.metadata["value"]
            if field_ is not None:
                if field_.kind is list and isinstance(value, Iterable) and not isinstance(value, str):
                    value = tuple(map(native, value))
                check_value(name, value, field_, example=option.default)
                object.__setattr__(self, name, value)
        object.__setattr__(self, "ema", tuple(check_length(length) for length in self.ema))
        if len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema must not contain a length twice, got {self.ema!r}.")
        if self.condition is not None and (not callable(self.condition) or isinstance(self.condition, type)):
            raise TypeError(
                f"condition must be callable as task(x, generator), such as Colorization(), got {self.condition!r}."
            )
        if self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss must be a function, such as dsm_loss, got {self.loss!r}.")
        if self.loss is not None and (self.p != 2 or self.weighting is not None):
            raise ValueError("p and weighting apply to the default loss only. Leave them out, or leave out loss=.")

    @property
    def steps(self) -> int:
        """The number of steps: ``images`` rounded up to whole batches."""
        return -(-self.images // self.batch_size)

    @property
    def total(self) -> int:
        """The number of images of all steps: ``steps * batch_size``."""
        return self.steps * self.batch_size

    def rate(self, images: int) -> float:
        """The learning rate of the step that begins after a number of images."""
        warmup = min(self.images // 20, 500 * self.batch_size) if self.warmup_images is None else self.warmup_images
        share = images / self.total
        return self.lr * _DECAYS[self.decay](share) * min(1.0, (images + self.batch_size) / max(1, warmup))


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """The settings of a run and of what it writes; ``train`` describes them."""

    start: str | os.PathLike[str] | None = _option(
        None, "the name or folder of a trained network, with whose weights a new run begins", object
    )
    log_every: int | None = _option(None, "images between lines of the log; None is 1/1000 of the run", int, low=1)
    sample_every: int | None = _option(
        None, "images between pictures of samples; None is 1/20 of the run, or what takes 2 % of the time", int, low=1
    )
    snapshot_every: int | None = _option(
        None, "images between snapshots, from which ema computes averages; None is 1/20 of the run", int, low=1
    )
    checkpoint_every: int | None = _option(
        None, "images between checkpoints, the most that an interruption costs; None is ten minutes", int, low=1
    )
    keep: int = _option(2, "the number of checkpoints to keep; with two, one is left if the last is damaged", low=1)
    evaluate: Callable[[ScoreNet, int], Mapping[str, float]] | None = _option(
        None, "a function of (averaged network, images) that returns numbers for the log", object
    )
    trackers: Sequence[str] = _option((), "trackers of Accelerate, such as tensorboard", list, each=Field(str))
    push_to_hub: str | None = _option(None, "owner/name on the Hugging Face Hub, to upload the network at the end", str)
    progress: bool = _option(True, "show a progress bar")
    accelerator: Any = _option(None, "an ``accelerate.Accelerator``; None creates one", object)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trackers and self.accelerator is not None:
            raise ValueError("trackers and accelerator cannot both be given. Write Accelerator(log_with=...).")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """The settings of ``train``: those of a run with its length in hours, and its stages."""

    hours: float | None = _option(
        None,
        "in place of images: as many as this machine processes in so many hours, by the measured time of a step; a run "
        "that continues keeps its number of images",
        float,
        above=0,
        high=500,
    )
    growth: Sequence[Stage] = _option((), "the later stages of the run, in which the network is larger", object)

    def __post_init__(self) -> None:
        super().__post_init__()
        growth, known = tuple(self.growth), {each.name for each in fields(Settings)} - {"images", "seed"}
        if not all(isinstance(stage, Stage) for stage in growth):
            raise TypeError(f"growth must contain Stages, such as Stage(0.5, {{'pixel_layers': 2}}), got {growth!r}.")
        if unknown := sorted({name for stage in growth for name in stage.training} - known):
            raise ValueError(f"a stage of growth cannot change {', '.join(unknown)}, which are those of the whole run.")
        if self.hours is None:  # otherwise the number of images is not known yet
            growth = tuple(itertools.takewhile(lambda stage: stage.fewest <= self.images, growth))
        object.__setattr__(self, "growth", growth)
        for number, stage in enumerate(self.stages() if growth else (), start=1):
            if stage.images < stage.batch_size:
                raise ValueError(
                    f"stage {number} of {len(growth) + 1} would have {stage.images} images, less than a batch of "
                    f"{stage.batch_size}. Write {argument('images')} with more, or fewer stages of growth."
                )

    def stages(self) -> list[TrainSettings]:
        """The settings of each stage, with the number of its images; they have no growth."""
        if not self.growth:
            return [self]
        changes: list[Mapping[str, Any]] = [{}, *(stage.training for stage in self.growth)]
        return [
            replace(self, growth=(), images=max(1, round(part * self.images)), **change)
            for part, change in zip(parts(self.growth), changes, strict=True)
        ]

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages()) if self.growth else super().steps

    @property
    def total(self) -> int:
        """The number of images of all steps."""
        return sum(stage.total for stage in self.stages()) if self.growth else super().total


@dataclass(frozen=True, kw_only=True)
class StageSettings(RunSettings):
    """The settings of ``train_from_observations``: those of a stage, and of the draws between two stages."""

    stages: int = _option(8, "the number of trainings; a run can be continued with more", low=1)
    sampler: Callable[[ScoreNet], Sampler] | None = _option(
        None,
        "a function that makes the sampler of the posteriors from a network; None is DPM-Solver++ with 18 levels, "
        "eta=1 and moment matching",
        object,
    )
    draw_batch: int = _option(64, "the number of draws that a network computes at once", low=1)
    held_out: int | None = _option(
        None, "the number of measurements that are only predicted; None is a tenth, at most 256", int, low=1
    )


_P = ParamSpec("_P")


def with_options(
    options: Callable[_P, RunSettings],
) -> Callable[[Callable[..., ScoreNet]], Callable[Concatenate[ScoreNet, Any, str | os.PathLike[str], _P], ScoreNet]]:
    """Gives a function of (net, data, folder, **options) the signature of the options, and their descriptions.

    The descriptions replace the line of ``**options`` in its docstring.
    """
    declared = fields(cast(Any, options))

    def decorate(function: Any) -> Any:
        own = inspect.signature(function)
        *others, _ = own.parameters.values()
        keywords = [
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in declared
        ]
        function.__signature__ = own.replace(parameters=[*others, *keywords])
        described = []
        for each in declared:
            default = "" if each.default is None else f" (default: {each.default!r})"
            described.append(f"{each.name}: {each.metadata['meaning']}{default}.")
        before, line, after = re.split(r"( +\*\*options: .*\n)", function.__doc__)
        indent = line[: len(line) - len(line.lstrip())]
        lines = TextWrapper(120, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False)
        text = "\n".join(map(lines.fill, described))
        function.__doc__ = f"{before}{text}\n{after}"

        @functools.wraps(function)
        def _checked(*arguments: Any, **options: Any) -> Any:
            if unknown := options.keys() - function.__signature__.parameters.keys():
                name = function.__name__
                raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}. help({name}) lists its options.")
            return function(*arguments, **options)

        return _checked

    return decorate
