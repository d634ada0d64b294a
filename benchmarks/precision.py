"""Compares samples in the default precision with samples in float32, statistically.

    python benchmarks/precision.py --data FOLDER

The program draws digits with the network "mnist" three times: in the default precision, in float32 with the same seed,
and in float32 with another seed. The first row of the table compares the first two sets. The second row compares the
two seeds, as a scale for the first row. The columns are the root mean square difference of two images, the Fréchet
distance of the two sets in the features of the classifier of ``examples/digit_classifier.py``, and the differences in
the share of confident classifications (class probability above 0.9) and in the standard deviation of all pixels.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import parser, report

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digit_classifier import add_options, load_classifier

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.evaluation import Evaluator, values
from scorematch.sampling.sampler import Precision


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_options(options)
    options.add_argument("--n", type=int, default=500, help="number of images")
    args = options.parse_args(argv)
    if args.smoke:
        args.n = 8

    classifier = load_classifier(args.classifier, args.data)
    net = ScoreNet.from_pretrained(args.model).to(args.device)

    def draw(precision: Precision, seed: int) -> torch.Tensor:
        sampler = AnnealedLangevinSampler(net, levels=20 if args.smoke else None, precision=precision)
        return sampler.sample(args.n, generator=seed, progress=False).cpu()

    exact = draw("float32", 0)
    evaluator = Evaluator(exact, features=classifier, metrics=["frechet", "classes"], cache=False, progress=False)
    expected, rows = values(evaluator.measure([exact])), []
    for name, images in {'"auto", same seed': draw("auto", 0), "float32, another seed": draw("float32", 1)}.items():
        found = values(evaluator.measure([images]))
        rows.append(
            {
                f"{args.n} images against float32": name,
                "rms difference": float((images - exact).square().mean().sqrt()),
                "Fréchet distance": found["frechet"],
                "confident": found["confident"] - expected["confident"],
                "std": found["std"] - expected["std"],
            }
        )
    report("precision", args, rows, bars="Fréchet distance")


if __name__ == "__main__":
    main()
