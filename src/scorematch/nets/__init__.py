"""The published networks, with the submodule names of the published weights, and the registry of their families."""

from __future__ import annotations

from typing import Any

from torch import nn

from scorematch.core.conditions import Condition
from scorematch.nets.family import Family
from scorematch.nets.inference import InferenceScore
from scorematch.nets.mlp import MLP, MLP_FAMILY
from scorematch.nets.ncsnpp import NCSNPP, NCSNPP_FAMILY
from scorematch.nets.refinenet import NCSN, NCSNV2, RefineNet
from scorematch.nets.unet import UNET, UNet

FAMILIES: dict[str, Family[Any]] = {family.name: family for family in (NCSN, NCSNV2, UNET, NCSNPP_FAMILY, MLP_FAMILY)}

__all__ = ["FAMILIES", "MLP", "NCSNPP", "Condition", "Family", "InferenceScore", "RefineNet", "UNet", "family_of"]


def family_of(backbone: nn.Module) -> Family[Any] | None:
    """The family of a backbone; None for any other class, including subclasses, whose output may be different."""
    for family in FAMILIES.values():
        if type(backbone) is family.network and family.accepts(backbone):
            return family
    return None
