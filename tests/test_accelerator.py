"""Results on a simulated accelerator without float64 compared with the CPU.

Tensors of the simulated device hold a tensor of the CPU, and name another device. As on a real one, an operation raises
an error if it also gets a tensor of the CPU with axes, or if its result would be float64.
"""

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation import (
    Extractor,
    density_coverage,
    evaluate_restoration,
    frechet_distance,
    inception_score,
    kernel_distance,
    level_losses,
    precision_recall,
    score_error,
)
from scorematch.evaluation.exact import Empirical, Gaussian, Mixture
from scorematch.evaluation.memorization import Nearest
from scorematch.guidance import autoguidance, classifier_free
from scorematch.loss import dsm_loss, loss_and_norm
from scorematch.observe import JPEG, AveragePool, Grayscale, Mask, Observation, Uncrop
from scorematch.palette import TASKS, MultiTask
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler
from tests.helpers import run, seed
from tests.networks import wide_unet

DEVICE = torch.device("mps", 0)
LEVELS = NoiseSchedule.geometric(5, 0.05, 4)


class Simulated(torch.Tensor):
    """A tensor of the simulated device; ``held`` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError(f"{DEVICE} does not support float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return _call(function, arguments, keywords or {})


class Accelerator(TorchDispatchMode):
    """Within this context tensors can be created on the simulated device."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return _call(function, arguments, keywords or {})


def _call(function, arguments, keywords):
    name, target = function.overloadpacket.__name__, keywords.get("device")
    tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
    simulated = {id(one.held): one for one in tensors if isinstance(one, Simulated)}
    if not simulated and target != DEVICE:
        return function(*arguments, **keywords)
    # Tensors may be copied between the devices, and indexed by a tensor of the CPU.
    free = tensors if name in ("copy_", "_to_copy") else []
    free = tree_leaves(arguments[1]) if name in ("index", "index_put_") else free
    for one in tensors:
        if not isinstance(one, Simulated) and one.ndim and not any(one is other for other in free):
            raise RuntimeError(f"{name} got tensors of {DEVICE} and of the CPU")
    if target is not None:
        keywords = {**keywords, "device": "cpu"}
    held = tree_map(lambda leaf: leaf.held if isinstance(leaf, Simulated) else leaf, (arguments, keywords))
    result = function(*held[0], **held[1])
    if name == "_local_scalar_dense" or (target or DEVICE) != DEVICE:
        return result
    if name == "copy_":
        return arguments[0]

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return simulated[id(leaf)] if id(leaf) in simulated else Simulated(leaf)

    return tree_map(wrapped, result)


def _moved(value):
    return value.to(DEVICE)


@torch.no_grad()
def _compare(function):
    """Compares function(to) for ``to`` that moves tensors and networks to the simulated device, or returns them."""
    expected = function(lambda value: value)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Accelerator():
            found = function(_moved)
            pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
            assert pairs
            for a, b in pairs:
                torch.testing.assert_close(a.cpu() if isinstance(a, torch.Tensor) else a, b, rtol=1e-3, atol=1e-3)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_the_simulation_can_fail():
    with Accelerator():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.device == DEVICE and (there * torch.tensor(2.0)).sum().item() == 6
        for mixed in (lambda: there + here, lambda: torch.cat([here, there]), lambda: here[there > 0]):
            with pytest.raises(RuntimeError, match="and of the CPU"):
                mixed()
        with pytest.raises(TypeError, match="does not support float64"):
            there.double()
        assert there.cpu().double().sum() == 3


# -- Scores, samplers and losses --------------------------------------------------------------------------------------


class Score:
    """The score of normal data, which is on a device like a network."""

    schedule, value_range, sample_shape = LEVELS, (0.0, 1.0), (3, 8, 8)

    def __init__(self, to):
        self.variance = to(torch.tensor([0.1]))
        self.device = self.variance.device

    def __call__(self, x, sigma):
        return (0.5 - x) / (self.variance + sigma**2).view(-1, 1, 1, 1)


