"""The training loop of the examples: averaged weights, a log, pictures, and checkpoints.

The folder of a run contains ``log.csv``, ``state.pt`` (the checkpoint, from which the run continues) and ``network``
(the averaged weights, for ``ScoreNet.from_pretrained``).

On a CPU a run that was stopped and continued ends with the same bits as one that was not. On CUDA it does not: some of
its kernels are not deterministic, and the state of its random number generator is not saved.
"""

import copy
import csv
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.precision import autocast

WARMUP = 300  # steps in which the learning rate rises
EMA = 0.999  # decay of the averaged weights; at first they average over a tenth of the steps so far


def draw_levels(n: int, schedule: NoiseSchedule, device: torch.device, *, center: float, spread: float = 1) -> Tensor:
    """Noise levels for a batch, float32 (n,).

    Half are drawn uniformly from the schedule. The other half are log-normal around ``center``, with the standard
    deviation ``spread`` in log sigma, as in Karras et al. (2022): the levels at which there is most to learn.
    """
    uniform = schedule.sigmas[torch.randint(len(schedule), (n,))]
    around = (center * (spread * torch.randn(n)).exp()).clamp(schedule.sigma_min, schedule.sigma_max)
    return torch.where(torch.arange(n) % 2 == 0, uniform, around).float().to(device)


def weighting(sigma: Tensor, p: float = 2) -> Tensor:
    """The weight 1 / c_out^p of the row "karras", which gives the error of the backbone equal weight at every level."""
    return (sigma * (1 + (sigma / 0.25) ** 2) ** 0.5) ** p


@torch.no_grad()
def held_out_loss(net: ScoreNet, x: Tensor) -> float:
    """The loss on test images, with its default weighting and the same noise each time."""
    batches = x.split(250)
    generator = torch.Generator().manual_seed(0)
    with autocast(x.device):
        return sum(float(dsm_loss(net, batch, generator=generator)) for batch in batches) / len(batches)


def train(
    net: ScoreNet,
    loss: Callable[[ScoreNet], Tensor],
    report: Callable[[ScoreNet, int], dict[str, float]],
    out: Path,
    *,
    steps: int,
    every: int,
    lr: float,
    stop_at: int | None = None,
) -> ScoreNet:
    """Trains a network, and continues from the checkpoint in ``out`` if there is one.

    Args:
        net: the network, on the device that it is trained on.
        loss: draws a batch and returns the loss of the network on it. It is called under autocast to bfloat16 where the
            device multiplies bfloat16 natively (``scorematch.precision``).
        report: called with the averaged network and the step, every ``every`` steps and at the end. It may write
            pictures, and returns numbers for the log. It must not draw from torch's global generator.
        out: the folder of the run.
        steps: the number of training steps. The learning rate falls to 0 at the last one.
        every: the number of steps between checkpoints.
        lr: the highest learning rate.
        stop_at: a step at which the run stops, as if it were interrupted.

    Returns:
        The averaged network.
    """
    device = next(net.parameters()).device
    net.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    out.mkdir(parents=True, exist_ok=True)
    state, step, seconds = out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        net.load_state_dict(saved["net"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        step, seconds = saved["step"], saved["seconds"]
        print(f"continues at step {step} of {steps}")

    begin, losses = time.perf_counter() - seconds, []
    stop = steps if stop_at is None else min(steps, stop_at)
    net.train()
    while step < stop:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / WARMUP) * decay
        with autocast(device):
            value = loss(net)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
        step += 1
        with torch.no_grad():
            rate = 1 - min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), rate)

        if step % every == 0 or step == stop:
            row = {
                "step": step,
                "seconds": round(time.perf_counter() - begin),
                "training loss": round(float(torch.stack(losses).mean()), 3),
            }
            row.update(report(averaged, step))
            losses = []
            print(row, flush=True)
            _log(out / "log.csv", row)
            saved = {
                "net": net.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step,
                "seconds": time.perf_counter() - begin,
            }
            torch.save(saved, state.with_suffix(".new"))
            os.replace(state.with_suffix(".new"), state)  # an interruption leaves the previous checkpoint
            averaged.save_pretrained(out / "network")
    return averaged


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
