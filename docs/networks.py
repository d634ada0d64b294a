"""The parts of pages that are made from the cards of networks, which conf.py puts in place of their marks.

The mark of a part is ``<!-- made: NAME -->``, on a line of its own. A network that ships with the package, and its
README.md, appear without any change of the pages. The pictures are ``images/networks/NAME.png``.
"""

from pathlib import Path

from scorematch.pretrained import cards

DOCS = Path(__file__).parent
CAPTIONS = {
    "mnist-classes": "Four samples of each class, with guidance of weight 1.5:",
    "cifar10-small": "Four samples of each class, with rescaled guidance of weight 2.5:",
    "celeba-small": "Samples of `AnnealedLangevinSampler(net)`, with 50 network calls:",
    "palette-mnist": "In each half of a row: a degraded image, six restorations, and the original, drawn by `mnist`.",
    "palette-celeba": (
        "In each half of a row: a degraded image, six restorations, and the original, drawn by `celeba-small`."
    ),
}


def shipped() -> list[cards.Card]:
    """The cards of the networks that ship with the package."""
    return [card for card in cards.CARDS if card.repository is None]


def table() -> str:
    """A table of all networks that load by a name or a repository."""
    lines = ["| name | where | images | parameters | noise levels | license |", "|---|---|---|---|---|---|"]
    for card in cards.CARDS:
        name = "" if card.name is None else f"`{card.name}`"
        where = f"[ships with the package](networks.md#{card.name})"
        if card.repository is not None:
            commit = "" if card.revision is None else f" at `{card.revision[:12]}`"
            where = f"[`{card.repository}`](https://huggingface.co/{card.repository}){commit}"
        levels = f"{card.levels}, {card.sigmas[0]:g} -> {card.sigmas[1]:g}"
        images = f"{'x'.join(map(str, card.shape))}, {card.data}"
        lines.append(f"| {name} | {where} | {images} | {card.parameters:,} | {levels} | {card.license} |")
    return "\n".join(lines)


def grids() -> str:
    """A section for each network that ships: its picture, its quality, and a link to its card."""
    parts = []
    for card in shipped():
        parts.append(f"### {card.name}\n\n{card.data}. Quality: {card.quality}. [Its card](networks.md#{card.name}).")
        picture = f"images/networks/{card.name}.png"
        if (DOCS / picture).exists():
            parts.append(CAPTIONS.get(card.name, "Samples with the recommended settings:"))
            parts.append(f"![Images made by the network {card.name}]({picture})")
    return "\n\n".join(parts)


def readmes() -> str:
    """The README.md of each network that ships, as one section each."""
    parts = []
    for card in shipped():
        path = f"../src/scorematch/weights/{card.name}/README.md"
        parts.append(f"```{{include}} {path}\n:relative-docs: ../\n:relative-images:\n:heading-offset: 1\n```")
    return "\n\n".join(parts)


PARTS = {"table": table, "grids": grids, "cards": readmes}
