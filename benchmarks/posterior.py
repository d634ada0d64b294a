"""Draws from posteriors: every method of restoration on the same tasks at the same cost, beside azula and deepinv.

    python benchmarks/posterior.py --data FOLDER --worlds digits               # FOLDER has MNIST
    python benchmarks/posterior.py --faces FACES --worlds faces --images 8     # a folder or an .npz file of faces
    python benchmarks/posterior.py --data FOLDER --faces FACES --worlds gaussian mixture levy  # known posteriors

The cost is counted in forward passes of the network for one draw. A backward pass counts as many as were measured in
the same run. Each method has as many noise levels as ``--budget`` pays for. The methods of azula and deepinv have their
default settings, with the number of steps of the budget; where a package is not installed, its rows are left out. They
use the same network through ``net.as_denoiser()``, which counts as one forward pass. Because azula's DPS divides by the
norm of a whole batch, its strength is multiplied by the root of the number of images.

The columns: the root mean square error of one draw and of the mean of all, the distance of features of
EfficientNet-Lite0 ("perceptual"), the root mean square distance of two draws over that of a draw and the truth
("ratio", 1 for exact draws), and the share of random projections in which the truth is between the second smallest and
the second largest of eight draws ("coverage", 5/9 for exact draws). For known posteriors: spread, shift and coverage of
``posterior_calibration``.

Each row is added to ``posterior.jsonl`` when it is measured; the same command again measures only what is missing. All
rows are in ``posterior.md``.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import now, parser
from posterior_peers import peers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mnist import load_digits

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.data import open_images
from scorematch.evaluation import efficientnet_lite0, posterior_calibration
from scorematch.evaluation.estimate import mean_of, ratio_of, root_of
from scorematch.evaluation.exact import Empirical, Gaussian, GaussianMixture
from scorematch.evaluation.levy import Laplace, LevyProcess, Student
from scorematch.evaluation.ranks import directions, inside, ranks_among
from scorematch.restoration import Magnitude, Mask, Matrix, Observation, Operator, as_operator
from scorematch.restoration.methods import METHODS
from scorematch.sampling import DecoupledSampler, ODESampler, ParticleSampler

WORLDS = {"digits": "mnist-classes", "faces": "celeba-small", "gaussian": None, "mixture": None, "levy": None}
SIGMA = 0.02  # the noise of every task except the blur


def tasks(shape: Sequence[int]) -> dict[str, tuple[Operator, float]]:
    """The operator and the noise of each task, for images or, if the shape has one axis, for signals."""
    size = shape[-1]
    kept = torch.rand(size if len(shape) == 1 else (size, size), generator=torch.Generator().manual_seed(0)) < 0.1
    hole = torch.ones(size if len(shape) == 1 else (size, size), dtype=torch.bool)
    hole[(slice(size // 4, size - size // 4),) * hole.ndim] = False
    if len(shape) == 1:
        position = torch.arange(size)
        kernel = torch.exp(-0.5 * ((position[:, None] - position) / 2.0) ** 2)
        return {
            "hole": (Mask(hole), 0.25),
            "10 %": (Mask(position % 8 == 0), 0.25),
            "blur": (Matrix(kernel / kernel.sum(1, keepdim=True)), 0.25),
        }
    return {
        "hole": (Mask(hole), SIGMA),
        "half": (as_operator(f"uncrop:right={size // 2}"), SIGMA),
        "10 %": (Mask(kept), SIGMA),
        "blur": (as_operator(f"blur:{max(1, size / 20):.2g}"), 0.05),
        "4x": (as_operator("resize:4"), SIGMA),
        **({"gray": (as_operator("gray"), SIGMA)} if shape[0] == 3 else {}),
        "fourier": (as_operator("fourier:4"), SIGMA),
        "jpeg": (as_operator("jpeg:10"), SIGMA),
        "saturated": (as_operator("clip:0,0.4"), 0.1),
        "phase": (Magnitude(2), 0.05),
    }


class Counted:
    """A score that counts its forward and backward passes of one image."""

    def __init__(self, net: ScoreNet, score: Callable[[Tensor, Any], Tensor]) -> None:
        self._net, self._score = net, score
        self.forwards = self.backwards = 0

    def __getattr__(self, name: str) -> Any:
        if name in {"inference_copy", "is_inference_copy", "sampler_settings", "__deepcopy__"}:
            raise AttributeError(name)  # samplers then call this object
        return getattr(self._net, name)

    def __call__(self, x: Tensor, sigma: Any) -> Tensor:
        """The score."""
        self.forwards += len(x)
        found = self._score(x, sigma)
        if found.requires_grad:
            found.register_hook(self._backward)
        return found

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def cost(self, backward: float) -> float:
        """The cost so far in forward passes."""
        return self.forwards + backward * self.backwards


def backward_cost(net: Callable[[Tensor, float], Tensor], shape: Sequence[int], n: int, device: str) -> float:
    """The time of a backward pass over that of a forward pass."""
    x = torch.zeros(n, *shape, device=device, requires_grad=True)
    forward, backward = [], []
    for _ in range(4):
        begin = now(device)
        found = net(x, 1.0).sum()
        middle = now(device)
        torch.autograd.grad(found, x)
        forward.append(middle - begin)
        backward.append(now(device) - middle)
    return min(backward) / min(forward)


# -- Methods ----------------------------------------------------------------------------------------------------------

Draw = Callable[[Any, int, Observation, int], Tensor]  # of a score, the number of steps, an observation and a seed


def own(method: str, score: Any, steps: int, observation: Observation, seed: int) -> Tensor:
    """Draws with a method of this package and consistent Langevin dynamics, p = 1.1."""
    sampler = AnnealedLangevinSampler(score, levels=max(2, steps), restore=method, consistent=True)
    return sampler.sample(len(observation), observation=observation, generator=seed, progress=False)


def particles(score: Any, steps: int, observation: Observation, seed: int) -> Tensor:
    """Draws with four twisted particles each, which "guide" proposes."""
    sampler = ParticleSampler(score, levels=max(2, steps), restore="guide", particles=4)
    return sampler.sample(len(observation), observation=observation, generator=seed, progress=False)


def flow(score: Any, steps: int, observation: Observation, seed: int) -> Tensor:
    """Draws with moment matching along the probability flow, by UniPC on geometric levels."""
    schedule = NoiseSchedule.geometric(score.schedule.sigma_max, score.schedule.sigma_min, max(2, steps))
    sampler = ODESampler(score, schedule, method="unipc", order=3, restore="moment-matching")
    return sampler.sample(len(observation), observation=observation, generator=seed, progress=False)


def decoupled(score: Any, steps: int, observation: Observation, seed: int) -> Tensor:
    """Draws with decoupled sampling from 16 standard deviations of images down."""
    sampler = DecoupledSampler(score, levels=max(2, steps), sigma_max=min(4.0, score.schedule.sigma_max))
    return sampler.sample(len(observation), observation=observation, generator=seed, progress=False)


def reverse_diffusion(method: str, score: Any, steps: int, observation: Observation, seed: int) -> Tensor:
    """Draws with a method of this package along the reverse diffusion, as ``scorematch restore`` does."""
    sampler = ODESampler(score, levels=max(2, steps), restore=method)
    return sampler.sample(len(observation), observation=observation, generator=seed, progress=False)


OWN: dict[str, Draw] = {
    **{name: partial(own, name) for name in METHODS},
    **{f"{name}, SDE": partial(reverse_diffusion, name) for name in METHODS if name != "auto"},
    "moment-matching, flow": flow,
    "4 particles": particles,
    "decoupled": decoupled,
}


def methods() -> dict[str, Draw]:
    """The methods of this package, and those of azula and deepinv that are installed."""
    return {**OWN, **peers()}


def steps_for(draw: Draw, score: Counted, observation: Observation, budget: float, backward: float) -> int:
    """The number of steps that cost at most the budget for one draw, from the costs of 4 and 8 steps."""
    costs = {}
    for steps in (4, 8):
        before = score.cost(backward)
        draw(score, steps, observation, 0)
        costs[steps] = (score.cost(backward) - before) / len(observation)
    each = (costs[8] - costs[4]) / 4
    return max(2, int((budget - costs[4]) / each) + 4)


# -- Rows -------------------------------------------------------------------------------------------------------------


def figures(draws: Tensor, x: Tensor, extract: Callable[[Tensor], Tensor]) -> dict[str, str]:
    """The columns for draws (n, K, ...) of images x (n, ...)."""
    n, k = draws.shape[:2]
    draws, x = draws.double(), x.double()
    error = (draws - x[:, None]).square().flatten(2).mean((1, 2))
    pairs = [(draws[:, i] - draws[:, j]).square().flatten(1).mean(1) for i, j in itertools.combinations(range(k), 2)]
    w = directions(x[0].numel(), 32, 0)
    ranks = ranks_among(draws.flatten(2) @ w, x.flatten(1) @ w, torch.Generator().manual_seed(0))
    features = extract(draws.flatten(0, 1).float().clamp(0, 1)).view(n, k, -1)
    apart = (features - extract(x.float())[:, None]).norm(dim=2)
    return {
        "rmse": str(root_of(mean_of(error))),
        "rmse of the mean": str(root_of(mean_of((draws.mean(1) - x).square().flatten(1).mean(1)))),
        "perceptual": str(mean_of(apart.mean(1))),
        "ratio": str(root_of(ratio_of(torch.stack(pairs).mean(0), error))),
        "coverage": str(mean_of(inside(ranks, k, max(1, k // 4)).double().mean(1))),
    }


def network_rows(world: str, args: Any) -> Iterator[tuple[dict[str, str], Callable[[], dict[str, Any]]]]:
    """The key of each row of a network, and a function that measures it."""
    net = ScoreNet.from_pretrained(WORLDS[world]).to(args.device)
    copy, shape = net.inference_copy(), net.sample_shape
    x = images_of(world, args)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: args.images]
    x = x[chosen].to(args.device)
    backward = backward_cost(copy, shape, 32, args.device)
    extractor = efficientnet_lite0()

    def measured(draw: Draw, operator: Operator, sigma: float, ours: bool) -> dict[str, Any]:
        score = Counted(net, copy if ours else denoised(net))
        y = operator.measure(x)
        y = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x)
        steps = steps_for(draw, score, Observation(operator, y[:1], sigma), args.budget, backward)
        score.forwards = score.backwards = 0
        begin = now(args.device)
        repeated = Observation(operator, y.repeat_interleave(args.draws, 0), sigma)
        images = draw(score, steps, repeated, 2).view(len(x), args.draws, *shape)
        seconds = (now(args.device) - begin) / len(repeated)
        cost = score.cost(backward) / len(repeated)
        found = figures(images.cpu(), x.cpu(), lambda images: extractor.extract(images).features.double())
        return {**found, "cost": round(cost, 1), "seconds": round(seconds, 3), "steps": steps}

    for task, (operator, sigma) in tasks(shape).items():
        for name, draw in methods().items():
            key = {"world": world, "task": task, "method": name}
            yield key, partial(measured, draw, operator, sigma, name in OWN)


def denoised(net: ScoreNet) -> Callable[[Tensor, Any], Tensor]:
    """The score of the denoiser that other packages get, so that their calls are counted like ours."""
    denoiser = net.as_denoiser()
    return lambda x, sigma: (denoiser(x, sigma) - x) / torch.as_tensor(sigma).view(-1, *[1] * (x.ndim - 1)) ** 2


def images_of(world: str, args: Any) -> Tensor:
    """The images (N, C, H, W) of a world, in [0, 1]."""
    if world == "digits":
        return load_digits(args.data, "test")[0].float() / 255
    faces = open_images(args.faces, image_size=(64, 64), channels=3, progress=False)
    return faces.read(torch.arange(len(faces)))[0].float() / 255


def known_rows(world: str, args: Any) -> Iterator[tuple[dict[str, str], Callable[[], dict[str, Any]]]]:
    """The key of each row of a distribution whose posterior is known, and a function that measures it."""
    schedule = NoiseSchedule.karras(10, 0.005, 256)
    if world == "mixture":
        images, labels = load_digits(args.data, "test")
        worlds = {"mixture, digits": classes_of(pooled(images[:, :, 2:26, 2:26].float() / 255), labels, schedule)}
    elif world == "levy":
        worlds = {
            "levy, Laplace": LevyProcess(Laplace(), 64, schedule=NoiseSchedule.karras(100, 0.05, 256)),
            "levy, Student": LevyProcess(Student(3.0), 64, schedule=NoiseSchedule.karras(200, 0.05, 256)),
        }
    else:
        small = {
            "digits": images_of("digits", args)[:4000, :, 2:26, 2:26],
            "faces": images_of("faces", args)[:1400].mean(1, keepdim=True),
        }
        worlds = {
            f"gaussian, {name}": Gaussian.like(Empirical(pooled(images), schedule=schedule))
            for name, images in small.items()
        }

    def measured(exact: Remembered, name: str, draw: Draw, operator: Operator, sigma: float) -> dict[str, Any]:
        score = Counted(exact.exact, exact.exact)
        y = operator.measure(exact.sample(1, 0))
        steps = steps_for(draw, score, Observation(operator, y, sigma), args.budget, 2.0)
        score.forwards = score.backwards = 0
        begin = now("cpu")
        sampler = Adapter(partial(draw, score, steps))
        _, found = posterior_calibration(
            exact, operator, {name: sampler}, sigma=sigma, observations=args.observations, progress=False
        )
        return {
            "spread": str(found.spread),
            "shift": round(found.shift, 3),
            "coverage of 90 %": str(found.coverage(1)[1]),
            "cost": round(score.cost(2.0) / (args.observations * 19), 1),
            "seconds": round((now("cpu") - begin) / (args.observations * 19), 4),
            "steps": steps,
        }

    for label, exact in worlds.items():
        for task, (operator, sigma) in tasks(exact.sample_shape).items():
            if operator.is_linear:
                known = Remembered(exact)
                for name, draw in methods().items():
                    key = {"world": label, "task": task, "method": name}
                    yield key, partial(measured, known, name, draw, operator, sigma)


def pooled(images: Tensor) -> Tensor:
    """The images averaged to 8x8 pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 8)


