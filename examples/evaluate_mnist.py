"""Evaluates samples of digits with the features of a classifier of digits.

    python examples/evaluate_mnist.py --data FOLDER                     # the network "mnist" of the package
    python examples/evaluate_mnist.py --data FOLDER --model runs/mnist/network --n 5000 --out runs/5000

The program calls ``scorematch.evaluation.evaluate`` with the classifier of ``digit_classifier.py`` as the extractor. It
prints these figures of the samples, of as many test digits, and of images from a Gaussian:

- the Fréchet distance to the 60,000 training digits;
- the share of samples for which the classifier gives one digit a probability above 0.9;
- the share of the rarest digit;
- figures of the pixels.

Then it prints the shares of all digits in the samples. A network with classes draws a random class for each sample. The
folder ``--out`` has the tables and the samples. The same command again uses these samples and draws no others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digit_classifier import add_options, classify, load_classifier
from mnist import load_digits

from scorematch import ScoreNet
from scorematch.data import read_samples, to_uint8
from scorematch.evaluation import evaluate
from scorematch.guidance import classifier_free


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--n", type=int, default=1000, help="number of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="weight of classifier-free guidance, for a network with classes")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate_mnist"), help="folder for tables and samples")
    args = parser.parse_args(argv)

    classifier = load_classifier(args.classifier, args.data)
    test, labels = load_digits(args.data, "test")
    right = (classify(classifier, test) == labels).float().mean()
    print(f"the classifier's accuracy on the test digits is {right:.2%}")
    net = ScoreNet.from_pretrained(args.model)
    has_classes = net.conditioning is not None and net.conditioning.classes is not None
    result = evaluate(
        net if args.guidance is None else classifier_free(net, args.guidance),
        load_digits(args.data, "train")[0],
        n=args.n,
        classes="random" if has_classes else None,
        features=classifier,
        metrics=["frechet", "classes"],
        held_out=test,
        seed=args.seed,
        out=args.out,
    )
    print(result.table(), end="")
    digits = classify(classifier, to_uint8(read_samples(args.out / "samples", args.n)))
    shares = torch.bincount(digits, minlength=10) / args.n
    print(f"shares of the digits from 0 to 9: {' '.join(f'{share:.1%}' for share in shares.tolist())}")


if __name__ == "__main__":
    main()
