"""The quality of the schedulers of diffusers and of this package with few calls of the same network.

    python benchmarks/schedulers.py --reference FOLDER --n 200 --calls 8 12 18

FOLDER has pictures of the data of ``--model``. All rows start from the same noise. The network gives the schedulers of
diffusers what they ask for: the noise in the levels of a DDPM, or the output of EDM's network. "default" are a
scheduler's own levels, "Karras" is ``use_karras_sigmas=True``. The first rows are the settings of the network, for
``recommended_sampler(net, calls=...)``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Row, parser, report
from torch import Tensor

from scorematch import ScoreNet
from scorematch.evaluation import Evaluator
from scorematch.sampling import Chain, ODESampler, Sampler, bulk_samples, recommended_sampler


def schedulers() -> dict[str, Callable[[], Any]]:
    """The schedulers of diffusers by name, with the levels of DDPM (Ho et al.) or of EDM (Karras et al.)."""
    import diffusers

    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    kinds = {"DPM-Solver++": "DPMSolverMultistep", "UniPC": "UniPCMultistep", "DEIS": "DEISMultistep"}
    made: dict[str, Callable[[], Any]] = {"EDM, DPM-Solver++": diffusers.EDMDPMSolverMultistepScheduler}
    for name, kind in kinds.items():
        for levels, karras in (("default", False), ("Karras", True)):
            scheduler = getattr(diffusers, f"{kind}Scheduler")
            made[f"{name}, {levels}"] = lambda scheduler=scheduler, karras=karras: scheduler(
                **betas, use_karras_sigmas=karras
            )
    return made


class Theirs(ODESampler):
    """A sampler that follows a scheduler of diffusers, for images in [0, 1]."""

    scheduler: Callable[[], Any]
    calls: int

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each step, with its level."""
        scheduler = self.scheduler()
        scheduler.set_timesteps(self.calls)
        edm = hasattr(scheduler, "precondition_outputs")
        x = (x - 0.5) / self.schedule.sigma_max * float(scheduler.init_noise_sigma)
        for t, noise in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            sigma = float(noise)
            scale = 1.0 if edm else 1 / math.sqrt(1 + sigma**2)  # of the clean image in the state
            image = x / scale / 2 + 0.5
            denoised = 2 * (image + (sigma / 2) ** 2 * chain.score(image, sigma / 2)) - 1
            output = (x - scale * denoised) / (scale * sigma)
            if edm:
                zero, one = (scheduler.precondition_outputs(x, torch.full_like(x, v), sigma) for v in (0.0, 1.0))
                output = (denoised - zero) / (one - zero)
            x = scheduler.step(output, t, x).prev_sample
            yield x / 2 + 0.5, sigma / 2


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--reference", type=Path, required=True, help="a folder or an .npz file of pictures")
    options.add_argument("--model", default="cifar10-small")
    options.add_argument("--features", default="efficientnet-lite0")
    options.add_argument("--n", type=int, default=200, help="samples per row")
    options.add_argument("--calls", type=int, nargs="+", default=[8, 12, 18])
    options.add_argument("--own-calls", type=int, nargs="+", default=[4, 6, 18])
    args = options.parse_args(argv)
    net = ScoreNet.from_pretrained(args.model).to(args.device)
    known = schedulers()
    if args.smoke:
        args.n, args.calls, args.own_calls, known = 10, [3], [4], dict(list(known.items())[:2])
    features: Any = (lambda images: images.float().flatten(1)[:, ::500]) if args.smoke else args.features
    evaluator = Evaluator(args.reference, features=features, metrics=["frechet"], cache=False, progress=False)
    takes_classes = net.conditioning is not None and net.conditioning.classes is not None

    def row(name: str, calls: int, sampler: Sampler) -> Row:
        batches = bulk_samples(sampler, args.n, batch_size=50, classes="cycle" if takes_classes else None)
        found = evaluator.measure(each.images for each in batches)[evaluator.extractors[0].name]["frechet"]
        print(name, calls, found, flush=True)
        return {"scheduler": name, "calls": calls, "Frechet distance": found.value, "error": found.error}

    rows = [row("scorematch", calls, recommended_sampler(net, calls=calls)) for calls in args.own_calls]
    for name, scheduler in known.items():
        for calls in args.calls:
            sampler = Theirs(net, levels=2, denoise=False)
            sampler.scheduler, sampler.calls = scheduler, calls
            rows.append(row(f"diffusers, {name}", calls, sampler))
    report("schedulers", args, rows, bars="Frechet distance")


if __name__ == "__main__":
    main()
