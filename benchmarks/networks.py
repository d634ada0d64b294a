"""Images per second through a network of published shape, with random weights: sampling, or training.

    python benchmarks/networks.py                                # DDPM's U-Net of CIFAR-10, against diffusers
    python benchmarks/networks.py --shape ncsnpp-celebahq-256 --batch 1
    python benchmarks/networks.py --shape ncsn                   # or ncsnv2: against the plain float32 path
    python benchmarks/networks.py --shape unet --train --batch 64
    python benchmarks/networks.py --compile                      # torch.compile as well

diffusers runs as a user starts it (float32) and at its best (channels_last, with bfloat16 weights and under autocast).
"of peak" is the share of the machine's matrix-multiply rate in the row's own precision, measured in the same run; FLOPs
are those of the original network. In training, each step is a loss, its gradient, and a step of fused AdamW.
"""

import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import alternate, matmul_peak, parser, ratio, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.nets.inference import native_dtype
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
SMALL = {  # 6.3 million parameters, of a size that one trains at home
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
SHAPES = {"ddpm-cifar10-32": (DDPM, 32), "ncsnpp-celebahq-256": (NCSNPP, 256), "unet": (SMALL, 32)}
SCHEDULE = NoiseSchedule.geometric(50, 0.01, 1000)
LAST = torch.channels_last


def build(shape: str, smoke: bool) -> tuple[ScoreNet, nn.Module | None, int]:
    """A network, diffusers' with the same weights if it is one of theirs, and the side of its images."""
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
    return ScoreNet(ours, SCHEDULE, precondition="ncsnpp" if fourier else "ddpm"), theirs, size


def sampling(
    net: ScoreNet, theirs: nn.Module | None, x: Tensor, compile_too: bool
) -> dict[str, tuple[Callable[[], Any], torch.dtype]]:
    """What is compared, and the precision that each computes in."""
    sigma, levels = torch.tensor(0.5, device=x.device), torch.full((len(x),), 0.5, device=x.device)
    last, fast = x.to(memory_format=LAST), net.inference_copy()
    short, low = native_dtype(x.device), torch.bfloat16
    runs: dict[str, tuple[Callable[[], Any], torch.dtype]] = {}
    if theirs is not None:
        as_started = copy.deepcopy(theirs).eval()
        best = copy.deepcopy(as_started).to(memory_format=LAST)
        weights = copy.deepcopy(best).to(low)

        def autocast() -> None:
            with torch.autocast(x.device.type, low):
                best(last, levels)

        runs["diffusers, as started"] = (lambda: as_started(x, levels), torch.float32)
        runs["diffusers, bfloat16 weights"] = (lambda: weights(last.to(low), levels), low)
        runs["diffusers, autocast"] = (autocast, low)
    runs['here, "float32"'] = (lambda: net(x, sigma), torch.float32)
    runs['here, "auto"'] = (lambda: fast(x, sigma), short)
    if compile_too:
        compiled = net.inference_copy(compile=True)
        runs['here, "auto", compiled'] = (lambda: compiled(x, sigma), short)
    return runs


def training(net: ScoreNet, theirs: nn.Module | None, x: Tensor) -> dict[str, tuple[Callable[[], Any], torch.dtype]]:
    """Training steps under autocast in channels_last, and in plain float32 here."""

    def step(score: Callable[..., Tensor], parameters: list[nn.Parameter], x: Tensor, low: bool) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def run() -> None:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                loss = dsm_loss(score, x, net.schedule)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    last = x.to(memory_format=LAST)
    plain, fast = copy.deepcopy(net).train(), copy.deepcopy(net).to(memory_format=LAST).train()
    runs = {}
    if theirs is not None:
        best = copy.deepcopy(theirs).to(memory_format=LAST).train()

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            return best(x, net.schedule.position(sigma)).sample

        runs["diffusers, autocast"] = (step(score, list(best.parameters()), last, True), torch.bfloat16)
    runs["here, float32"] = (step(plain, list(plain.parameters()), x, False), torch.float32)
    runs["here, autocast"] = (step(fast, list(fast.parameters()), last, True), torch.bfloat16)
    return runs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", default="ddpm-cifar10-32", choices=[*SHAPES, "ncsn", "ncsnv2"])
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--train", action="store_true")
    options.add_argument("--compile", action="store_true")
    args = options.parse_args()
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
    flops = counter.get_total_flops() * (3 if args.train else 1)  # a gradient is two more products of the same size
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
                f"{args.shape}, batch {args.batch}": name,
                "images/s": rate,
                "ratio": ratio(seconds, first, name),
                "TFLOP/s": rate * flops / 1e12,
                "of peak": rate * flops / peaks[dtype],
            }
        )
    print(f"{flops / 1e9:.3g} GFLOP an image, {sum(p.numel() for p in net.parameters()):,} parameters")
    report(f"{'training' if args.train else 'sampling'}-{args.shape}", args, rows, bars="images/s")


if __name__ == "__main__":
    main()
