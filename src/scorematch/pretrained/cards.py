"""Cards: what is known about each network that has a name, and what is not.

A card gives the source of every figure of quality, and says whether the sampler settings were measured on the weights
themselves. A network whose license or origin is unclear has no short name.
"""

from __future__ import annotations

from dataclasses import dataclass

from scorematch.sampling.settings import SamplerSettings


@dataclass(frozen=True)
class Card:
    """What is known about one network.

    Attributes:
        name: the short name for ``ScoreNet.from_pretrained``, or None.
        repository: ``owner/name`` on the Hugging Face Hub, or None for a network that ships with the package.
        revision: the commit to load, or None for the main branch.
        license: of the weights.
        shape: of a sample, (C, H, W).
        data: what it was trained on.
        sigmas: its highest and its lowest noise level, in units of images in [0, 1].
        levels: the number of noise levels.
        parameters: the number of parameters.
        settings: the recommended sampler settings, or None for those that its format gives to every network of its
            kind.
        settings_source: where the settings come from.
        quality: what is known about its quality, and from where.
        correction: whether ``sigmas`` and ``levels`` replace those of the repository's configuration.
    """

    name: str | None
    repository: str | None
    revision: str | None
    license: str
    shape: tuple[int, int, int]
    data: str
    sigmas: tuple[float, float]
    levels: int
    parameters: int
    settings: SamplerSettings | None
    settings_source: str
    quality: str
    correction: bool = False


# Of the settings that pretrained/diffusers.py recommends.
_OF_DDPM = (
    "consistent sampling, 250 calls, little noise: best in published results of similar networks and on a small "
    "network of color images (docs/pretrained.md); not measured on these weights"
)
_OF_VE = (
    "consistent sampling, 250 calls, close to the published step of variance exploding networks (docs/pretrained.md); "
    "not measured on these weights"
)

CARDS = (
    Card(
        name="mnist",
        repository=None,
        revision=None,
        license="MIT",
        shape=(1, 28, 28),
        data="MNIST, 60,000 handwritten digits",
        sigmas=(16.9, 0.01),
        levels=95,
        parameters=2_938_009,
        settings=SamplerSettings(levels=100, step_size=5e-5, consistent=True),
        settings_source="measured on these weights; see the network's README",
        quality="see weights/mnist/README.md",
    ),
    Card(
        name="palette-mnist",
        repository=None,
        revision=None,
        license="MIT",
        shape=(3, 28, 28),
        data="MNIST in three colors of equal luma; restores images",
        sigmas=(21.6, 0.01),
        levels=173,
        parameters=1_114_819,
        settings=SamplerSettings(levels=30, step_size=4.112e-5, consistent=True),
        settings_source="measured on these weights; see the network's README",
        quality="see weights/palette-mnist/README.md",
    ),
    Card(
        name="cifar10",
        repository="google/ddpm-cifar10-32",
        revision="267b167dc01f0e4e61923ea244e8b988f84deb80",
        license="Apache-2.0",
        shape=(3, 32, 32),
        data="CIFAR-10",
        sigmas=(78.7, 0.005),
        levels=1000,
        parameters=35_746_307,
        settings=None,
        settings_source=_OF_DDPM,
        quality=(
            "unknown for the stored weights. The repository quotes the paper (FID 3.17, 1,000 ancestral steps) and "
            "does not say whether it holds the averaged weights; an independent conversion measured FID 3.21 with the "
            "averaged weights and 12.14 with the others"
        ),
    ),
    Card(
        name="celebahq",
        repository="google/ncsnpp-celebahq-256",
        revision=None,
        license="Apache-2.0",
        shape=(3, 256, 256),
        data="CelebA-HQ at 256 pixels",
        sigmas=(348, 0.01),
        levels=2000,
        parameters=65_574_549,
        settings=None,
        settings_source=_OF_VE,
        quality="not published",
        # It was trained with 348; 1348 is the default of its scheduler's class, and may be stored instead.
        correction=True,
    ),
    Card(
        name=None,
        repository="google/ddpm-celebahq-256",
        revision="cd5c944777ea2668051904ead6cc120739b86c4d",
        license="Apache-2.0",
        shape=(3, 256, 256),
        data="CelebA-HQ at 256 pixels",
        sigmas=(78.7, 0.005),
        levels=1000,
        parameters=113_673_219,
        settings=None,
        settings_source=_OF_DDPM,
        quality="not published for these weights",
    ),
    Card(
        name=None,
        repository="newsyctw/NCSN_CIFAR10_my",
        revision=None,
        license="not stated",
        shape=(3, 32, 32),
        data="CIFAR-10",
        sigmas=(380, 0.01),
        levels=2000,
        parameters=61_894_924,
        settings=None,
        settings_source=_OF_VE,
        quality="not published. The same account also holds backdoored networks: use this repository only",
    ),
)


def find(name: str) -> Card | None:
    """The card of a short name or a repository, or None."""
    return next((card for card in CARDS if name in (card.name, card.repository)), None)


def table() -> str:
    """All cards as text, for a terminal."""
    lines, indent = [], 2 + max(len(card.name or "-") for card in CARDS)
    for card in CARDS:
        shape = "x".join(map(str, card.shape))
        where = "ships with the package" if card.repository is None else card.repository
        lines.append(f"{card.name or '-':<{indent}}{where}{f' at {card.revision[:12]}' if card.revision else ''}")
        lines.append(
            f"{'':<{indent}}{shape}, {card.data}; {card.parameters:,} parameters; {card.levels} levels "
            f"{card.sigmas[0]:g} -> {card.sigmas[1]:g}; license {card.license}"
        )
        lines.append(f"{'':<{indent}}sampler settings: {card.settings_source}")
        lines.append(f"{'':<{indent}}quality: {card.quality}")
    return "\n".join(lines)
