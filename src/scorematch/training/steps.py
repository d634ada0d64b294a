r"""The steps of a training run, without files: a batch, its loss, the gradient, AdamW, and the averages of the weights.

A run sees ``images`` images, counted with repetitions. The learning rate and the averages are functions of that number,
and everything random is a function of the seed and of the number i of an image in the run:

===================================  ==================================================================================
which image of the data it is        ``Order``: each epoch is a permutation
its noise, flip and dropped label    a generator seeded for image i, on the CPU, so that every device sees the same
its noise level                      ``levels.uniforms``
dropout, tasks of ``condition``      generators seeded for the first image of each microbatch, on the device
===================================  ==================================================================================

There is thus no state of a generator to save: a run that was killed and continued draws what it would have drawn. With
another number of processes or another microbatch, sums are in another order and the last row draws other numbers; all
else is the same. torch's global generators are given back after each step as the caller left them.

Batches are prepared in a thread of their own, and nothing in a step waits for the device.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from scorematch.loss import dsm_loss
from scorematch.noise import NoiseSchedule
from scorematch.precision import Autocast, autocast
from scorematch.randomness import seed_of
from scorematch.score import ScoreNet
from scorematch.training.data import Order
from scorematch.training.ema import Average, check_length
from scorematch.training.levels import Levels, Weighting, levels_for, uniforms, weighting_for
from scorematch.training.sources import ordered_map

Decay = Literal["cosine", "linear", "constant", "inverse-sqrt"]
Loss = Callable[..., Tensor]
Task = Callable[[Tensor, torch.Generator], Tensor | tuple[Tensor, Tensor]]

_BATCHES_AHEAD = 2  # prepared before they are asked for
# The factor of the learning rate after a share of the run. "inverse-sqrt" is that of EDM2-S, constant for 70,000 of
# 2^20 steps (Karras et al. 2024, Table 6).
_DECAYS: dict[Decay, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
    "inverse-sqrt": lambda share: 1 / math.sqrt(max(1.0, share / 0.07)),
}


class Data(Protocol):
    """Training data, such as ``open_images`` returns.

    Attributes:
        shape: of one sample, (C, H, W) for images.
        fingerprint: tells whether two runs use the same data.
    """

    shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        """The number of samples."""

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples (n, ...), uint8 from 0 to 255 or floating point in the units of the network, and labels (n,).

        It is called from one thread at a time.
        """


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run, beside the network and the data; ``train`` describes each.

    Raises:
        ValueError: for a value out of range.
    """

    # 40 to 100 epochs of the usual small sets. The FID of a network of 16 million parameters on CIFAR-10 was 16 after 5
    # million images, 10 after 10 and 6 after 20 (mini_edm's published curves).
    images: int = 5_000_000
    batch_size: int = 128  # Ho et al. 2020 and Song et al. 2021 for CIFAR-10
    microbatch: int | None = None  # all at once takes the least time
    lr: float = 1e-3  # Karras et al. 2022, Table 7, for CIFAR-10, with a batch of 512
    betas: tuple[float, float] = (0.9, 0.99)  # Karras et al. 2024, Section B: 0.99 rather than 0.999
    eps: float = 1e-8  # Kingma & Ba 2015
    weight_decay: float = 0.0  # none in Ho et al. 2020, Song et al. 2021, Karras et al. 2022
    warmup_images: int | None = None  # 500 steps or a twentieth of the run: published warm-ups are for longer runs
    decay: Decay = "cosine"  # to zero: Loshchilov & Hutter 2017; Karras et al. 2024 show that some decay is needed
    clip: float | None = 1.0  # Ho et al. 2020 and Song et al. 2021, whose losses are means over the values
    ema: tuple[float, ...] = (0.05, 0.10)  # Karras et al. 2024, Section 3.2, from which any length is reconstructed
    levels: Levels | NoiseSchedule | None = None  # Karras et al. 2022, Table 1, or as the row was published
    weighting: Weighting | Callable[[Tensor], Tensor] | None = None  # the same
    p: float = 2  # the square of the error, whose minimum is the score
    loss: Loss | None = None
    precision: Autocast = "auto"  # bfloat16 takes twelve times as long where it is emulated (scorematch.precision)
    flip: bool = True  # Ho et al. 2020, Section B
    label_drop: float = 0.0  # Ho & Salimans 2022 use 0.1 for guidance
    condition: Task | None = None
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "ema", tuple(check_length(length) for length in self.ema))
        for name in ("images", "batch_size", "microbatch", "warmup_images", "seed"):
            value, least = getattr(self, name), 0 if name in ("warmup_images", "seed") else 1
            optional = name in ("microbatch", "warmup_images")
            if not (optional and value is None) and not (_is_integer(value) and value >= least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("lr", "eps", "clip", "p"):
            value = getattr(self, name)
            if not (name == "clip" and value is None) and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to 1, got {self.betas!r}.")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be at least 0 and below 1, got {self.label_drop!r}.")
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay must be one of {', '.join(map(repr, get_args(Decay)))}, got {self.decay!r}.")
        if self.precision not in get_args(Autocast):
            raise ValueError(
                f"precision must be one of {', '.join(map(repr, get_args(Autocast)))}, got {self.precision!r}."
            )
        if len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema must not hold a length twice, got {self.ema!r}.")
        if self.loss is not None and (self.p != 2 or self.weighting is not None):
            raise ValueError("p and weighting belong to the denoising loss, which loss= replaces. Leave them out.")

    @property
    def steps(self) -> int:
        """The number of steps: ``images`` rounded up to whole batches."""
        return -(-self.images // self.batch_size)

    @property
    def total(self) -> int:
        """The number of images that all steps see."""
        return self.steps * self.batch_size

    def rate(self, images: int) -> float:
        """The learning rate of the step that begins after so many images."""
        warmup = min(self.images // 20, 500 * self.batch_size) if self.warmup_images is None else self.warmup_images
        share = images / self.total
        return self.lr * _DECAYS[self.decay](share) * min(1.0, (images + self.batch_size) / max(1, warmup))


class TrainingState:
    """What a run carries from step to step: the network, the optimizer, the averages, and the number of images seen.

    Args:
        net: the network, on the device that it is trained on, in float32 or float64.
        settings: of the run.

    Attributes:
        images: the number of images seen.
        step: the number of steps taken.
        averages: the averages of the weights, in the order of ``settings.ema``.

    Raises:
        TypeError: for weights of half precision.
    """

    def __init__(self, net: ScoreNet, settings: Settings) -> None:
        named = dict(net.named_parameters())
        narrow = next((p.dtype for p in named.values() if p.dtype not in (torch.float32, torch.float64)), None)
        if narrow is not None:
            raise TypeError(
                f"the weights must be float32 to be trained, got {narrow}. Write net.float(); precision= says what the "
                "network computes in."
            )
        self.net = net
        self.images = 0
        self.step = 0
        self.names, self.parameters = list(named), list(named.values())
        device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.parameters if parameter.requires_grad],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda", "mps", "xpu"),
        )
        self.averages = tuple(Average(self.parameters, length) for length in settings.ema)

    def average(self, length: float | None = None) -> ScoreNet:
        """A copy of the network with averaged weights, in eval mode.

        Args:
            length: one of ``settings.ema``; None is the first, or the weights themselves if there is none.

        Raises:
            ValueError: for a length that the run does not keep.
        """
        kept = {average.length: average for average in self.averages}
        if length is not None and length not in kept:
            raise ValueError(f"the run keeps the lengths {', '.join(map(repr, kept)) or 'none'}, got {length!r}.")
        copied = copy.deepcopy(self.net).eval()
        if kept:
            chosen = self.averages[0] if length is None else kept[length]
            with torch.no_grad():
                torch._foreach_copy_(list(copied.parameters()), chosen.tensors)
        return copied.requires_grad_(False)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state: "weights", "optimizer", and "ema-LENGTH" of each average."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        averages = {
            f"ema-{average.name}": dict(zip(self.names, average.tensors, strict=True)) for average in self.averages
        }
        return {"weights": self.net.state_dict(), **averages, "optimizer": moments}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], images: int, step: int) -> None:
        """Continues from tensors that ``tensors`` returned.

        Args:
            tensors: all of them.
            images: the number of images seen until then.
            step: the number of steps until then.
        """
        self.net.load_state_dict(tensors["weights"])
        for average in self.averages:
            for name, own in zip(self.names, average.tensors, strict=True):
                own.copy_(tensors[f"ema-{average.name}"][name])
        self.optimizer.state.clear()
        for name, parameter in zip(self.names, self.parameters, strict=True):
            found = {key: tensors["optimizer"].get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            moments = {key: value.to(parameter.device) for key, value in found.items() if value is not None}
            if moments:  # with the memory layout of the parameter, as the optimizer made them
                self.optimizer.state[parameter] = {
                    key: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                    for key, value in moments.items()
                }
        self.images, self.step = images, step


class Step(NamedTuple):
    """What one step leaves; tensors are on the device, and reading one waits for it.

    Attributes:
        images: seen so far, over all processes.
        losses: of each image of this process, (n,).
        sigma: the noise levels of these images, (n,).
        lr: the learning rate.
        state: of the run.
    """

    images: int
    losses: Tensor
    sigma: Tensor
    lr: float
    state: TrainingState

    @property
    def loss(self) -> Tensor:
        """The mean of the losses, ()."""
        return self.losses.mean()


def train_steps(
    net: ScoreNet,
    data: Data,
    settings: Settings | None = None,
    *,
    state: TrainingState | None = None,
    accelerator: Any = None,
) -> Generator[Step, None, None]:
    """Trains a network, and yields after each step, when the optimizer and the averages have moved.

    Nothing is written, nothing is printed, and no loss is looked at: a NaN does not stop the loop. To continue a run,
    pass the state of its last step.

    Args:
        net: the network. It is moved to the device, and its weights are changed.
        data: from ``open_images``, or an object with the same ``shape``, ``fingerprint``, length and ``read``.
        settings: None are the defaults.
        state: of an earlier step of the same run; None begins a run.
        accelerator: an ``accelerate.Accelerator``; None makes one.

    Returns:
        An iterator of ``Step``. The arguments are checked at the call.

    Raises:
        ImportError: without Accelerate.
        TypeError, ValueError: for arguments that do not fit together.

    Example:
        >>> from scorematch.training import open_images
        >>> data = open_images(torch.rand(64, 1, 8, 8))
        >>> net = ScoreNet.unet(1, 8, widths=(8, 8))
        >>> for step in train_steps(net, data, Settings(images=64, batch_size=16)):
        ...     pass
        >>> step.images, step.state.average(0.05).sample_shape
        (64, (1, 8, 8))
    """
    settings = Settings() if settings is None else settings
    accelerator = make_accelerator(accelerator)
    check_arguments(net, data, settings, accelerator.num_processes)
    if state is None:
        state = prepare(net, settings, accelerator)
    elif state.net is not net:
        raise ValueError("state belongs to another network. Pass net=state.net.")
    return _steps(net, data, settings, state, accelerator)


def make_accelerator(
    given: Any = None,
    *,
    cpu: bool = False,
    trackers: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
) -> Any:
    """An accelerator, checked: the given one, or a new one.

    Args:
        given: an ``accelerate.Accelerator``; None makes one.
        cpu: whether a new one computes on the CPU even where there is a GPU.
        trackers: of a new one, such as "tensorboard".
        folder: where trackers write.

    Raises:
        ImportError: without Accelerate.
        ValueError: for one with mixed precision, which ``precision=`` is for, or one that does not know of the other
            processes that were launched.
    """
    if given is None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError('training needs Accelerate: pip install "scorematch[train]".') from error
        # Processes without a GPU find each other only if the CPU was asked for.
        cpu = cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())
        given = Accelerator(mixed_precision="no", cpu=cpu, log_with=list(trackers) or None, project_dir=folder)
    if given.mixed_precision != "no":
        raise ValueError(
            f'accelerator must have mixed_precision="no", got {given.mixed_precision!r}. Write precision="bfloat16" '
            "instead."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != given.num_processes:  # each would train alone, and write to the same files
        raise ValueError(
            f"{launched} processes were launched, but accelerator has {given.num_processes}. On a CPU write "
            "Accelerator(cpu=True)."
        )
    return given


def prepare(net: ScoreNet, settings: Settings, accelerator: Any) -> TrainingState:
    """The state of a new run: the network on its device, the same in all processes, in the fastest memory layout."""
    net.to(accelerator.device)
    if accelerator.num_processes > 1:
        for tensor in net.state_dict().values():
            whole = tensor.contiguous()
            torch.distributed.broadcast(whole, 0)
            tensor.copy_(whole)
    if _channels_last(net, accelerator.device):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # of 4-d tensors
    if settings.compile:
        net.backbone.compile()
    return TrainingState(net, settings)


# -- Checks -----------------------------------------------------------------------------------------------------------


def check_arguments(net: ScoreNet, data: Data, settings: Settings, processes: int) -> None:
    """Raises if the arguments do not fit together, before anything is computed."""
    if not isinstance(net, ScoreNet):
        raise TypeError(f"net must be a ScoreNet, got {type(net).__name__}. Write ScoreNet(backbone, schedule).")
    if net.sample_shape is not None and tuple(data.shape) != net.sample_shape:
        raise ValueError(
            f"the data have samples of shape {tuple(data.shape)}, but the sample_shape of the network is "
            f"{net.sample_shape}."
        )
    if len(data) < settings.batch_size:
        raise ValueError(
            f"the data have {len(data)} images, fewer than batch_size={settings.batch_size}. Write a batch_size of at "
            f"most {len(data)}."
        )
    if settings.batch_size % processes:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {processes}, got {settings.batch_size}."
        )
    levels_for(net, settings.levels)
    weighting_for(net, settings.weighting, settings.p)
    takes = net.conditioning
    if settings.condition is not None and takes is not None and takes.channels == 0:
        raise ValueError(
            "condition makes an image, which the network does not take. Write ScoreNet.unet(condition_channels=)."
        )
    if takes is not None and takes.channels > 0 and settings.condition is None:
        raise ValueError(
            f"the network takes an image of {takes.channels} channels as its condition. Pass condition=, such as "
            "scorematch.palette.Colorization()."
        )
    classes = _classes(net, settings)
    if settings.label_drop > 0 and classes is None:
        raise ValueError("label_drop needs a class-conditional network. Write ScoreNet.unet(classes=).")
    if classes is not None:
        _check_labels(data.read(torch.arange(1))[1], classes, settings.label_drop)


def _classes(net: ScoreNet, settings: Settings) -> int | None:
    """The number of classes of a network that is trained with labels, or None."""
    takes = net.conditioning
    return None if takes is None or settings.condition is not None else takes.classes


def _check_labels(labels: Tensor | None, classes: int, label_drop: float) -> None:
    if labels is None:
        raise ValueError("the network is class-conditional, but the data have no labels. Open them with labels=True.")
    known = classes - (label_drop > 0)
    wrong = labels[(labels < 0) | (labels >= known)]
    if len(wrong) and label_drop > 0:
        raise ValueError(
            f"with label_drop the last class of the network means that there is no label, so that labels are from 0 to "
            f"{known - 1}, got {int(wrong[0])}. Build the network with one class more, such as "
            f"ScoreNet.unet(classes={classes + 1})."
        )
    if len(wrong):
        raise ValueError(f"the network knows the classes 0 to {known - 1}, got the label {int(wrong[0])}.")


# -- The loop ---------------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """What one process computes in one step, on the CPU."""

    first: int  # the number of its first image in the run
    x: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor | None

    def part(self, begin: int, end: int, device: torch.device, memory: torch.memory_format) -> _Batch:
        """A microbatch, on the device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor[begin:end].to(device, non_blocking=True)

        x = move(self.x)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return _Batch(
            self.first + begin,
            x.contiguous(memory_format=memory),
            move(self.noise).contiguous(memory_format=memory),
            move(self.sigma),
            None if self.labels is None else move(self.labels),
        )