def classes_of(images: Tensor, labels: Tensor, schedule: NoiseSchedule) -> GaussianMixture:
    """A component for each class of images, with the mean of the class and the covariance within the classes."""
    classes = [images[labels == label] for label in labels.unique()]
    means = torch.stack([each.mean(0) for each in classes])
    within = Empirical(torch.cat([each - mean for each, mean in zip(classes, means, strict=True)])).covariance
    weights = [float(len(each)) for each in classes]
    return GaussianMixture(weights, means.flatten(1), within, images.shape[1:], schedule=schedule)


class Remembered:
    """A distribution that computes the posteriors of the observations of a task once for all methods."""

    def __init__(self, exact: Any) -> None:
        self.exact = exact
        self._posteriors: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exact, name)

    def posteriors(self, observation: Observation, seed: int) -> list[Any]:
        """The posteriors; the observations are the same for every method."""
        self._posteriors = self._posteriors or self.exact.posteriors(observation, seed)
        return self._posteriors


class Adapter:
    """A stand-in for a sampler, for ``posterior_calibration``."""

    def __init__(self, draw: Callable[[Observation, int], Tensor]) -> None:
        self._draw = draw

    def sample(self, n: int, *, observation: Observation, generator: int, progress: bool) -> Tensor:
        """Draws one sample for each observation."""
        torch.manual_seed(generator % 2**32)
        return self._draw(observation, generator)


