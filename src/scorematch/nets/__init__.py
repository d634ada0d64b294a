"""The published networks, with the submodule names of the published weights, and the registry of their families."""

from __future__ import annotations

from typing import Any

from torch import nn

from scorematch.nets.family import Condition, Family
from scorematch.nets.refinenet import NCSN, NCSNV2, RefineNet
from scorematch.nets.unet import UNET, UNet

FAMILIES: dict[str, Family[Any]] = {family.name: family for family in (NCSN, NCSNV2, UNET)}

__all__ = ["FAMILIES", "Condition", "Family", "RefineNet", "UNet", "family_of"]


def family_of(backbone: nn.Module) -> Family[Any] | None:
    """The family of a backbone; None for another class, also for a subclass, which may compute something else."""
    for family in FAMILIES.values():
        if type(backbone) is family.network and family.accepts(backbone):
            return family
    return None