def _steps(
    net: ScoreNet, data: Data, settings: Settings, state: TrainingState, accelerator: Any
) -> Generator[Step, None, None]:
    device: torch.device = accelerator.device
    model = accelerator.prepare_model(net)
    local = settings.batch_size // accelerator.num_processes
    size = min(local, settings.microbatch or local)
    parts = [(begin, min(local, begin + size)) for begin in range(0, local, size)]
    images = len(data.shape) == 3 and _channels_last(net, device)
    memory = torch.channels_last if images else torch.contiguous_format
    loss = settings.loss or partial(
        dsm_loss, p=settings.p, weighting=weighting_for(net, settings.weighting, settings.p), reduction="none"
    )
    trained = [parameter for parameter in state.parameters if parameter.requires_grad]
    batches = _batches(data, settings, levels_for(net, settings.levels), _classes(net, settings), state, accelerator)
    try:
        for batch in batches:
            lr = settings.rate(state.images)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            losses, sigmas = [], []
            with global_generators(device) as seed:
                net.train()
                for begin, end in parts:
                    part = batch.part(begin, end, device, memory)
                    seed(seed_of(settings.seed, "step", part.first))
                    with nullcontext() if end == local else accelerator.no_sync(model):
                        with autocast(device, settings.precision):
                            each = loss(model, part.x, sigma=part.sigma, noise=part.noise, **_given(part, settings))
                        if each.shape != part.sigma.shape:
                            raise ValueError(
                                f"loss must return one value per image, {tuple(part.sigma.shape)}, got shape "
                                f'{tuple(each.shape)}. Write reduction="none".'
                            )
                        accelerator.backward(each.sum() / local)
                    losses.append(each.detach())
                    sigmas.append(part.sigma)
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, settings.clip * math.prod(data.shape) / 2)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.images += settings.batch_size
            state.step += 1
            for average in state.averages:
                average.update(state.parameters, state.step)
            whole = (losses[0], sigmas[0]) if len(parts) == 1 else (torch.cat(losses), torch.cat(sigmas))
            yield Step(state.images, *whole, lr, state)
    finally:
        batches.close()


