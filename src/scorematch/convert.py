r"""The authors' checkpoints, turned into folders of this package.

    python -m scorematch convert checkpoint_300000.pth folder --config cifar10.yml

A checkpoint of NCSN is a list [weights, optimizer]; one of NCSNv2 and of adversarial consistent score matching goes
on with epoch, step and, where there is one, an exponential moving average of the weights, which is what their samples
are drawn with. The weights say the family (norms with a table know the noise levels), the depth, the width and the
channels. The levels are a buffer among NCSNv2's weights, and in config.yml elsewhere.

Two options of adversarial consistent score matching leave no trace in its files, ``--target dae`` and ``--std``:
networks trained with them are not scores, and cannot be told from those that are. ``--no_dilation`` and its U-Net are
refused by the names of their weights.

Nothing in these files is run: checkpoints are opened with ``weights_only=True``, and of YAML's Python tags the one that
occurs, ``argparse.Namespace``, is read as a plain mapping.

References:
    Song & Ermon, 2019, arXiv:1907.05600; Song & Ermon, 2020, arXiv:2006.09011;
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling, arXiv:2009.05475.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scorematch.nets.refinenet import Depth
from scorematch.noise import NoiseSchedule
from scorematch.pretrained import fill, read_pickle
from scorematch.score import ScoreNet


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    raw: bool = False,
) -> ScoreNet:
    """Reads a checkpoint of NCSN, NCSNv2 or adversarial consistent score matching, and saves it as a folder.

    Args:
        checkpoint: the authors' file, ``checkpoint_<step>.pth``.
        folder: where ``ScoreNet.from_pretrained`` finds it afterwards.
        config: the config.yml beside it, for the noise levels, the image size and the sampler's settings. Without it an
            NCSN of 10 levels is taken to have the published ones; what does not say its levels is refused.
        raw: whether to take the weights themselves where there is a moving average of them.

    Returns:
        The network, in eval mode.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: for a config without PyYAML.
        ValueError: for a file that is not such a checkpoint, or options that this package does not have.
    """
    weights = _weights(Path(checkpoint), raw=raw)
    options = _Options(_read_yaml(Path(config)) if config is not None else {})
    options.refuse()
    net = _build(weights, options, Path(checkpoint))
    net.save_pretrained(folder)
    return net.eval()


class _Options:
    """A config.yml: ``options("model", "ngf")`` is one of its values, or the default."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree

    def __call__(self, section: str, key: str, default: Any = None) -> Any:
        part = self.tree.get(section)
        return part.get(key, default) if isinstance(part, Mapping) else default

    def refuse(self) -> None:
        """Raises for options that change the network or its data in a way that is not here."""
        if self("data", "logit_transform"):
            raise ValueError(
                "the network was trained on logits of the pixels (logit_transform); its score is not one of images in "
                "[0, 1], and noise of one level there is of another level at every pixel here."
            )
        for key, known in [("normalization", "InstanceNorm++"), ("nonlinearity", "elu")]:
            if self("model", key, known) != known:
                raise ValueError(
                    f"model.{key} is {self('model', key)!r}; of the published networks' options, {known} is here."
                )


