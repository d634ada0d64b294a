"""Trained networks on disk and on the Hugging Face Hub.

``load`` takes a name, a folder or a repository, and returns a checked configuration and the weights. ``build`` creates
the backbone from them. ``save`` writes a network to a folder, and ``upload`` uploads it to the Hub, with its
``model_card``. Each file format of another project has its own module, which translates it to this package's
configuration.

Loading never runs code from a file: JSON and safetensors hold plain values, and from a pickle only tensors, numbers,
strings, lists and dicts are accepted.
"""

from scorematch.pretrained.configuration import FORMAT_VERSION, Stored, architecture
from scorematch.pretrained.diffusers import from_diffusers
from scorematch.pretrained.hub import upload
from scorematch.pretrained.loading import build, load
from scorematch.pretrained.model_card import model_card
from scorematch.pretrained.saving import save
from scorematch.pretrained.weights import fill

__all__ = [
    "FORMAT_VERSION",
    "Stored",
    "architecture",
    "build",
    "fill",
    "from_diffusers",
    "load",
    "model_card",
    "save",
    "upload",
]
