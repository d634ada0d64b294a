"""Whether samples of the default precision are statistically those of float32.

    python benchmarks/precision.py --data FOLDER

The program draws digits with the network of the package three times: with the default precision, in float32 from the
same seed, and in float32 from another seed. The first line of the table compares the first two. The second line
compares two seeds, as a scale for the first. The figures are the root mean square difference of two images, the Fréchet
distance of the two sets in the features of the classifier of ``examples/evaluate_mnist.py``, and the differences in the
share of confident classifications and in the standard deviation of all pixels.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import parser, report

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from evaluate_mnist import add_options, classify, figures, load_classifier, rmse

from scorematch import AnnealedLangevinSampler, ScoreNet
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
    rows = []
    for name, images in {'"auto", same seed': draw("auto", 0), "float32, another seed": draw("float32", 1)}.items():
        features = classify(classifier, exact)[1]
        found, expected = figures(classifier, images, features), figures(classifier, exact, features)
        rows.append(
            {
                f"{args.n} images against float32": name,
                "rms difference": rmse(images, exact),
                "Fréchet distance": found["frechet"],
                "confident": found["confident"] - expected["confident"],
                "std": found["pixel std"] - expected["pixel std"],
            }
        )
    report("precision", args, rows, bars="Fréchet distance")


if __name__ == "__main__":
    main()
