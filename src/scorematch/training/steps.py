r"""The training loop, without files: batches and their noise, the loss, gradients, the optimizer, and averages.

The length of a run is a number of images, counted with repetitions. The learning rate and the averages depend on the
number of images seen. All random numbers depend on the seed and on the number i of an image in the run:

===================================  ==================================================================================
index of image i in the data         ``Order``: each epoch is a permutation
its noise, changes, dropped label    a generator seeded for image i, on the CPU, so that they are equal on all devices
its noise level                      ``levels.uniforms``
dropout, tasks of ``condition``      generators seeded for the first image of each microbatch, on the device
===================================  ==================================================================================

Therefore the states of generators need not be saved: a run that continues after an interruption draws the same numbers
as without it. With another number of processes or another microbatch, sums are computed in another order and the
numbers of the last row differ; the others are equal. The state of torch's global generators is restored after each
step.

In float16 small gradients would be rounded to zero. The loss is therefore multiplied by a scale, and the gradient is
divided by it (``torch.amp.GradScaler``). If a gradient is infinite, the step does not change the weights, and the scale
is halved; after 2,000 finite steps it is doubled.

Batches are prepared in a separate thread, and a step does not synchronize with the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.conditions import Parts, map_parts, without
from scorematch.core.messages import quote
from scorematch.core.precision import autocast
from scorematch.core.randomness import seed_of
from scorematch.core.threads import ordered_map
from scorematch.data.array_data import ArrayData, check_finite, has_sides
from scorematch.data.images import Data
from scorematch.data.pictures import to_float
from scorematch.loss import dsm_loss
from scorematch.nets.blocks import AugmentationEmbedding, begin_null
from scorematch.score import ScoreNet
from scorematch.training import nonleaking
from scorematch.training.accelerator import global_generators, make_accelerator
from scorematch.training.augment import augmentations, augmented
from scorematch.training.checks import check_arguments, check_condition, condition_of_data, given_of
from scorematch.training.ema import Average
from scorematch.training.levels import levels_for, uniforms, weighting_for
from scorematch.training.muon import Muon, matrices
from scorematch.training.norms import FixedNorms
from scorematch.training.settings import Loss, Settings
from scorematch.training.units import take_units

_BATCHES_AHEAD = 2  # the number of batches that are prepared in advance


class Order:
    """The order of the images in a run: each epoch is a random permutation of all images that depends on the seed.

    Image i of a run does not depend on the batch size, the number of processes, or interruptions. ``order(start,
    stop)`` returns the indices in the data of the images start to stop - 1 of the run.

    Args:
        length: the number of images in the data, at least 1.
        seed: the seed of the run.

    Example:
        >>> order = Order(5, seed=0)
        >>> sorted(order(0, 5).tolist()), bool((order(3, 8)[:2] == order(0, 5)[3:]).all())
        ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, length: int, seed: int) -> None:
        check_count("length", length)
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, start: int, stop: int) -> Tensor:
        """The indices in the data of the images ``start`` to ``stop - 1`` of the run, int64 (stop - start,)."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.length)
            last = min(self.length, first + stop - start)
            parts.append(self._permutation_of(epoch)[first:last])
            start += last - first
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def _permutation_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator, device="cpu")
        return self._permutation


class TrainingState:
    """The state of a run after a step: the network, the optimizer, the averages, and the number of images seen.

    Args:
        net: the network, in float32 or float64, on the device for the training.
        settings: the settings of the run.

    Attributes:
        images: the number of images seen.
        step: the number of steps taken.
        first: the number of images seen when the stage of the run began, 0 without stages.
        averages: the averages of the weights, in the order of ``settings.ema``.
        augmentation: the layer that tells the network of changes of its images, or None. It is a part of the network
            during its training, and not of its averages.
    """

    def __init__(self, net: ScoreNet, settings: Settings) -> None:
        told = getattr(net.backbone, "augmentation", None)  # a backbone of the user's may have another one
        self.augmentation = told if isinstance(told, AugmentationEmbedding) else None
        named = dict(net.named_parameters())
        narrow = next((p.dtype for p in named.values() if p.dtype not in (torch.float32, torch.float64)), None)
        if narrow is not None:
            raise TypeError(
                f"the weights must be float32 for training, got {narrow}. Write net.float(); precision= sets the dtype "
                "of the computations."
            )
        self.net = net
        self.images = self.first = 0
        self.step = 0
        self.names, self.parameters = list(named), list(named.values())
        device = self.parameters[0].device
        of_layers = {id(weight) for weight in matrices(net)}
        layers = {name: parameter for name, parameter in named.items() if id(parameter) in of_layers}
        self.fixed = FixedNorms(layers if settings.fixed_norms else {})
        adamw = torch.optim.AdamW if settings.optimizer == "adamw" else partial(Muon, matrices=layers.values())
        self.optimizer = adamw(
            [parameter for parameter in self.parameters if parameter.requires_grad],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda", "mps", "xpu"),
        )
        self.averages = tuple(Average(self.parameters, length) for length in settings.ema)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")

    @property
    def skipped(self) -> int:
        """The number of steps whose gradient was not finite in float16, so that the weights did not change."""
        counts = [each["step"] for each in self.optimizer.state.values()]  # of the others
        return self.step - (int(torch.stack(counts).max()) if counts else 0)

    def average(self, length: float | None = None) -> ScoreNet:
        """A copy of the network with averaged weights, in eval mode.

        Args:
            length: one of ``settings.ema``; None is the first, or the current weights if there are no averages.
        """
        kept = {average.length: average for average in self.averages}
        if length is not None and length not in kept:
            raise ValueError(f"length must be one of settings.ema, {tuple(kept)}, got {length!r}.")
        copied = copy.deepcopy(self.net).eval()
        if self.augmentation is not None:
            copied.backbone.register_module("augmentation", None)
        if kept:
            chosen = self.averages[0] if length is None else kept[length]
            own = dict(zip(self.names, chosen.tensors, strict=True))
            with torch.no_grad():
                torch._foreach_copy_(list(copied.parameters()), [own[name] for name, _ in copied.named_parameters()])
        return copied.requires_grad_(False)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state by name, in groups.

        The groups are "weights", "optimizer", "ema-LENGTH" for each average, "norms" with fixed norms, and "scaler" in
        float16.
        """
        moments = {
            f"{name}.{key}": value
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        averages = {
            f"ema-{average.name}": dict(zip(self.names, average.tensors, strict=True)) for average in self.averages
        }
        scaler = {name: torch.tensor(value, device="cpu") for name, value in self.scaler.state_dict().items()}
        return {
            "weights": self.net.state_dict(),
            **averages,
            "optimizer": moments,
            **({"norms": self.fixed.norms} if self.fixed.norms else {}),
            **({"scaler": scaler} if scaler else {}),
        }

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
            keys = ("step", "exp_avg", "exp_avg_sq", "momentum")
            found = {key: tensors["optimizer"].get(f"{name}.{key}") for key in keys}
            moments = {key: value.to(parameter.device) for key, value in found.items() if value is not None}
            if moments:  # in the memory format of the parameter, in which the optimizer creates them
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in moments.items()
                }
        self.fixed.load(tensors.get("norms", {}))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({name: value.item() for name, value in tensors["scaler"].items()})
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
        data: the result of ``open_images`` or ``open_arrays``, or an object with the same ``shape``, ``fingerprint``,
            length and ``read``.
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
        take_units(net, data)
        state = prepare(net, settings, accelerator)
    elif state.net is not net:
        raise ValueError("state belongs to another network. Pass net=state.net.")
    return _steps(net, data, settings, state, accelerator)


