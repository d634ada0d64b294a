"""The section ``correct`` of gpu.py: results on a device compared with those on the CPU."""

import argparse
import copy
import functools
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Row
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the small networks of the tests

from tests.helpers import seed
from tests.networks import NETS, condition, images, shared, wide_unet

import scorematch
from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss, guidance
from scorematch.core.precision import exact_float32
from scorematch.likelihood import log_likelihood
from scorematch.loss import sliced_score_matching_loss
from scorematch.restoration import JPEG, AveragePool, Grayscale, Mask, Observation, Operator, Uncrop
from scorematch.restoration.palette import TASKS
from scorematch.sampling import (
    AncestralSampler,
    DecoupledSampler,
    ODESampler,
    ParticleSampler,
    PredictorCorrectorSampler,
    Sampler,
)

PACKAGE = f"{Path(scorematch.__file__).parent}/"
Compute = Callable[[str], Tensor]  # of a device
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "langevin": AnnealedLangevinSampler,
    "langevin, plain": functools.partial(AnnealedLangevinSampler, steps_per_level=2),
    "heun": ODESampler,
    "heun, churn": functools.partial(ODESampler, churn=3),
    "dpm-solver++": functools.partial(ODESampler, method="dpm-solver++"),
    "ancestral": AncestralSampler,
    "ancestral, small, clamped": functools.partial(AncestralSampler, variance="small", clamp_denoised=True),
    "predictor-corrector": PredictorCorrectorSampler,
    "particles": ParticleSampler,
    "decoupled": DecoupledSampler,
}
OPERATORS: list[Operator] = [
    *(Mask(torch.arange(32) < 16), Uncrop(left=8), AveragePool(4), JPEG(20), Grayscale(), Grayscale() @ AveragePool(2))
]


class Failures(list[str]):
    """The errors that were found, each printed at once."""

    def add(self, text: str) -> None:
        """Appends and prints an error."""
        self.append(text)
        print(f"FAIL  {text}", flush=True)


def place() -> str:
    """The innermost line of the package in the traceback of the exception or in the stack, as file:line."""
    error = sys.exc_info()[2]
    frames = traceback.extract_stack() if error is None else traceback.extract_tb(error)
    inside = (frame for frame in reversed(frames) if frame.filename.startswith(PACKAGE))
    return next((f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}" for frame in inside), "here")


@functools.cache
def at(name: str, device: str) -> ScoreNet:
    """A network of the tests, "color" with three channels, or one that ships, on a device."""
    torch.manual_seed(0)
    net = wide_unet() if name == "color" else shared(name) if name in NETS else ScoreNet.from_pretrained(name)
    return copy.deepcopy(net).to(device).eval()


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / (expected.norm() + 1e-12))


class Comparison:
    """Compares results on the device with those on the CPU, and keeps the largest difference of each kind."""

    def __init__(self, device: str, failures: Failures) -> None:
        self.device, self.failures, self.rows = device, failures, {}

    def __call__(self, what: str, limit: float, case: str, found: Compute, expected: Compute | None = None) -> None:
        """Compares a result, which is computed on the device, with that of ``expected`` on the CPU."""
        row = self.rows.setdefault(
            what, {"compared with the CPU": what, "cases": 0, "largest difference": 0.0, "limit": limit, "where": ""}
        )
        try:
            difference = relative(found(self.device), (expected or found)("cpu"))
        except Exception as error:
            self.failures.add(f"{what}, {case}: {type(error).__name__} at {place()}: {str(error)[:160]}")
            return
        if not difference <= limit:  # also true for NaN
            self.failures.add(f"{what}, {case}: differs by {difference:.2g}, the limit is {limit:g}")
        row["cases"] += 1
        if difference >= row["largest difference"]:
            row.update({"largest difference": difference, "where": case})


def correct(args: argparse.Namespace, failures: Failures) -> dict[str, list[Row]]:
    compare = Comparison(args.device, failures)
    for name in ["ncsn", "unet, one head", "DDPM++, classes"] if args.smoke else NETS:
        for size in (16,) if args.smoke else (16, 32):
            _compare_network(compare, name, size)
    _compare_sampling(compare, OPERATORS[:2] if args.smoke else OPERATORS)
    for name in ["mnist"] if args.smoke else ["mnist", "mnist-classes", "cifar10-small", "celeba-small"]:
        given = 1 if name == "mnist-classes" else None
        for precision, limit in (("float32", 1e-2), ("auto", 0.2)):
            compare(
                f"networks that ship, {precision}", limit, name,
                lambda device: ODESampler(at(name, device), levels=3, precision=precision).sample(  # noqa: B023
                    1, condition=given, generator=0, progress=False  # noqa: B023
                ),
            )  # fmt: skip
    _compare_in_threads(compare, compiled=not args.smoke)
    return {"correct": list(compare.rows.values())}


