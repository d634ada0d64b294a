"""``scorematch recipes``: lists the recipes of ``train``, with what they cost."""

from __future__ import annotations

import argparse

import torch

from scorematch.cli.options import Commands
from scorematch.training import RECIPES, Recipe, Settings
from scorematch.training.recipes import training_flop

_COLUMNS = (
    *("recipe", "network", "parameters", "side, px", "batch", "learning rate", "averages", "images"),
    *("GFLOP per image", "total FLOP"),
)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes for training",
        description="Lists the recipes of the command train, with what they cost: the floating-point operations of a "
        "training\nstep per image, and of the whole run. In the column averages, a value up to 0.289 is a "
        "length relative to\nthe run, and a larger value is a decay per step. train --help names the sources.",
        epilog="Example:\n  %(prog)s",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    print(table())


def table() -> str:
    """All recipes as a table in Markdown."""
    rows = [_COLUMNS, *(_row(recipe) for recipe in RECIPES.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(recipe: Recipe) -> tuple[str, ...]:
    settings = Settings(**recipe.options())
    with torch.device("meta"):  # no memory for the weights, and nothing is drawn
        net = recipe.build(recipe.channels or 3)
    flop = training_flop(net)
    return (
        recipe.name,
        recipe.title,
        f"{sum(parameter.numel() for parameter in net.parameters()):,}",
        str(recipe.image_size),
        str(settings.batch_size),
        f"{settings.lr:g}",
        ", ".join(f"{length:g}" for length in settings.ema) or "none",
        f"{settings.total:,}",
        f"{flop / 1e9:.3g}" if flop < 1e12 else f"{flop / 1e9:,.0f}",
        f"{flop * settings.total:.2g}",
    )
