"""Are samples of the default precision statistically those of float32?

    python benchmarks/precision.py --data FOLDER

Draws digits with the network that ships, three times: in the default precision, in float32 from the same seed, and in
float32 from another seed. The first line compares the first two, the second what two seeds differ by anyway: the root
mean square difference of two images, the Fréchet distance between the two sets in the features of the classifier of
``examples/evaluate_mnist.py``, and by how much their shares that the classifier is over 0.9 sure of, and their
deviations of all pixels, differ.
"""

import sys
from pathlib import Path

import torch
from common import parser, report

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from evaluate_mnist import figures, load_classifier, read

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.sampling.sampler import Precision


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    options.add_argument("--model", default="mnist", help='a short name or a folder ("mnist")')
    options.add_argument("--n", type=int, default=500, help="how many images")
    options.add_argument("--classifier", type=Path, default=Path("runs/digit_classifier.pt"))
    args = options.parse_args()

    classifier = load_classifier(args.classifier, args.data)
    net = ScoreNet.from_pretrained(args.model).to(args.device)
    schedule, steps = (net.schedule.respaced(20), {"steps_per_level": 1}) if args.smoke else (None, {})
    n = 8 if args.smoke else args.n

    def draw(precision: Precision, seed: int) -> torch.Tensor:
        sampler = AnnealedLangevinSampler(net, schedule, precision=precision, **steps)
        return sampler.sample(n, generator=torch.Generator().manual_seed(seed), progress=False).cpu()

    exact = draw("float32", 0)
    rows = []
    for name, images in {"auto, the same seed": draw("auto", 0), "float32, another seed": draw("float32", 1)}.items():
        features = read(classifier, exact)[1]
        ours, theirs = figures(classifier, images, features), figures(classifier, exact, features)
        rows.append(
            {
                f"{n} images against float32": name,
                "rms difference": float((images - exact).square().mean().sqrt()),
                "frechet": ours["frechet"],
                "confident": ours["confident"] - theirs["confident"],
                "std": ours["pixel std"] - theirs["pixel std"],
            }
        )
    report("precision", args, rows, bars="frechet")


if __name__ == "__main__":
    main()
