"""A classifier of handwritten digits, for the programs that evaluate digits. It is an extractor with logits.

The classifier is a small convolutional network, trained on the 60,000 training digits of MNIST once, and then saved in
the file ``--classifier``. Distances between its 128 features are not the FID, which uses features of Inception: compare
only distances from the same classifier and with the same number of samples.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from mnist import load_digits
from torch import Tensor, nn


class Classifier(nn.Module):
    """Maps digits (N, 1, 28, 28), uint8, to 128 features, the inputs of the last layer, and logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in [(1, 32), (32, 64), (64, 128)]:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 9, 128), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        features = self.convolutions(2 * (images.float() / 255) - 1)
        return features, self.last(self.dropout(features))


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
        x = torch.roll(images[index], shift, dims=(2, 3)).to(memory_format=torch.channels_last)
        F.cross_entropy(classifier(x)[1], labels[index]).backward()
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
def classify(classifier: Classifier, images: Tensor) -> Tensor:
    """The most probable digits (N,) of images (N, 1, 28, 28), uint8."""
    return torch.cat([classifier(batch)[1].argmax(1) for batch in images.split(1000)])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all programs that evaluate digits."""
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--model", default="mnist", help='a name or a folder ("mnist")')
    parser.add_argument(
        "--classifier", type=Path, default=Path("runs/digit_classifier.pt"), help="file of the classifier"
    )