SAMPLERS = {
    "langevin": functools.partial(AnnealedLangevinSampler, steps_per_level=2),
    "consistent": functools.partial(AnnealedLangevinSampler, consistent=True),
    "heun": ODESampler,
    "churn": functools.partial(ODESampler, churn=2),
    "dpm-solver++": functools.partial(ODESampler, method="dpm-solver++"),
    "ancestral": functools.partial(AncestralSampler, clamp_denoised=True),
    "predictor-corrector": PredictorCorrectorSampler,
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_samples(make):
    _compare(lambda to: run(make(Score(to), LEVELS), 2, generator=0))
    _compare(lambda to: run(make(Score(to), LEVELS), generator=[0, 1], init=torch.ones(2, 3, 8, 8)))


HALF = torch.arange(8) < 4
OPERATORS = [
    Mask(HALF),
    Mask(torch.rand(2, 1, 8, 8, generator=seed()) < 0.5),
    Uncrop(left=2),
    AveragePool(2) @ Mask(HALF),
    Grayscale() @ AveragePool(2),
    JPEG(50),
]


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("restore", ["replace", "guide"])
def test_restored_images(operator, restore):
    y = operator.measure(torch.rand(2, 3, 8, 8, generator=seed()))
    for make in (SAMPLERS["langevin"], SAMPLERS["churn"]):
        _compare(
            lambda to, make=make: run(
                make(Score(to), LEVELS, restore=restore), observation=Observation(operator, y, 0.1), generator=0
            )
        )
    _compare(lambda to: [operator.lift(operator.measure(to(torch.ones(2, 3, 8, 8)))), operator.as_image(to(y))])


def test_masks_on_two_devices():
    def seen(to):
        operator = Mask(HALF) @ Uncrop() @ Mask(to(torch.arange(8) > 1))
        return operator.seen, operator.measure(torch.ones(1, 1, 8, 8))

    _compare(seen)


def test_networks_and_guidance(monkeypatch):
    monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    # Without attention, for which torch chooses a kernel by the type of the device.
    options = {"layers_per_block": 1, "add_attention": False}
    net = wide_unet(num_class_embeds=2, null_class=True, **options).eval()
    weaker = wide_unet(**options).eval()
    x, classes = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])

    def results(to):
        mine, other = to(copy.deepcopy(net)), to(copy.deepcopy(weaker))
        guided = classifier_free(mine, 2.0, interval=(0.1, 2), rescale=0.5), autoguidance(mine, other, 2.0)
        levels = torch.tensor([0.5, 4.0], dtype=torch.float64), to(torch.tensor([0.5, 4.0]))
        scores = [score(to(x), sigma, to(classes)) for score in (mine, *guided) for sigma in levels]
        sampler = ODESampler(mine, levels=2, precision="float32")
        return (
            scores,
            mine.inference_copy()(to(x), 0.5, to(classes)),
            run(sampler, generator=0, condition=classes, shape=(3, 8, 8)),
            dsm_loss(mine, to(x), generator=0, condition=to(classes), region=x < 0.5),
            loss_and_norm(mine, to(x), sigma=levels[0], noise=x.double(), condition=1),
        )

    _compare(results)


@pytest.mark.parametrize("name", TASKS)
def test_palette_tasks(name):
    _compare(lambda to: TASKS[name]()(to(torch.ones(4, 3, 8, 8)), 0))
    _compare(lambda to: MultiTask([TASKS[name](), TASKS["colorization"]()])(to(torch.ones(4, 3, 8, 8)), 0))


# -- Evaluation -------------------------------------------------------------------------------------------------------


def test_metrics_of_features():
    a, b = torch.randn(2, 30, 3, generator=seed())

    def metrics(to, also):
        nearest = Nearest(to(a), 2)
        nearest.update(also(b), to(b.flip(1)))
        return (
            frechet_distance(to(a), also(b)),
            kernel_distance(to(a), also(b), subsets=2, subset_size=10).value,
            *precision_recall(to(a), also(b), k=3),
            *density_coverage(to(a), also(b), k=3),
            *inception_score(to(b), splits=2),
            nearest.compute(),
        )

    _compare(lambda to: metrics(to, to))
    _compare(lambda to: metrics(to, lambda value: value))


EXACT = {
    "gaussian": lambda to: Gaussian(to(torch.rand(12, generator=seed())), 0.1, (3, 2, 2), schedule=LEVELS),
    "mixture": lambda to: Mixture([0.3, 0.7], to(torch.rand(2, 12, generator=seed())), 0.1, (3, 2, 2)),
    "empirical": lambda to: Empirical(to(torch.rand(9, 3, 2, 2, generator=seed())), 0.1),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_distributions(name):
    x, sigma = torch.rand(4, 3, 2, 2), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def results(to, also):
        exact = EXACT[name](to)
        return exact(also(x), sigma), exact(also(x), also(sigma)), exact.log_density(also(x), 0.3), exact.sample(2, 0)

    _compare(lambda to: results(to, to))
    _compare(lambda to: results(to, lambda value: value))
    _compare(lambda to: results(lambda value: value, to))


def test_diagnostics_and_restored_images():
    images = torch.rand(4, 3, 8, 8, generator=seed())
    exact = Gaussian(torch.full((192,), 0.5), 0.2, (3, 8, 8), schedule=LEVELS)

    def results(to):
        net, device = Score(to), DEVICE if to is _moved else None
        pixels = Extractor(lambda images: images.flatten(1).float(), "pixels", device=device)
        options = {"features": pixels, "metrics": [], "cache": False, "progress": False}
        restored = evaluate_restoration(ODESampler(net, levels=2), images, Mask(HALF), batch_size=2, **options)
        errors = score_error(net, exact, [1.0, 0.1], n=4, batch_size=2, progress=False)
        return errors, level_losses(net, images, [1.0, 0.1], batch_size=2, progress=False), restored.figures

    _compare(results)