# -- The program ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the rows that are not in the file, and writes the table."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="the folder with MNIST")
    options.add_argument("--faces", type=Path, help="the faces, for the worlds faces and gaussian")
    options.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="what is restored")
    options.add_argument("--tasks", nargs="+", help="only these tasks")
    options.add_argument("--methods", nargs="+", help="only these methods")
    options.add_argument("--images", type=int, default=16, help="images of a network")
    options.add_argument("--observations", type=int, default=100, help="observations of a known posterior")
    options.add_argument("--draws", type=int, default=8, help="draws for each image")
    options.add_argument("--budget", type=float, default=60, help="forward passes for one draw")
    args = options.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "posterior.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for world in args.worlds:
        for key, measure in (network_rows if WORLDS[world] else known_rows)(world, args):
            wanted = all(chosen is None or key[name] in chosen for name, chosen in _chosen(args).items())
            if not wanted or any(key.items() <= row.items() for row in rows):  # measured before
                continue
            try:
                row = {**key, **measure()}
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                row = {**key, "refused": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
    (args.out / "posterior.md").write_text(markdown(rows), encoding="utf-8")


def _chosen(args: Any) -> dict[str, list[str] | None]:
    return {"task": args.tasks, "method": args.methods}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each world; rows that were refused are a list below it."""
    text = []
    for world in dict.fromkeys(row["world"] for row in rows):
        own = [row for row in rows if row["world"] == world]
        measured = [row for row in own if "refused" not in row]
        if measured:
            columns = [name for name in measured[0] if name != "world"]
            lines = [columns, ["---"] * len(columns), *([str(row[name]) for name in columns] for row in measured)]
            text += [f"## {world}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]
        text += [f"- {row['task']}, {row['method']}: {row['refused']}" for row in own if "refused" in row] + [""]
    return "\n".join(text)


if __name__ == "__main__":
    main()
