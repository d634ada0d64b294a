"""Images per second of a network with a published architecture and random weights, for sampling or training.

    python benchmarks/networks.py                                # DDPM's U-Net of CIFAR-10, compared with diffusers
    python benchmarks/networks.py --shape ncsnpp-celebahq-256 --batch 1
    python benchmarks/networks.py --shape ncsn                   # or ncsnv2: compared with precision="float32"
    python benchmarks/networks.py --shape unet --train --batch 64
    python benchmarks/networks.py --compile                      # with torch.compile too

diffusers runs with default settings ("as started", float32), in channels_last, and, if the machine multiplies bfloat16
natively, with bfloat16 weights and under autocast. "of peak" is the FLOP/s relative to that of large matrix products in
the precision of the row, measured in the same run; the FLOPs are those of the original network. A training step is a
loss, its gradient, and a step of fused AdamW.
"""

import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import alternate, matmul_peak, parser, ratio, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.precision import autocast, exact_float32, native_dtype
from scorematch.nets.unet import UNet

DDPM = {
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NCSNPP = {
    "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
    "down_block_types": (*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2),
    "up_block_types": (*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4),
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "attention_head_dim": None,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
}
SMALL = {  # 6.5 million parameters
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
SHAPES = {"ddpm-cifar10-32": (DDPM, 32), "ncsnpp-celebahq-256": (NCSNPP, 256), "unet": (SMALL, 32)}
SCHEDULE = NoiseSchedule.geometric(50, 0.01, 1000)
LAST = torch.channels_last

Runs = dict[str, tuple[Callable[[], Any], torch.dtype]]


def build(shape: str, smoke: bool) -> tuple[ScoreNet, nn.Module | None, int]:
    """A network, the network of diffusers with the same weights or None, and the side of its images in pixels."""
    if shape not in SHAPES:
        return getattr(ScoreNet, shape)(3, 32, width=8 if smoke else 128), None, 32
    from diffusers import UNet2DModel

    options, size = SHAPES[shape]
    if smoke:
        options, size = {**options, "block_out_channels": (32,) * len(options["block_out_channels"])}, 64
    fourier = "time_embedding_type" in options
    theirs = UNet2DModel(sample_size=size, **options)
    ours = UNet(**options)
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key != "time_proj.W"})
    net = ScoreNet(ours, SCHEDULE, precondition="ncsnpp" if fourier else "ddpm", sample_shape=(3, size, size))
    return net, theirs, size


def sampling(net: ScoreNet, theirs: nn.Module | None, x: Tensor, compile_too: bool) -> Runs:
    """The network calls to compare, each with the dtype of its matrix products."""
    sigma, levels = 0.5, torch.full((len(x),), 0.5, device=x.device)
    last, short = x.to(memory_format=LAST), native_dtype(x.device)
    runs: Runs = {}
    if theirs is not None:
        as_started = copy.deepcopy(theirs).eval()
        best = copy.deepcopy(as_started).to(memory_format=LAST)
        runs["diffusers, as started"] = (lambda: as_started(x, levels), torch.float32)
        runs["diffusers, channels_last"] = (lambda: best(last, levels), torch.float32)
        if short == torch.bfloat16:
            weights = copy.deepcopy(best).to(short)

            def under_autocast() -> None:
                with autocast(x.device):
                    best(last, levels)

            runs["diffusers, channels_last, bfloat16 weights"] = (lambda: weights(last.to(short), levels), short)
            runs["diffusers, channels_last, autocast"] = (under_autocast, short)

    def exact() -> None:
        with exact_float32():
            net(x, sigma)

    fast = net.inference_copy()
    runs['scorematch, "float32"'] = (exact, torch.float32)
    runs['scorematch, "auto"'] = (lambda: fast(x, sigma), short)
    if compile_too:
        compiled = net.inference_copy(compile=True)
        runs['scorematch, "auto", compiled'] = (lambda: compiled(x, sigma), short)
    return runs


def training(net: ScoreNet, theirs: nn.Module | None, x: Tensor) -> Runs:
    """Training steps in channels_last: in float32, and under autocast if the machine multiplies bfloat16 natively."""

    def step(score: Callable[..., Tensor], parameters: list[nn.Parameter], low: bool) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def run() -> None:
            with autocast(x.device, "bfloat16" if low else "float32"):
                loss = dsm_loss(score, last, net.schedule)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    last = x.to(memory_format=LAST)
    native = native_dtype(x.device) == torch.bfloat16
    runs: Runs = {}
    if theirs is not None:
        best = copy.deepcopy(theirs).to(memory_format=LAST).train()

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            return best(x, net.schedule.position(sigma)).sample

        name = f"diffusers, {'autocast' if native else 'float32'}"
        runs[name] = (step(score, list(best.parameters()), native), native_dtype(x.device))
    for name, low in [("float32", False), ("autocast", True)]:
        if native or not low:
            ours = copy.deepcopy(net).to(memory_format=LAST).train()
            runs[f"scorematch, {name}"] = (
                step(ours, list(ours.parameters()), low),
                torch.bfloat16 if low else torch.float32,
            )
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--shape", default="ddpm-cifar10-32", choices=[*SHAPES, "ncsn", "ncsnv2"])
    options.add_argument("--batch", type=int, default=16, help="images per batch")
    options.add_argument("--train", action="store_true", help="measure training steps instead of network calls")
    options.add_argument("--compile", action="store_true", help="also measure the compiled network")
    args = options.parse_args(argv)
    if args.smoke:
        args.batch, args.repeats = 2, 1

    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    net, theirs, size = build(args.shape, args.smoke)
    net.to(args.device).eval()
    theirs = None if theirs is None else theirs.to(args.device)
    x = torch.rand(args.batch, 3, size, size, device=args.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x[:1], 0.5)
    flops = counter.get_total_flops() * (
        3 if args.train else 1
    )  # the gradient takes two more products of the same size
    with torch.set_grad_enabled(args.train):
        runs = training(net, theirs, x) if args.train else sampling(net, theirs, x, args.compile)
        seconds = alternate({name: run for name, (run, _) in runs.items()}, args.repeats, args.device)
    peaks = {dtype: matmul_peak(dtype, args.device, 64 if args.smoke else 2048) for _, dtype in runs.values()}
    first = next(iter(runs))
    rows = []
    for name, (_, dtype) in runs.items():
        rate = args.batch / statistics.median(seconds[name])
        rows.append(
            {
                f"{args.shape}, batch {args.batch}, {flops / 1e9:.3g} GFLOP per image": name,
                "images/s": rate,
                "ratio": ratio(seconds, first, name),
                "of peak": rate * flops / peaks[dtype],
            }
        )
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
    report(f"{'training' if args.train else 'sampling'}-{args.shape}", args, rows, bars="images/s")


if __name__ == "__main__":
    main()
