"""The networks that are known by name: where they are, what they were trained on, what is known of them and what is
not.

A card is a fact sheet, not a promise. Where a figure of quality is given, its source is; sampler settings that were not
measured on the very weights say so. No network of doubtful license or origin has a short name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scorematch.noise import NoiseSchedule


@dataclass(frozen=True)
class Card:
    """What is known of one network.

    Attributes:
        name: the short name for ``ScoreNet.from_pretrained``, or None.
        repository: ``owner/name`` on the Hugging Face Hub, or None for a network that ships with the package.
        revision: the commit that is meant, where one is known.
        license: of the weights.
        shape: of a sample, (C, H, W).
        data: what it was trained on.
        sigmas: its loudest and quietest noise level, in units of images in [0, 1].
        levels: how many it has.
        parameters: how many.
        settings_source: where the recommended sampler settings come from.
        quality: what is known of its quality, and from where.
        correction: whether ``sigmas`` and ``levels`` overrule what the repository's configuration says.
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
    settings_source: str
    quality: str
    correction: bool = False


# Of layout.py: those that it gives to every network of the kind.
_OF_DDPM = (
    "consistent, 250 calls, with little noise, which is best by what is published of networks like it and by what a "
    "small one does in color (docs/pretrained.md); not measured on these weights"
)
_OF_VE = (
    "consistent, 250 calls, near the step that is published for variance exploding networks (docs/pretrained.md); not "
    "measured on these weights"
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
        settings_source="measured on these weights; see the network's own card",
        quality="see the network's own card, weights/mnist/README.md",
    ),
    Card(
        name="palette-mnist",
        repository=None,
        revision=None,
        license="MIT",
        shape=(3, 28, 28),
        data="MNIST in three colors of one luma; it restores",
        sigmas=(21.6, 0.01),
        levels=173,
        parameters=1_114_819,
        settings_source="measured on these weights; see the network's own card",
        quality="see the network's own card, weights/palette-mnist/README.md",
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
        settings_source=_OF_DDPM,
        quality=(
            "unknown for the stored weights. The repository quotes the paper (FID 3.17, 1,000 ancestral steps), but "
            "does not say whether these are its averaged weights; an independent conversion measured 3.21 for those "
            "and 12.14 for the others"
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
        settings_source=_OF_VE,
        quality="not published",
        # It was trained with 348; a stored 1348 would be the default of its scheduler's class.
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
        settings_source=_OF_VE,
        quality="not published. The same account also holds backdoored networks: take this repository only",
    ),
)


def find(name: str) -> Card | None:
    """The card of a short name or a repository, or None."""
    return next((card for card in CARDS if name in (card.name, card.repository)), None)


def model_card(
    repo_id: str,
    config: dict[str, Any],
    parameters: int,
    license: str | None,  # noqa: A002  (the Hub's word)
    datasets: Sequence[str] | None,
) -> str:
    """The README.md of a network on the Hub: what its pages need to know, how to use it, what it is.

    Args:
        repo_id: ``owner/name``.
        config: of the network.
        parameters: how many it has.
        license: as the Hub abbreviates it, or None.
        datasets: their names on the Hub, or None.
    """
    from huggingface_hub import ModelCardData

    shape, schedule, settings = config["sample_shape"], NoiseSchedule.from_dict(config["schedule"]), config["sampler"]
    image = shape is not None and len(shape) == 3
    beside = config.get("in_channels", 0) - shape[0] if image and "in_channels" in config else 0
    load, draw = f'net = ScoreNet.from_pretrained("{repo_id}")', "images = AnnealedLangevinSampler(net).sample(4)"
    first = "from scorematch import AnnealedLangevinSampler, ScoreNet"
    if config["family"] == "custom":
        load = load[:-1] + ", backbone=YourModule())  # of the class whose weights these are"
    if config.get("num_class_embeds"):
        first = f"import torch\n{first}"
        draw = draw[:-2] + f"condition=torch.arange(4) % {config['num_class_embeds']})  # which classes"
    elif beside > 0:
        size = ", ".join(map(str, shape[1:]))
        first = f"import torch\n{first}"
        draw = draw[:-2] + f"condition=torch.rand(4, {beside}, {size}))  # your images, in [0, 1]"
    elif shape is None:
        draw = draw[:-1] + ", shape=...)  # of one sample, without the batch"
    pipeline = "image-to-image" if beside > 0 else "unconditional-image-generation"
    data = ModelCardData(
        library_name="scorematch",
        license=license,
        datasets=None if datasets is None else list(datasets),
        pipeline_tag=pipeline if image else None,
        tags=["score-matching", "langevin-dynamics"],
    )
    if settings is None:
        recommended = "none recommended: they follow from the ladder"
    else:
        recommended = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A score network for [scorematch](https://pypi.org/project/scorematch): `net(x, sigma)` is the score of images in [0, 1]
perturbed with noise of level sigma.

```python
{first}

{load}
{draw}
```

| | |
|---|---|
| family | {config["family"]}, preconditioning "{config["precondition"]}" |
| sample | {"any shape" if shape is None else "x".join(map(str, shape))} |
| parameters | {parameters:,} |
| noise levels | {len(schedule)}, {schedule.sigma_max:.3g} -> {schedule.sigma_min:.3g} |
| sampler settings | {recommended} |
"""


def table() -> str:
    """All cards, for a terminal."""
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
