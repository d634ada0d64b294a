"""Trained networks on disk and on the Hugging Face Hub.

``load`` takes a name, a folder or a repository, and returns a checked configuration with its weights; ``build`` makes
the backbone from them; ``save`` and ``push`` write them. Each format of another project has one file, which translates
it into this package's configuration.

No file can run code: JSON and safetensors hold plain values, and of a pickle only tensors, numbers, strings, lists and
dicts are accepted.
"""

from scorematch.pretrained.configuration import FORMAT_VERSION, Stored, architecture
from scorematch.pretrained.diffusers import from_diffusers
from scorematch.pretrained.loading import build, load
from scorematch.pretrained.saving import push, save
from scorematch.pretrained.weights import fill

__all__ = ["FORMAT_VERSION", "Stored", "architecture", "build", "fill", "from_diffusers", "load", "push", "save"]