def _given(part: _Batch, settings: Settings) -> dict[str, Tensor]:
    """The condition, and the region where the loss counts, of the images that have them."""
    if settings.condition is None:
        return {} if part.labels is None else {"condition": part.labels}
    generator = torch.Generator(part.x.device).manual_seed(seed_of(settings.seed, "condition", part.first))
    made = settings.condition(part.x, generator)
    return {"condition": made} if isinstance(made, Tensor) else {"condition": made[0], "region": made[1]}


def _batches(
    data: Data, settings: Settings, levels: Levels, classes: int | None, state: TrainingState, accelerator: Any
) -> Generator[_Batch, None, None]:
    """The batches of this process from now to the end of the run, prepared in a thread."""
    local = settings.batch_size // accelerator.num_processes
    pinned = accelerator.device.type == "cuda"
    order, generator = Order(len(data), settings.seed), torch.Generator()

    def make(first: int) -> _Batch:
        x, labels = data.read(order(first, first + local))
        noise = torch.empty(local, *data.shape, dtype=x.dtype if x.is_floating_point() else torch.float32)
        chances = []
        for i, z in enumerate(noise, first):
            generator.manual_seed(seed_of(settings.seed, "image", i))
            chances.append(torch.rand(2, generator=generator))
            z.normal_(generator=generator)
        flip, drop = torch.stack(chances).unbind(1)
        if settings.flip and x.ndim == 4:
            x = torch.where((flip < 0.5)[:, None, None, None], x.flip(3), x)
        if classes is None:
            labels = None
        else:
            _check_labels(labels, classes, settings.label_drop)
            labels = labels if labels is None else torch.where(drop < settings.label_drop, classes - 1, labels)
        sigma = levels.quantile(uniforms(settings.seed, first, first + local)).to(noise.dtype)
        if pinned:
            x, noise, sigma = x.pin_memory(), noise.pin_memory(), sigma.pin_memory()
            labels = labels if labels is None else labels.pin_memory()
        return _Batch(first, x, noise, sigma, labels)

    own = accelerator.process_index * local
    return ordered_map(
        make, range(state.images + own, settings.total, settings.batch_size), workers=1, ahead=_BATCHES_AHEAD
    )


@contextmanager
def global_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Lends torch's global generators, of the CPU and of the device: a function that seeds both."""
    modules = [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]
    states = [module.get_rng_state() for module in modules]

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)
        for module in modules[1:]:
            module.manual_seed(value)

    try:
        yield seed
    finally:
        for module, state in zip(modules, states, strict=True):
            module.set_rng_state(state)


def _channels_last(net: ScoreNet, device: torch.device) -> bool:
    """Whether convolutions are faster with the channels last."""
    return device.type != "cuda" or net.family is None or net.family.channels_last_on_cuda


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
