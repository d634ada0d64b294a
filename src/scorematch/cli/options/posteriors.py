"""``scorematch restore`` for arrays: draws from the posterior of each measurement, in the units of the data."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorematch.cli.options import refuse
from scorematch.cli.options.classes import find_classes, find_condition
from scorematch.cli.options.duration import announce, count
from scorematch.cli.options.measurements import read_measurements
from scorematch.cli.options.networks import load
from scorematch.cli.options.operators import read_operator
from scorematch.cli.options.outputs import check_new
from scorematch.cli.options.samplers import make_sampler
from scorematch.core.conditions import length, map_parts
from scorematch.core.messages import about
from scorematch.core.randomness import seed_of
from scorematch.data import open_arrays
from scorematch.data.arrays import write_arrays
from scorematch.restoration import Observation, as_operator, summary
from scorematch.restoration.methods import Restore
from scorematch.sampling import ParticleSampler
from scorematch.sampling.bulk import Job, prepared

_ENDINGS = (".npz", ".npy")  # of the restorations
_OF_PICTURES = ("resize", "tile", "crop", "feather", "strict", "skip_existing")
_TOGETHER = 64  # draws that are in memory of the network at once, unless more of one measurement are wanted


def restore_arrays(args: argparse.Namespace) -> None:
    """Restores the arrays of a file, and writes the draws (N, K, ...) of all measurements."""
    path, out = Path(args.pictures).expanduser(), args.folder
    refuse(args, _OF_PICTURES, "is for pictures")
    if out.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"the restorations of an array are an array, a file .npz or .npy, got {out}. Write "
            f"{out.parent / out.stem}.npz."
        )
    if args.uncertainty and out.suffix.lower() != ".npz":
        raise ValueError(f"--uncertainty writes several arrays. Write them to a file {out.with_suffix('.npz')}.")
    if path.resolve() == out.resolve():
        raise ValueError(f"the restorations would replace the measurements in {path}. Write to another file.")
    check_new([out], args.overwrite)
    net = load(args, pictures=False)
    observation, truth = _observation(args, path)
    assert net.sample_shape is not None  # noqa: S101  (load checks it)
    with about(path):
        observation = observation.of_shape(net.sample_shape)
    method: Restore = args.restore_method or "auto"
    sampler = make_sampler(args, net, restore=method)
    label: Any = find_classes(args, net)  # an int or None, without a rule
    job = Job(prepared(sampler), classes=label, condition=find_condition(args, net))
    n = len(observation)
    if length(job.condition) not in (None, 1, n):
        raise ValueError(
            f"--condition must be for one sample, which is for all measurements, or for each of {n}, got "
            f"{length(job.condition)}."
        )
    announce(sampler)
    found: dict[str, list[Tensor]] = {"x": []}
    at_once = max(1, (_TOGETHER if args.batch_size is None else args.batch_size) // args.n)
    for first in range(0, n, at_once):
        rows = range(first, min(first + at_once, n))
        for name, values in _draws(args, job, observation, rows).items():
            found.setdefault(name, []).append(values)
    arrays = {name: torch.cat(values) for name, values in found.items()}
    if args.uncertainty:
        each = [summary(draws) for draws in arrays["x"]]
        for name in ("mean", "deviation", "quantiles"):
            arrays[name] = torch.stack([getattr(one, name) for one in each])
        arrays["levels"] = torch.tensor(each[0].levels)
    if truth is not None:
        arrays["truth"] = truth
        error = (arrays["x"].mean(1) - truth).square().mean().sqrt()
        print(f"the mean of the restorations differs from the truth by {error:.4g} (root mean square)")
    write_arrays(out, arrays)
    print(f"{out}: {count(args.n, 'restoration')} of {count(n, 'measurement')}")


def _observation(args: argparse.Namespace, path: Path) -> tuple[Observation, Tensor | None]:
    """The measurements of a file, and the truth with ``--degrade``."""
    operator = None if args.operator is None else as_operator(read_operator(args.operator))
    if args.degrade:
        if operator is None:
            raise ValueError("--degrade needs the damage. Add --operator.")
        data = open_arrays(path)
        x = data.read(torch.arange(len(data)))[0]
        seeds = [seed_of(args.seed, "degrade", i) for i in range(len(x))]
        with about(path):
            operator = operator.with_axes(x.ndim).drawn(x, seeds)
            y = operator.measure(x)
            noise = torch.stack([torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
            return Observation(operator, y + args.sigma * noise, args.sigma), x
    given = read_measurements(path, None, args.sigma, None)
    complete = given.mask is None or bool(given.mask.all())
    if operator is None and complete and args.sigma == 0:
        raise ValueError(
            f"the measurements in {path} have neither gaps nor noise. Write what was done to them, --operator, or "
            "their noise, --sigma; a gap is NaN, or False in the array mask."
        )
    if operator is not None:
        sigma = args.sigma
        if given.mask is not None and not complete:
            sigma = torch.where(given.mask, args.sigma, math.inf).expand(given.y.shape)
        with about(path):
            given = Observation(operator, given.y, sigma)
    if given.mask is not None:
        print(f"{100 * float(given.mask.float().mean()):.3g} % of the values are observed")
    return given, None


def _draws(args: argparse.Namespace, job: Job, observation: Observation, rows: range) -> dict[str, Tensor]:
    """The draws of some measurements, which depend on the seed and on their numbers only."""
    options: dict[str, Any] = {
        "observation": observation.rows(torch.tensor(rows).repeat_interleave(args.n)),
        "condition": map_parts(lambda part: part.repeat_interleave(args.n, 0), job.condition_of(rows)),
        "generator": [seed_of(args.seed, "restoration", i, k) for i in rows for k in range(args.n)],
        "batch_size": args.batch_size,
        "progress": not args.quiet,
    }
    if isinstance(job.sampler, ParticleSampler):
        population = job.sampler.population(**options)
        evidence = population.log_evidence.view(-1, args.n).logsumexp(1) - math.log(args.n)
        return {"x": population.samples.cpu().unflatten(0, (-1, args.n)), "log_evidence": evidence.cpu()}
    return {"x": job.sampler.sample(**options).cpu().unflatten(0, (-1, args.n))}
