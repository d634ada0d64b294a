r"""The training loop, without files: batches, the loss, gradients, AdamW, and averages of the weights.

The length of a run is a number of images, counted with repetitions. The learning rate and the averages depend on the
number of images seen. All random numbers depend on the seed and on the number i of an image in the run:

===================================  ==================================================================================
index of image i in the data         ``Order``: each epoch is a permutation
its noise, flip and dropped label    a generator seeded for image i, on the CPU, so that they are equal on all devices
its noise level                      ``levels.uniforms``
dropout, tasks of ``condition``      generators seeded for the first image of each microbatch, on the device
===================================  ==================================================================================

Therefore the states of generators need not be saved: a run that continues after an interruption draws the same numbers
as without it. With another number of processes or another microbatch, sums are computed in another order and the
numbers of the last row differ; the others are equal. The state of torch's global generators is restored after each
step.

Batches are prepared in a separate thread, and a step does not synchronize with the device.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_choice, check_count
from scorematch.core.messages import quote
from scorematch.core.precision import Autocast, autocast
from scorematch.core.randomness import seed_of
from scorematch.data.cache import ImageData, Order
from scorematch.data.pictures import to_float
from scorematch.data.sources import ordered_map
from scorematch.loss import dsm_loss
from scorematch.noise import NoiseSchedule
from scorematch.score import ScoreNet
from scorematch.training.ema import Average, check_length
from scorematch.training.levels import Levels, Weighting, check_levels, levels_for, uniforms, weighting_for

Decay = Literal["cosine", "linear", "constant", "inverse-sqrt"]
Loss = Callable[..., Tensor]
Task = Callable[[Tensor, torch.Generator], Tensor | tuple[Tensor, Tensor]]

_BATCHES_AHEAD = 2  # the number of batches that are prepared in advance
# The factor of the learning rate as a function of the completed fraction of the run. "inverse-sqrt" is that of EDM2-S,
# which is constant for 70,000 of 2^20 steps (Karras et al. 2024, Table 6).
_DECAYS: dict[Decay, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
    "inverse-sqrt": lambda share: 1 / math.sqrt(max(1.0, share / 0.07)),
}


class Data(Protocol):
    """The interface of training data, which ``ImageData`` implements.

    Attributes:
        shape: the shape of one sample, (C, H, W) for images.
        fingerprint: a string that identifies the data.
    """

    shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        """The number of samples."""

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads samples by index. It is called from one thread at a time.

        Args:
            indices: int64 (n,), from 0 to ``len(self) - 1``.

        Returns:
            The samples (n, ...), uint8 from 0 to 255, or floating point in the units of the network; and their labels
            (n,), int64, or None.
        """


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the fields are the arguments of ``train`` of the same names, which are described there.

    Raises:
        TypeError: if a value has another type.
        ValueError: if a value is out of range.
    """

    # 40 to 100 epochs of common small data sets. The FID of a network with 16 million parameters on CIFAR-10 was 16
    # after 5 million images, 10 after 10 million and 6 after 20 million (mini_edm's published curves).
    images: int = 5_000_000
    batch_size: int = 128  # Ho et al. 2020 and Song et al. 2021 for CIFAR-10
    microbatch: int | None = None  # the whole batch at once is fastest
    lr: float = 1e-3  # Karras et al. 2022, Table 7, for CIFAR-10, with a batch of 512
    betas: tuple[float, float] = (0.9, 0.99)  # Karras et al. 2024, Appendix B: 0.99 rather than 0.999
    eps: float = 1e-8  # Kingma & Ba 2015
    weight_decay: float = 0.0  # none in Ho et al. 2020, Song et al. 2021, Karras et al. 2022
    warmup_images: int | None = None  # 500 steps or a twentieth of the run: published warm-ups are for longer runs
    decay: Decay = "cosine"  # to zero: Loshchilov & Hutter 2017; Karras et al. 2024 show that some decay is needed
    clip: float | None = 1.0  # Ho et al. 2020 and Song et al. 2021, whose losses are means over the values
    ema: Sequence[float] = (0.05, 0.10)  # Karras et al. 2024, Section 3.2, from which any length is reconstructed
    levels: Levels | NoiseSchedule | None = None  # Karras et al. 2022, Table 1, or as the row was published
    weighting: Weighting | Callable[[Tensor], Tensor] | None = None  # the same
    p: float = 2  # the square of the error, whose minimum is the score
    loss: Loss | None = None
    precision: Autocast = "auto"  # emulated bfloat16 takes twelve times as long (scorematch.core.precision)
    flip: bool = True  # Ho et al. 2020, Appendix B
    label_drop: float = 0.0  # Ho & Salimans 2022 use 0.1 for guidance
    condition: Task | None = None
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # a number of NumPy, which JSON does not have
                object.__setattr__(self, field.name, value.item())
        for name in ("betas", "ema"):
            value = getattr(self, name)
            if not isinstance(value, Iterable) or isinstance(value, str):
                raise TypeError(f"{name} must be a tuple of numbers, such as {getattr(Settings, name)}, got {value!r}.")
        for name, value in self._numbers("lr", "eps", "clip", "p", "weight_decay", "label_drop"):
            if not isinstance(value, Real):
                raise TypeError(f"{argument(name)} must be a number, got {value!r}.")
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "ema", tuple(check_length(length) for length in self.ema))
        for name in ("flip", "compile"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}.")
        for name, value in self._numbers("images", "batch_size", "microbatch"):
            check_count(name, value)
        for name, value in self._numbers("warmup_images", "seed"):
            check_count(name, value, 0)
        for name, value in self._numbers("lr", "eps", "clip"):
            if not 0 < value < math.inf:
                raise ValueError(f"{argument(name)} must be positive, got {value!r}.")
        if not 1 <= self.p < math.inf:
            raise ValueError(f"p must be at least 1, got {self.p!r}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers, at least 0 and below 1, got {self.betas!r}.")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"{argument('label_drop')} must be at least 0 and below 1, got {self.label_drop!r}.")
        if self.condition is not None and (not callable(self.condition) or isinstance(self.condition, type)):
            raise TypeError(
                f"condition must be callable as task(x, generator), such as Colorization(), got {self.condition!r}."
            )
        if self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss must be a function, such as dsm_loss, got {self.loss!r}.")
        check_choice("decay", self.decay, get_args(Decay))
        check_choice("precision", self.precision, get_args(Autocast))
        if len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema must not contain a length twice, got {self.ema!r}.")
        if self.loss is not None and (self.p != 2 or self.weighting is not None):
            raise ValueError("p and weighting apply to the default loss only. Leave them out, or leave out loss=.")

    def _numbers(self, *names: str) -> Iterator[tuple[str, Any]]:
        """The names and the values of fields, except None where a field may be None."""
        for name in names:
            value = getattr(self, name)
            if value is not None or name not in ("microbatch", "warmup_images", "clip"):
                yield name, value

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


class TrainingState:
    """The state of a run after a step: the network, the optimizer, the averages, and the number of images seen.

    Args:
        net: the network, in float32 or float64, on the device for the training.
        settings: the settings of the run.

    Attributes:
        images: the number of images seen.
        step: the number of steps taken.
        averages: the averages of the weights, in the order of ``settings.ema``.

    Raises:
        TypeError: if a weight is neither float32 nor float64.
    """

    def __init__(self, net: ScoreNet, settings: Settings) -> None:
        named = dict(net.named_parameters())
        narrow = next((p.dtype for p in named.values() if p.dtype not in (torch.float32, torch.float64)), None)
        if narrow is not None:
            raise TypeError(
                f"the weights must be float32 for training, got {narrow}. Write net.float(); precision= sets the dtype "
                "of the computations."
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
            length: one of ``settings.ema``; None is the first, or the current weights if there are no averages.

        Raises:
            ValueError: if ``length`` is not in ``settings.ema``.
        """
        kept = {average.length: average for average in self.averages}
        if length is not None and length not in kept:
            raise ValueError(f"length must be one of settings.ema, {tuple(kept)}, got {length!r}.")
        copied = copy.deepcopy(self.net).eval()
        if kept:
            chosen = self.averages[0] if length is None else kept[length]
            with torch.no_grad():
                torch._foreach_copy_(list(copied.parameters()), chosen.tensors)
        return copied.requires_grad_(False)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state by name, in the groups "weights", "optimizer", and "ema-LENGTH" for each average."""
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
        """Loads a state.

        Args:
            tensors: the result of ``tensors``.
            images: the number of images seen.
            step: the number of steps taken.
        """
        self.net.load_state_dict(tensors["weights"])
        for average in self.averages:
            for name, own in zip(self.names, average.tensors, strict=True):
                own.copy_(tensors[f"ema-{average.name}"][name])
        self.optimizer.state.clear()
        for name, parameter in zip(self.names, self.parameters, strict=True):
            found = {key: tensors["optimizer"].get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            moments = {key: value.to(parameter.device) for key, value in found.items() if value is not None}
            if moments:  # in the memory format of the parameter, in which the optimizer creates them
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in moments.items()
                }
        self.images, self.step = images, step


class Step(NamedTuple):
    """The result of one step. Tensors are on the device; reading their values synchronizes with it.

    Attributes:
        images: the number of images seen so far, over all processes.
        losses: the loss of each image of this process, (n,).
        sigma: the noise levels of these images, (n,), in the units of the data.
        lr: the learning rate of the step.
        state: the state of the run.
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
    """Trains a network, and yields after each step, once the weights and their averages are updated.

    Nothing is written or printed, and losses are not checked: a NaN does not stop the loop. To continue a run, pass the
    state of its last step.

    Args:
        net: the network. It is moved to the device, and its weights are changed.
        data: the result of ``open_images``, or an object with the same ``shape``, ``fingerprint``, length and ``read``.
        settings: the settings of the run; None is ``Settings()``.
        state: the state of an earlier step of the same run; None starts a new run.
        accelerator: an ``accelerate.Accelerator``; None creates one.

    Returns:
        An iterator of ``Step``. The arguments are checked at the call, before the first step.

    Raises:
        ImportError: without Accelerate.
        TypeError, ValueError: if arguments do not fit together.

    Example:
        >>> from scorematch.data import open_images
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
    """Checks the given accelerator, or creates one.

    Args:
        given: an ``accelerate.Accelerator``; None creates one.
        cpu: whether a new accelerator uses the CPU even if there is a GPU.
        trackers: the names of the trackers of a new accelerator, such as "tensorboard".
        folder: the folder to which trackers write.

    Raises:
        ImportError: without Accelerate, or the package of a tracker.
        ValueError: if the accelerator uses mixed precision, for which there is ``precision=``, or DeepSpeed, FSDP or
            Megatron-LM, or its number of processes is not the number of launched processes.
    """
    if given is None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError('training needs Accelerate: pip install "scorematch[train]".') from error
        # Without a GPU, Accelerate creates a process group only with cpu=True.
        cpu = cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no supported trackers are currently installed")  # an error below
            given = Accelerator(mixed_precision="no", cpu=cpu, log_with=list(trackers) or None, project_dir=folder)
        missing = [] if "all" in trackers else [name for name in trackers if name not in map(str, given.log_with)]
        if missing:  # Accelerate would leave it out
            raise ImportError(f"the tracker {missing[0]} is not installed: pip install {missing[0]}.")
    if given.mixed_precision != "no":
        raise ValueError(
            f'accelerator must have mixed_precision="no", got {given.mixed_precision!r}. Write precision="bfloat16" '
            "instead."
        )
    if not given.distributed_type.startswith(("NO", "MULTI")):  # the gradients of the processes would not be averaged
        raise ValueError(
            "the network is trained with DistributedDataParallel, but accelerator uses "
            f"{given.distributed_type.value}. Run accelerate config again, without DeepSpeed, FSDP and Megatron-LM."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != given.num_processes:  # each process would train on its own and write to the same files
        raise ValueError(
            f"{launched} processes were launched, but accelerator has {given.num_processes}. On a CPU write "
            "Accelerator(cpu=True)."
        )
    return given


def prepare(net: ScoreNet, settings: Settings, accelerator: Any) -> TrainingState:
    """Creates the state of a new run.

    The network is moved to the device and converted to the fastest memory format; all processes get the weights of the
    first.
    """
    net.to(accelerator.device)
    if accelerator.num_processes > 1:
        for tensor in net.state_dict().values():
            whole = tensor.contiguous()
            torch.distributed.broadcast(whole, 0)
            tensor.copy_(whole)
    if _channels_last(net, accelerator.device):
        for parameter in net.parameters():  # net.to would also convert the weights of 3-d convolutions, and fail
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    if settings.compile:
        net.backbone.compile(dynamic=False)  # one graph per shape, whichever shape came first in this process
    return TrainingState(net, settings)


# -- Checks -----------------------------------------------------------------------------------------------------------


def check_network(net: object) -> None:
    """Raises TypeError if an object is not a ScoreNet."""
    if not isinstance(net, ScoreNet):
        raise TypeError(f"net must be a ScoreNet, got {type(net).__name__}. Write ScoreNet(backbone, schedule).")


def check_arguments(net: ScoreNet, data: Data, settings: Settings, processes: int) -> None:
    """Checks that the network, the data and the settings fit together.

    Raises:
        TypeError, ValueError: if they do not.
    """
    check_network(net)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("the network has no trainable weights. Write net.requires_grad_(True).")
    if not hasattr(data, "fingerprint"):
        raise TypeError(f"data must be the result of open_images, got {type(data).__name__}. Write open_images(data).")
    if net.sample_shape is not None and tuple(data.shape) != net.sample_shape:
        raise ValueError(
            f"the data must have samples of the network's sample_shape, {net.sample_shape}, got {tuple(data.shape)}."
        )
    if len(data) < settings.batch_size:
        raise ValueError(
            f"the data have {len(data)} images, fewer than a batch of {settings.batch_size}. Pass "
            f"{argument('batch_size', len(data))} or less."
        )
    if settings.batch_size % processes:
        raise ValueError(
            f"{argument('batch_size')} must be a multiple of the number of processes, {processes}, got "
            f"{settings.batch_size}."
        )
    check_levels(levels_for(net, settings.levels))
    weighting_for(net, settings.weighting, settings.p)
    takes = net.conditioning
    if settings.condition is not None and takes is not None and takes.channels == 0:
        raise ValueError(
            "condition= is for networks that take an image as their condition, which net does not. Write "
            "ScoreNet.unet(condition_channels=...)."
        )
    if takes is not None and takes.channels > 0 and settings.condition is None:
        raise ValueError(
            f"the network takes an image of {takes.channels} channels as its condition. Pass condition=, such as "
            "scorematch.restoration.palette.Colorization()."
        )
    classes = _classes(net, settings)
    if settings.label_drop > 0 and not (classes is not None and takes is not None and takes.null_class):
        raise ValueError(
            "label_drop needs a network with a null class, which replaces the dropped labels. Write "
            "ScoreNet.unet(classes=..., null_class=True), or leave out label_drop."
        )
    if classes is not None:
        _check_labels(data.labels if isinstance(data, ImageData) else data.read(torch.arange(1))[1], classes)


def _classes(net: ScoreNet, settings: Settings) -> int | None:
    """The number of classes of a network that is trained with labels, with the null class, or None."""
    takes = net.conditioning
    if takes is None or takes.classes is None or settings.condition is not None:
        return None
    return takes.classes + takes.null_class


def _check_labels(labels: Tensor | None, classes: int) -> None:
    if labels is None:
        raise ValueError("the network is class-conditional, but the data have no labels. Open them with labels=True.")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"labels must be classes of the network, from 0 to {classes - 1}, got {int(wrong.max())}.")


# -- The loop ---------------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """The batch of one process for one step, or a part of it."""

    first: int  # the number of the first image in the run
    x: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor | None

    def part(self, begin: int, end: int, device: torch.device, memory: torch.memory_format) -> _Batch:
        """The images ``begin`` to ``end - 1`` of the batch, or to its end if it has fewer, on the device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor[begin:end].to(device, non_blocking=True)

        return _Batch(
            self.first + begin,
            to_float(move(self.x)).contiguous(memory_format=memory),
            move(self.noise).contiguous(memory_format=memory),
            move(self.sigma),
            None if self.labels is None else move(self.labels),
        )


