"""Trains the network that ships as "mnist": a small NCSNv2 on 60,000 handwritten digits.

    python examples/train_mnist.py --data FOLDER --out runs/mnist
    python examples/train_mnist.py --data FOLDER --out runs/mnist --steps 200000    # for longer
    python examples/train_mnist.py --data FOLDER --out runs/mnist                   # goes on where it stopped

The loss stands beside D/2 = 392, which is what a network that knows nothing scores. Every ``--every`` steps it writes a
checkpoint, a grid of samples from the averaged weights and a line of ``log.csv`` into the folder.
"""

import argparse
import csv
import math
import os
import time
from pathlib import Path

import torch
from mnist import load_digits
from torch import Tensor

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.images import save_grid

WARMUP = 300  # steps over which the learning rate rises
# Chosen on the trained network with tune_mnist.py. The step is 0.4 sigma_min^2.
SETTINGS = {"levels": 200, "steps_per_level": 1, "step_size": 4e-5, "exact_noise": True}
EMA = 0.999  # of the averaged weights; early on they average over a tenth of the steps so far


def weighting(sigma: Tensor) -> Tensor:
    """Equal weight to the backbone's own error at every level: 1 / c_out^2 of the row "karras"."""
    return sigma**2 * (1 + (sigma / 0.25) ** 2)


def draw_levels(n: int, schedule: NoiseSchedule) -> Tensor:
    """Half at all levels alike, half about 0.5, where samples settle which digit they are."""
    anywhere = schedule.sigmas[torch.randint(len(schedule), (n,))]
    about = (0.5 * torch.randn(n).exp()).clamp(schedule.sigmas[-1], schedule.sigmas[0])
    return torch.where(torch.arange(n) % 2 == 0, anywhere, about)


@torch.no_grad()
def held_out_loss(net: ScoreNet, x: Tensor) -> float:
    """The loss on test digits, in its default weighting, with the same noise every time."""
    net.eval()
    batches = x.split(250)
    generator = torch.Generator().manual_seed(0)
    with torch.autocast(x.device.type, torch.bfloat16):
        total = sum(float(dsm_loss(net, batch, generator=generator)) for batch in batches)
    net.train()
    return total / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="folder for checkpoints and pictures")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; 0 at the last step")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--depth", default="deeper", choices=["standard", "deeper"])
    parser.add_argument("--every", type=int, default=2000, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, to see that all runs")
    parser.add_argument("--stop-at", type=int, help="end early, at this step, as if interrupted")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch, args.width, args.every = 4, 8, 4, 2
    stop = args.steps if args.stop_at is None else min(args.steps, args.stop_at)

    torch.manual_seed(args.seed)
    train = load_digits(args.data, "train")[0].to(args.device)  # 47 MB: the whole set stays on the device
    test = load_digits(args.data, "test")[0][: 16 if args.smoke else 1000].to(args.device).float() / 255

    schedule = NoiseSchedule.from_data(train.float() / 255, max_images=200 if args.smoke else len(train))
    net = ScoreNet.ncsnv2(1, 28, width=args.width, depth=args.depth, schedule=schedule, precondition="karras")
    averaged = ScoreNet.ncsnv2(1, 28, width=args.width, depth=args.depth, schedule=schedule, precondition="karras")
    averaged.load_state_dict(net.state_dict())
    averaged.sampler_settings = SETTINGS
    for model in (net, averaged):
        model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    print(f"{schedule}, {sum(p.numel() for p in net.parameters()):,} parameters, D/2 = {test[0].numel() / 2:g}")

    args.out.mkdir(parents=True, exist_ok=True)
    state, log = args.out / "state.pt", args.out / "log.csv"
    step, seconds = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=args.device)
        net.load_state_dict(saved["net"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        step, seconds = saved["step"], saved["seconds"]
        print(f"goes on at step {step} of {args.steps}")

    begin, losses = time.perf_counter() - seconds, []
    while step < stop:
        decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / WARMUP) * decay
        batch = train[torch.randint(len(train), (args.batch,), device=args.device)]
        batch = (batch.float() / 255).to(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16):
            sigma = draw_levels(len(batch), schedule).to(args.device)
            loss = dsm_loss(net, batch, sigma=sigma, weighting=weighting)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        with torch.no_grad():
            rate = 1 - min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), rate)

        if step % args.every == 0 or step == stop:
            row = {
                "step": step,
                "images": step * args.batch,
                "seconds": round(time.perf_counter() - begin),
                "training loss": round(float(torch.stack(losses).mean()), 3),  # weighted: not comparable with D/2
                "test loss": round(held_out_loss(averaged, test), 3),
                "D/2": test[0].numel() / 2,
            }
            losses = []
            print(row, flush=True)
            new = not log.exists()
            with log.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
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
            averaged.save_pretrained(args.out / "network")
            sampler = AnnealedLangevinSampler(averaged, schedule.respaced(3) if args.smoke else None)
            images = sampler.sample(16, generator=torch.Generator().manual_seed(0), progress=False)
            save_grid(images, args.out / f"samples-{step:06d}.png")


if __name__ == "__main__":
    main()
