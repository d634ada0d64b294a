"""Draws the pictures of faces in the documentation: samples of celeba-small, and restorations of these samples.

    python examples/faces.py --out docs/images

The program writes three pictures. Nothing in them is selected:

- networks/celeba-small.png: 40 samples;
- faces.png: the first five of them after five degradations, restored by celeba-small, which was not trained for it;
- networks/palette-celeba.png: the first eight, two for each task, restored by palette-celeba.

The restorations of a face are shown between the degraded image and the original.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.data import save_grid
from scorematch.restoration import JPEG, AveragePool, Grayscale, Mask, Observation, Operator, Uncrop
from scorematch.restoration.palette import Inpainting, Task, Uncropping, condition_of
from scorematch.sampling import Sampler, recommended_sampler


def middle(side: int) -> Mask:
    """Hides a square in the middle of an image."""
    mask = torch.ones(side, side, dtype=torch.bool)
    first = side * 2 // 7
    mask[first : side - first, first : side - first] = False
    return Mask(mask)


def hole(task: Task, face: Tensor, generator: torch.Generator) -> Mask:
    """Hides the random hole of a task."""
    _, mask = task(face, generator)
    return Mask(~mask[0])


def restorations(sampler: Sampler, face: Tensor, operator: Operator, generator: torch.Generator, n: int) -> Tensor:
    """The degraded face (1, 3, H, W), n restorations and the original, (n + 2, 3, H, W)."""
    y = operator.measure(face)
    degraded, condition = operator.as_image(y), None
    if sampler.net.conditioning.channels > 0:  # a network that was trained for restoration
        condition = condition_of(operator, y.expand(n, -1, -1, -1), generator)
        degraded = condition[:1]
    restored = sampler.sample(n, condition=condition, observation=Observation(operator, y), generator=generator)
    return torch.cat([degraded.clamp(0, 1), restored, face])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--levels", type=int, help="number of noise levels; fewer are faster")
    parser.add_argument("-n", type=int, default=6, help="restorations of a face")
    args = parser.parse_args(argv)

    net = ScoreNet.from_pretrained("celeba-small")
    sampler = AnnealedLangevinSampler(net, levels=args.levels)
    faces = sampler.sample(40, generator=0)
    save_grid(faces, args.out / "networks" / "celeba-small.png", columns=10)
    faces, generator = faces.split(1), torch.Generator().manual_seed(1)

    operators = [middle(64), Uncrop(right=32), AveragePool(4), Grayscale(), JPEG(5)]
    rows = [restorations(sampler, *pair, generator, args.n) for pair in zip(faces, operators, strict=False)]
    save_grid(torch.cat(rows), args.out / "faces.png", columns=args.n + 2)

    sampler = recommended_sampler(ScoreNet.from_pretrained("palette-celeba"), levels=args.levels)
    inpainted = [hole(Inpainting(), face, generator) for face in faces[2:4]]
    uncropped = [hole(Uncropping(), face, generator) for face in faces[4:6]]
    operators = [Grayscale(), Grayscale(), *inpainted, *uncropped, JPEG(5), JPEG(5)]
    rows = [restorations(sampler, *pair, generator, args.n) for pair in zip(faces, operators, strict=False)]
    save_grid(torch.cat(rows), args.out / "networks" / "palette-celeba.png", columns=2 * (args.n + 2))


if __name__ == "__main__":
    main()
