"""The published networks, with the submodule names of the published weights."""

from scorematch.nets.refinenet import RefineNet

__all__ = ["RefineNet"]