def prepare(net: ScoreNet, settings: Settings, accelerator: Any) -> TrainingState:
    """Creates the state of a new run.

    The network is moved to the device and converted to the fastest memory format; all processes get the weights of the
    first.

    Raises:
        ValueError: for float16 on another device than CUDA or a CPU.
    """
    if settings.precision == "float16" and accelerator.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{argument('precision', 'float16')} is for CUDA devices and CPUs, got {accelerator.device.type}. Write "
            f"{argument('precision', 'auto')}."
        )
    if "nonleaking" in (settings.augment or ()):
        backbone: Any = net.backbone
        width = backbone.time_embedding.linear_2.out_features
        backbone.augmentation = AugmentationEmbedding(nonleaking.VALUES, width).to(next(net.parameters()))
    if settings.label_drop > 0:
        begin_null(net.backbone)
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


# -- The loop ---------------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """The batch of one process for one step, or a part of it."""

    first: int  # the number of the first image in the run
    x: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Tensor | Parts | None
    told: Tensor | None  # how the images were changed

    def part(self, begin: int, end: int, device: torch.device, memory: torch.memory_format) -> _Batch:
        """The images ``begin`` to ``end - 1`` of the batch, or to its end if it has fewer, on the device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor[begin:end].to(device, non_blocking=True)

        x, noise = (each.contiguous(memory_format=memory) for each in (to_float(move(self.x)), move(self.noise)))
        told = None if self.told is None else move(self.told)
        return _Batch(self.first + begin, x, noise, move(self.sigma), map_parts(move, self.condition), told)


def _steps(
    net: ScoreNet, data: Data, settings: Settings, state: TrainingState, accelerator: Any
) -> Generator[Step, None, None]:
    if state.augmentation is not None:
        net.backbone.augmentation = state.augmentation
    model = accelerator.prepare_model(net)
    images = len(data.shape) == 3 and _channels_last(net, accelerator.device)
    memory = torch.channels_last if images else torch.contiguous_format
    loss = settings.loss or partial(
        dsm_loss, p=settings.p, weighting=weighting_for(net, settings.weighting, settings.p), reduction="none"
    )
    trained = [parameter for parameter in state.parameters if parameter.requires_grad]
    batches = _batches(net, data, settings, state, accelerator)
    try:
        for batch in batches:
            lr = settings.rate(state.images - state.first)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            net.train()
            losses, sigmas = _backward(batch, model, loss, settings, memory, accelerator, state)
            state.scaler.unscale_(state.optimizer)
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, settings.clip * math.prod(data.shape) / 2)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.fixed.restore()
            state.optimizer.zero_grad(set_to_none=True)
            state.images += settings.batch_size
            state.step += 1
            for average in state.averages:
                average.update(state.parameters, state.step)
            yield Step(state.images, losses, sigmas, lr, state)
    finally:
        batches.close()
        if state.augmentation is not None:
            net.backbone.register_module("augmentation", None)


def _backward(
    batch: _Batch,
    model: torch.nn.Module,
    loss: Loss,
    settings: Settings,
    memory: torch.memory_format,
    accelerator: Any,
    state: TrainingState,
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
            if state.augmentation is not None and part.told is not None:
                state.augmentation.c = part.told
            is_last = begin + size >= n  # processes exchange their gradients once, after the last part
            condition_seed = seed_of(settings.seed, "condition", part.first)
            arguments = loss_arguments(settings, part.x, part.condition, condition_seed)  # in float32, as in use
            with nullcontext() if is_last else accelerator.no_sync(model):
                with autocast(device, settings.precision):
                    each = loss(model, part.x, sigma=part.sigma, noise=part.noise, **arguments)
                if not isinstance(each, Tensor):
                    raise TypeError(f"loss must return a tensor, one value per image, got {quote(each)}.")
                if each.shape != part.sigma.shape:
                    raise ValueError(
                        f"loss must return one value per image, {tuple(part.sigma.shape)}, got shape "
                        f'{tuple(each.shape)}. Write reduction="none".'
                    )
                state.scaler.scale(each.sum() / n).backward()  # accelerator.backward may divide the loss once more
            losses.append(each.detach())
            sigmas.append(part.sigma)
    if state.augmentation is not None:  # for calls of the network between two steps, whose images are not changed
        state.augmentation.c = state.augmentation.c.new_zeros(1, nonleaking.VALUES)
    return torch.cat(losses), torch.cat(sigmas)


def loss_arguments(settings: Settings, x: Tensor, condition: Tensor | Parts | None, seed: int) -> dict[str, Any]:
    """The condition of images and the mask where the loss counts, as arguments of the loss, if there are any.

    Args:
        settings: the settings of the run, with the task that computes the condition, if there is one.
        x: the clean images (n, ...), on the device.
        condition: what the network takes of the condition of the data (``given_of``); beside that of a task it is a
            dict.
        seed: the seed of the task.

    Raises:
        TypeError: if the task returns something else.
    """
    condition = map_parts(lambda part: part.to(x.device), condition)
    if settings.condition is None:
        return {} if condition is None else {"condition": condition}
    # A copy, so that a task that writes into its argument does not change the images that the network learns.
    made: Any = settings.condition(x.clone(), torch.Generator(x.device).manual_seed(seed))
    made = (made, None) if isinstance(made, Tensor) else made
    if not (isinstance(made, tuple | list) and len(made) == 2):
        raise TypeError(f"condition= must return a tensor or (condition, mask), got {quote(made)}.")
    image, mask = made
    given = {"image": image, **condition} if isinstance(condition, dict) else image
    return {name: value for name, value in (("condition", given), ("mask", mask)) if value is not None}


def _batches(
    net: ScoreNet, data: Data, settings: Settings, state: TrainingState, accelerator: Any
) -> Generator[_Batch, None, None]:
    """The batches of this process until the end of the run, prepared in a thread."""
    local = settings.batch_size // accelerator.num_processes
    pinned = accelerator.device.type == "cuda"
    order, generator = Order(len(data), settings.seed), torch.Generator()
    levels, takes = levels_for(net, settings.levels), condition_of_data(net, settings)
    names, shape, axes = augmentations(net, data, settings.augment), tuple(data.shape), len(data.shape) - 1

    def make(first: int) -> _Batch:
        rows = order(first, first + local)
        x, condition = data.read(rows)
        if isinstance(data, ArrayData):
            check_finite(x, data.name, rows)
        dtype = x.dtype if x.is_floating_point() else torch.float32
        noise = torch.empty(local, *data.shape, dtype=dtype, device="cpu")
        chances, changes, numbers = [], [], []
        for i, z in enumerate(noise, first):
            generator.manual_seed(seed_of(settings.seed, "image", i))
            chances.append(torch.rand(2, generator=generator, dtype=torch.float32, device="cpu"))
            z.normal_(generator=generator)
            changes.append(torch.rand(1 + axes, generator=generator, dtype=torch.float32, device="cpu"))
            if state.augmentation is not None:
                numbers.append(nonleaking.draw(generator))
        flip, drop = torch.stack(chances).unbind(1)
        u, condition = torch.cat([flip[:, None], torch.stack(changes)], 1), given_of(net, condition, settings)
        x, told = augmented(x, names, u), None
        condition = map_parts(lambda part: augmented(part, names, u) if has_sides(part, shape) else part, condition)
        if numbers:
            a = torch.stack(numbers)
            x, told = nonleaking.changed(to_float(x), a), nonleaking.told(a)
        if takes is not None and condition is not None:
            check_condition(condition, takes, shape[1:])
            condition = without(condition, takes, drop < settings.label_drop)
        sigma = levels.quantile(uniforms(settings.seed, first, first + local)).to(noise.dtype)
        if pinned:
            x, noise, sigma = x.pin_memory(), noise.pin_memory(), sigma.pin_memory()
            condition = map_parts(Tensor.pin_memory, condition)
            told = None if told is None else told.pin_memory()
        return _Batch(first, x, noise, sigma, condition, told)

    own = accelerator.process_index * local
    firsts = range(state.images + own, state.first + settings.total, settings.batch_size)
    return ordered_map(make, firsts, workers=1, ahead=_BATCHES_AHEAD)


def _channels_last(net: ScoreNet, device: torch.device) -> bool:
    """Whether to train in the channels_last memory format."""
    return device.type != "cuda" or net.family is None or net.family.channels_last_on_cuda