def _weights(path: Path, *, raw: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under their names in the network."""
    content = read_pickle(path)
    average = None
    if isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
        average = content[-1] if len(content) >= 5 and isinstance(content[-1], Mapping) else None
        content = content[0]
    if not isinstance(content, Mapping) or "begin_conv.weight" not in map(_name, content):
        raise ValueError(
            f"{path} is no checkpoint of NCSN or NCSNv2: expected a list whose first entry, or a mapping that itself, "
            "holds begin_conv.weight."
        )
    weights = {_name(name): tensor for name, tensor in content.items()}
    if average is not None and not raw:
        weights.update({_name(name): tensor for name, tensor in average.items()})
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()) or weights["begin_conv.weight"].ndim != 4:
        raise ValueError(f"{path} does not hold a network's weights, a mapping of names to tensors.")
    return weights


def _name(name: Any) -> str:
    """Of a tensor in the network, whatever it was trained inside of."""
    return re.sub(r"^(module\.)+", "", str(name))


def _build(weights: dict[str, Tensor], options: _Options, path: Path) -> ScoreNet:
    width, channels = weights["begin_conv.weight"].shape[:2]
    depth: Depth = "standard"
    if "res5.0.conv1.weight" in weights:
        depth = "deepest" if "res31.0.conv1.weight" in weights else "deeper"
    conditional = "normalizer.embed.weight" in weights
    levels = len(weights["normalizer.embed.weight"]) if conditional else None
    schedule = _schedule(weights.pop("sigmas", None), levels, options, path)
    if options("data", "rescaled"):
        # Trained on images in [-1, 1]: noise of twice the level, and a score of half the size.
        schedule = NoiseSchedule(schedule.sigmas / 2)
        if conditional:
            for name in ("end_conv.weight", "end_conv.bias"):
                weights[name] = 2 * weights[name]
    size = options("data", "image_size")
    make = ScoreNet.ncsn if conditional else ScoreNet.ncsnv2
    net = make(channels, size or 32, width=width, depth=depth, schedule=schedule)
    if size is None:
        net.sample_shape = None
    fill(net.backbone, weights, path)
    net.sampler_settings = _settings(options, schedule)
    return net


def _settings(options: _Options, schedule: NoiseSchedule) -> dict[str, Any] | None:
    """The published settings of the sampler, if the configuration has them."""
    steps = options("sampling", "n_steps_each", options("sampling", "nsigma"))
    step_size = options("sampling", "step_lr")
    if steps is None or step_size is None:
        return None
    # In units of x: half the sigma is a quarter of the step.
    size = float(step_size) / (4 if options("data", "rescaled") else 1)
    if options("sampling", "consistent"):  # one step a level, on a ladder that is so many times as fine
        return {"levels": (len(schedule) - 1) * int(steps) + 1, "step_size": size, "consistent": True}
    return {"levels": len(schedule), "steps_per_level": int(steps), "step_size": size, "exact_noise": False}


def _schedule(stored: Tensor | None, levels: int | None, options: _Options, path: Path) -> NoiseSchedule:
    """The ladder: the buffer's, else the configuration's, else the published one of NCSN."""
    begin, end = options("model", "sigma_begin"), options("model", "sigma_end")
    count = options("model", "num_classes", levels)
    configured = None
    if None not in (begin, end, count):
        kind = options("model", "sigma_dist", "geometric")
        if kind not in ("geometric", "uniform", "linear"):
            raise ValueError(f"model.sigma_dist must be geometric, uniform or linear, got {kind!r}.")
        configured = NoiseSchedule.geometric(float(begin), float(end), int(count))
        if kind != "geometric":
            configured = NoiseSchedule(np.linspace(float(begin), float(end), int(count)))
    if stored is not None:
        schedule = NoiseSchedule(stored)
        if configured is not None and not (
            len(configured) == len(schedule) and np.allclose(configured.sigmas, schedule.sigmas, rtol=1e-4)
        ):
            warnings.warn(
                f"the noise levels stored in {path}, {schedule}, are not those of its configuration, {configured}; the "
                "stored ones count.",
                stacklevel=4,
            )
        return schedule
    if configured is not None:
        if levels is not None and levels != len(configured):
            raise ValueError(f"the weights in {path} know {levels} noise levels, the configuration {len(configured)}.")
        return configured
    if levels == 10:
        return NoiseSchedule.geometric(1, 0.01, 10)
    raise ValueError(f"{path} does not say its noise levels: pass the config.yml that it was trained with.")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('reading config.yml needs PyYAML: pip install "scorematch[convert]".') from error

    class Loader(yaml.SafeLoader):
        """Safe, and of Python's tags it knows the one that the authors' files have."""

    def namespace(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", namespace)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a configuration that can be read safely: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} is not a configuration of NCSN: it has no section model.")
    return content
