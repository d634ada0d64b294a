"""The training loop of the examples: averaged weights, a log, pictures, and checkpoints that it goes on from.

Into its folder go ``log.csv``, ``state.pt`` (all that is needed to go on) and ``network`` (the averaged weights, for
``ScoreNet.from_pretrained``). A run that was stopped and goes on ends with the bits of one that was not.
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

from scorematch import ScoreNet

WARMUP = 300  # steps over which the learning rate rises
EMA = 0.999  # of the averaged weights; early on they average over a tenth of the steps so far


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
    """Trains a network for ``steps`` steps, going on from the checkpoint in ``out`` if there is one.

    Args:
        net: on the device it is to be trained on.
        loss: draws a batch and gives the loss of the network on it, under bfloat16 autocast.
        report: called every ``every`` steps and at the end with the averaged network and the step, for pictures; gives
            figures for the log. What it draws it must draw from generators of its own.
        out: the folder.
        steps: how many in all. The learning rate falls to 0 at the last one.
        every: steps between checkpoints.
        lr: the highest learning rate.
        stop_at: end early, at this step, as if interrupted.

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
        print(f"goes on at step {step} of {steps}")

    begin, losses = time.perf_counter() - seconds, []
    stop = steps if stop_at is None else min(steps, stop_at)
    net.train()
    while step < stop:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / WARMUP) * decay
        with torch.autocast(device.type, torch.bfloat16):
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
            os.replace(state.with_suffix(".new"), state)  # a checkpoint is whole or the one before
            averaged.save_pretrained(out / "network")
    return averaged


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
