"""Evaluates samples of digits: a classifier's confidence, the balance of the classes, and a Fréchet distance.

    python examples/evaluate_mnist.py --data FOLDER                     # the network "mnist" of the package
    python examples/evaluate_mnist.py --data FOLDER --model runs/mnist/network --n 5000

The classifier is a small convolutional network, trained on the same 60,000 digits. It is trained once and saved in the
file ``--classifier``. The Fréchet distance compares means and covariances of its 128 features with those of the
training digits. It is not the FID, which uses features of Inception: compare only distances from the same classifier
and with the same number of samples. The numbers of test digits are printed beside those of the samples.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mnist import load_digits
from torch import Tensor, nn

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.images import save_grid


class Classifier(nn.Module):
    """Digits (N, 1, 28, 28) in [0, 1] -> logits (N, 10). ``features`` returns the 128 inputs of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in [(1, 32), (32, 64), (64, 128)]:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 9, 128), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.convolutions(2 * x - 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.last(self.dropout(self.features(x)))


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 4) -> Classifier:
    """A classifier of digits (uint8), trained with small shifts. After four epochs its accuracy is about 99.4 %."""
    torch.manual_seed(0)
    classifier = Classifier().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(2, steps))
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        x = torch.roll(images[index].float() / 255, shift, dims=(2, 3)).to(memory_format=torch.channels_last)
        F.cross_entropy(classifier(x), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval()


def load_classifier(path: Path, data: Path | None) -> Classifier:
    """The classifier of a file. If there is no such file, a classifier is trained and saved there."""
    if path.exists():
        classifier = Classifier()
        classifier.load_state_dict(torch.load(path, weights_only=True))
        return classifier.eval()
    classifier = train_classifier(*load_digits(data, "train"))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(classifier.state_dict(), path)
    return classifier


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, 10) and features (N, 128) of images (N, 1, 28, 28) in [0, 1]."""
    features = torch.cat([classifier.features(batch) for batch in images.split(1000)])
    return classifier.last(features).softmax(1), features


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 28, 28) that are classified as their labels (N,)."""
    return float((classify(classifier, images.clamp(0, 1))[0].argmax(1) == labels).float().mean())


def rmse(a: Tensor, b: Tensor) -> float:
    """The root mean square difference."""
    return float((a - b).square().mean().sqrt())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""The Fréchet distance of the Gaussians fitted to two sets of features (N, K).

    .. math:: |m_a - m_b|^2 + \mathrm{tr}(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2})
    """
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross)


def figures(classifier: Classifier, images: Tensor, reference: Tensor) -> dict[str, float]:
    """The figures of images (N, 1, 28, 28) in [0, 1], compared with reference features (M, 128).

    - "confident": the share with a class probability above 0.9.
    - "rarest": the share of the rarest digit.
    - "frechet": the Fréchet distance of the features to the reference.
    - "pixel std": the standard deviation of all pixels.
    - "variation": the mean absolute difference of neighboring pixels.
    - "share of 0" and so on: the share of each digit.
    """
    probabilities, features = classify(classifier, images)
    confidence, digit = probabilities.max(1)
    shares = torch.bincount(digit, minlength=10) / len(images)
    return {
        "confident": float((confidence > 0.9).float().mean()),
        "rarest": float(shares.min()),
        "frechet": frechet_distance(features, reference),
        "pixel std": float(images.std()),
        "variation": float(images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2,
        **{f"share of {digit}": float(share) for digit, share in enumerate(shares)},
    }


class Evaluation:
    """The classifier, the features of the training digits, and the test digits.

    Args:
        data: the folder with MNIST, or None.
        classifier: the file of the classifier.
    """

    def __init__(self, data: Path | None, classifier: Path) -> None:
        self.classifier = load_classifier(classifier, data)
        train = load_digits(data, "train")[0].float() / 255
        self.reference = classify(self.classifier, train)[1]
        self.pixel_std = float(train.std())
        test, self.labels = load_digits(data, "test")
        self.test = test.float() / 255

    def figures(self, images: Tensor) -> dict[str, float]:
        """The figures of images, compared with the training digits."""
        return figures(self.classifier, images, self.reference)

    def test_figures(self, n: int, seed: int) -> dict[str, float]:
        """The figures of n random test digits."""
        chosen = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(seed))[:n]
        return self.figures(self.test[chosen])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all programs that evaluate digits."""
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--model", default="mnist", help='a name or a folder ("mnist")')
    parser.add_argument(
        "--classifier", type=Path, default=Path("runs/digit_classifier.pt"), help="file of the classifier"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--n", type=int, default=1000, help="number of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where to write the first 64 samples")
    args = parser.parse_args(argv)

    evaluation = Evaluation(args.data, args.classifier)
    right = accuracy(evaluation.classifier, evaluation.test, evaluation.labels)
    print(f"the classifier's accuracy on the test digits is {right:.2%}")

    sampler = AnnealedLangevinSampler(ScoreNet.from_pretrained(args.model))
    print(sampler)
    begin = time.perf_counter()
    samples = sampler.sample(args.n, generator=args.seed)
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.picture is not None:
        save_grid(samples[:64], args.picture)
    columns = {
        "samples": evaluation.figures(samples),
        f"{min(args.n, len(evaluation.test))} test digits": evaluation.test_figures(args.n, args.seed),
    }
    print(f"{'':>12}" + "".join(f"{name:>20}" for name in columns))
    for name in columns["samples"]:
        print(f"{name:>12}" + "".join(f"{column[name]:>20.4f}" for column in columns.values()))


if __name__ == "__main__":
    main()
