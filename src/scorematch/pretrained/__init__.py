"""Trained networks on disk and on the Hugging Face Hub.

``ScoreNet`` has the methods that users need. ``locate`` finds the place of a network from a name, a folder or a
repository, ``load`` reads its checked configuration and its weights from there, and ``loading.build`` creates the
backbone. ``saving.save`` writes a network to a folder, and ``hub.upload`` uploads it to the Hub, with its
``model_card``. Each file format of another project has its own module, which translates it to this package's
configuration.

Loading never runs code from a file: JSON and safetensors hold plain values, and from a pickle only tensors, numbers,
strings, lists and dicts are accepted.
"""

from scorematch.pretrained.cards import CARDS, CHECKPOINTS, Card, CheckpointCard, find
from scorematch.pretrained.configuration import Stored
from scorematch.pretrained.loading import load
from scorematch.pretrained.names import Place, locate

__all__ = ["CARDS", "CHECKPOINTS", "Card", "CheckpointCard", "Place", "Stored", "find", "load", "locate"]