def _steps(
    net: ScoreNet, data: Data, settings: Settings, state: TrainingState, accelerator: Any
) -> Generator[Step, None, None]:
    model = accelerator.prepare_model(net)
    images = len(data.shape) == 3 and _channels_last(net, accelerator.device)
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
            net.train()
            losses, sigmas = _backward(batch, model, loss, settings, memory, accelerator)
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, settings.clip * math.prod(data.shape) / 2)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.images += settings.batch_size
            state.step += 1
            for average in state.averages:
                average.update(state.parameters, state.step)
            yield Step(state.images, losses, sigmas, lr, state)
    finally:
        batches.close()


def _backward(
    batch: _Batch,
    model: torch.nn.Module,
    loss: Loss,
    settings: Settings,
    memory: torch.memory_format,
    accelerator: Any,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of the mean loss of a batch to the parameters, one microbatch after the other.

    Returns:
        The losses and the noise levels of the images, each (n,), on the device.
    """
    device: torch.device = accelerator.device
    n = len(batch.x)
    size = settings.microbatch or n
    losses, sigmas = [], []
    with global_generators(device) as seed:
        for begin in range(0, n, size):
            part = batch.part(begin, begin + size, device, memory)
            seed(seed_of(settings.seed, "step", part.first))
            is_last = begin + size >= n  # processes exchange their gradients once, after the last part
            with nullcontext() if is_last else accelerator.no_sync(model):
                with autocast(device, settings.precision):
                    condition_seed = seed_of(settings.seed, "condition", part.first)
                    arguments = loss_arguments(settings, part.x, part.labels, condition_seed)
                    each = loss(model, part.x, sigma=part.sigma, noise=part.noise, **arguments)
                if not isinstance(each, Tensor):
                    raise TypeError(f"loss must return a tensor, one value per image, got {quote(each)}.")
                if each.shape != part.sigma.shape:
                    raise ValueError(
                        f"loss must return one value per image, {tuple(part.sigma.shape)}, got shape "
                        f'{tuple(each.shape)}. Write reduction="none".'
                    )
                (each.sum() / n).backward()  # accelerator.backward may divide the loss once more
            losses.append(each.detach())
            sigmas.append(part.sigma)
    return torch.cat(losses), torch.cat(sigmas)


def loss_arguments(settings: Settings, x: Tensor, labels: Tensor | None, seed: int) -> dict[str, Any]:
    """The condition of images and the region where the loss counts, as arguments of the loss, if there are any.

    Args:
        settings: the settings of the run, with the task that computes the condition, if there is one.
        x: the clean images (n, ...), on the device.
        labels: the labels (n,), which are the condition without a task, or None.
        seed: the seed of the task.

    Raises:
        TypeError: if the task returns something else.
    """
    if settings.condition is None:
        return {} if labels is None else {"condition": labels.to(x.device)}
    # A copy, so that a task that writes into its argument does not change the images that the network learns.
    made: Any = settings.condition(x.clone(), torch.Generator(x.device).manual_seed(seed))
    made = (made, None) if isinstance(made, Tensor) else made
    if not (isinstance(made, tuple | list) and len(made) == 2):
        raise TypeError(f"condition= must return a tensor or (condition, region), got {quote(made)}.")
    return {name: value for name, value in zip(("condition", "region"), made, strict=True) if value is not None}


def _batches(
    data: Data, settings: Settings, levels: Levels, classes: int | None, state: TrainingState, accelerator: Any
) -> Generator[_Batch, None, None]:
    """The batches of this process until the end of the run, prepared in a thread."""
    local = settings.batch_size // accelerator.num_processes
    pinned = accelerator.device.type == "cuda"
    order, generator = Order(len(data), settings.seed), torch.Generator()

    def make(first: int) -> _Batch:
        x, labels = data.read(order(first, first + local))
        noise = torch.empty(local, *data.shape, dtype=x.dtype if x.is_floating_point() else torch.float32)
        chances = []
        for i, z in enumerate(noise, first):
            generator.manual_seed(seed_of(settings.seed, "image", i))
            chances.append(torch.rand(2, generator=generator, dtype=torch.float32))
            z.normal_(generator=generator)
        flip, drop = torch.stack(chances).unbind(1)
        if settings.flip and x.ndim == 4:
            x = torch.where((flip < 0.5)[:, None, None, None], x.flip(3), x)
        if classes is None:
            labels = None
        else:
            _check_labels(labels, classes)
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
    """Restores torch's global generators of the CPU and of the device on exit; yields a function that seeds both."""
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
    """Whether to train in the channels_last memory format."""
    return device.type != "cuda" or net.family is None or net.family.channels_last_on_cuda