def _compare_network(compare: Comparison, name: str, size: int) -> None:
    x, z, v = (images(2, seed(i), size=size) for i in range(3))
    given, sigmas = condition(name, 2, seed(3), size), torch.tensor([0.3, 2.0])

    def score(device: str, sigma: float | Tensor, copied: bool = False) -> Tensor:
        net = at(name, device).inference_copy() if copied else at(name, device)
        with torch.no_grad():
            return net(x.to(device), moved(sigma, device), moved(given, device))

    def gradient(device: str, low: bool = False, sliced: bool = False) -> Tensor:
        net, arguments = at(name, device), {"sigma": sigmas.to(device), "noise": z.to(device)}
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=low):
            if sliced:
                loss = sliced_score_matching_loss(net, x.to(device), projections=v.to(device), **arguments)
            else:
                loss = dsm_loss(net, x.to(device), condition=moved(given, device), **arguments)
        weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return torch.cat([each.flatten() for each in found if each is not None])

    case = f"{name}, {size} px"
    for sigma in (0.05, torch.tensor([0.3, 5.0])):
        plain = functools.partial(score, sigma=sigma)
        with exact_float32():
            compare("score, float32", 1e-4, case, plain)
        compare("score, torch's defaults", 2e-2, case, plain)
        compare("score, inference copy", 4e-2, case, functools.partial(plain, copied=True), plain)
    with exact_float32():
        compare("gradient, float32", 2e-3, case, gradient)
        if name in ("ncsn", "unet, one head", "NCSN++"):
            compare("gradient of sliced score matching", 2e-2, case, functools.partial(gradient, sliced=True))
    compare("gradient, autocast", 0.3, case, functools.partial(gradient, low=True), gradient)


def _compare_sampling(compare: Comparison, operators: Sequence[Operator]) -> None:
    def drawn(make: Callable[..., Sampler], name: str = "unet", generator: Any = 0, **options: Any) -> Compute:
        arguments = {"generator": generator, "progress": False, **options.pop("sample", {})}
        return lambda device: make(at(name, device), levels=4, **options).sample(2, **arguments)

    for kind_, make in SAMPLERS.items():
        exact = drawn(make, precision="float32")
        compare("sampler, float32", 2e-2, kind_, exact)
        compare("sampler, a list of seeds", 2e-2, kind_, drawn(make, generator=[0, 1], precision="float32"))
        compare("sampler, inference copy", 0.3, kind_, drawn(make), exact)
    for label, options in {"plain": {}, "interval, rescaled": {"interval": (0.1, 5), "rescale": 0.7}}.items():

        def guided(net: ScoreNet, **settings: Any) -> Sampler:
            return ODESampler(guidance.classifier_free(net, 2.0, **options), **settings)  # noqa: B023

        compare("guidance", 3e-2, label, drawn(guided, "DDPM++, classes", precision="float32", sample={"condition": 1}))
    clean = images(2, seed(7), channels=3, size=32)
    for operator in operators:
        task = {"observation": Observation(operator, operator.measure(clean), 0.1)}
        for restore in ("replace", "guide", "guide-jacobian"):
            settings = {"restore": restore, "precision": "float32", "clamp": False, "sample": task}
            compare(
                "restoration", 5e-2, f"{operator!r}, {restore}", drawn(AnnealedLangevinSampler, "color", **settings)
            )
    for name, made in TASKS.items():
        compare("Palette's tasks", 1e-5, name, lambda device: made()(clean.to(device), 0)[0])  # noqa: B023
    x, levels = images(2, seed(), size=16), NoiseSchedule.karras(10, 0.05, 8)
    compare(
        "likelihood", 2e-3, "unet",
        lambda device: log_likelihood(at("unet", device), x.to(device), levels, generator=0, progress=False),
    )  # fmt: skip


def _compare_in_threads(compare: Comparison, compiled: bool) -> None:
    """A copy whose first call, and first call of another shape, are in other threads than the main one."""
    score, expected = at("unet", compare.device).inference_copy(compile=compiled), at("unet", "cpu")

    def called(n: int, device: str) -> Tensor:
        found: list[Tensor] = []

        def call() -> None:
            with torch.no_grad():
                found.extend(score(images(n, seed(), size=16).to(device), 0.3).clone() for _ in range(3))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return found[-1]

    for n in (2, 3):
        compare(
            "a compiled copy in threads" if compiled else "a copy in threads", 4e-2, f"{n} images",
            functools.partial(called, n), lambda _: expected(images(n, seed(), size=16), 0.3),  # noqa: B023
        )  # fmt: skip
