r"""ScoreNet: a backbone read as a score, ``score(x, sigma)``.

The score of noise-perturbed data is :math:`\nabla_x \log p_\sigma(x)`, with :math:`p_\sigma` the data's distribution
convolved with a Gaussian of deviation sigma. Samplers climb it; Tweedie's formula turns it into the mean of the clean
images that could have become x, :math:`\mathbb{E}[x_0 | x] = x + \sigma^2 \nabla_x \log p_\sigma(x)`.

Every family of networks answers in units and conventions of its own. A ScoreNet holds the backbone, its ladder of noise
levels and its row of the preconditioning table, and speaks one language outward: images (N, C, H, W) in [0, 1], sigma
in the same units, and a score.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scorematch import cards, hub, pretrained
from scorematch.nets.inference import inference_copy, is_plain, native_dtype, part_size
from scorematch.nets.refinenet import Depth, RefineNet
from scorematch.nets.unet import ResidualBlock, UNet
from scorematch.noise import NoiseSchedule, expand
from scorematch.precondition import ROWS, Coefficients

Size = int | tuple[int, int]


class ScoreNet(nn.Module):
    """A backbone, its ladder and its preconditioning, together a score of images.

    ``ScoreNet.ncsn`` and ``ScoreNet.ncsnv2`` build the published families and ``ScoreNet.from_pretrained`` loads
    trained ones; the constructor wraps a network of the user's own.

    Args:
        backbone: called as ``backbone(x, c_noise)``, or ``backbone(x, c_noise, condition)`` where a condition is given,
            with x in the units of its row and ``c_noise`` (N,), float32 (float64 for a double network).
        schedule: the ladder that it is trained on.
        precondition: its row of the table in ``scorematch.precondition``: "karras", "ncsnv2" or "ncsn".
        sample_shape: the shape of one sample without the batch, (C, H, W): the samplers' default, no constraint.
        value_range: (low, high) of the data, (0, 1) for images, or None for data without a range.

    Attributes:
        sampler_settings: what was found to sample this network best, or None; keys as AnnealedLangevinSampler's
            arguments, and ``levels``, to which the ladder is respaced. Saved with the weights.

    Raises:
        TypeError, ValueError: for parts that do not fit together.

    Example:
        >>> net = ScoreNet.ncsnv2(channels=1, image_size=28, width=8)
        >>> net(torch.rand(2, 1, 28, 28), 0.1).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        *,
        precondition: str = "karras",
        sample_shape: tuple[int, ...] | None = None,
        value_range: tuple[float, float] | None = (0, 1),
    ) -> None:
        super().__init__()
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}. Write NoiseSchedule(sigmas)."
            )
        if precondition not in ROWS:
            raise ValueError(f"precondition must be one of {', '.join(map(repr, ROWS))}, got {precondition!r}.")
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise ValueError(f"value_range must be (low, high) with low < high, or None, got {value_range!r}.")
        if isinstance(backbone, RefineNet):
            _check_refinenet(backbone, schedule, precondition)
        self.backbone = backbone
        self.schedule = schedule
        self.precondition = precondition
        self.sample_shape = None if sample_shape is None else tuple(sample_shape)
        self.value_range = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        self.sampler_settings: dict[str, Any] | None = None
        self._architecture: dict[str, Any] = {"family": "custom"}

    # -- The published families ---------------------------------------------------------------------------------------

    @classmethod
    def ncsn(
        cls,
        channels: int = 3,
        image_size: Size = 32,
        *,
        width: int = 128,
        depth: Depth = "standard",
        schedule: NoiseSchedule | None = None,
    ) -> ScoreNet:
        """The network of NCSN: the noise level enters every norm, the output is the score.

        Args:
            channels: of the image.
            image_size: (height, width) of a sample, or the side of a square one. Any even size can be given to the
                network.
            width: of the first features: 64 for the published MNIST network, 128 for CIFAR-10 and CelebA.
            depth: how often the image is halved: "standard" once, "deeper" twice, "deepest" three times.
            schedule: the ladder; each level has a row in the norms' tables, and levels between are interpolated. None
                is the published one, 10 levels from 1 to 0.01.

        References:
            Song & Ermon, 2019, arXiv:1907.05600.
        """
        schedule = NoiseSchedule.geometric(1, 0.01, 10) if schedule is None else schedule
        architecture = {"family": "ncsn", "channels": channels, "width": width, "depth": depth}
        return cls._build(architecture, schedule, "ncsn", (channels, *_pair(image_size)))

    @classmethod
    def ncsnv2(
        cls,
        channels: int = 3,
        image_size: Size = 32,
        *,
        width: int = 128,
        depth: Depth = "standard",
        schedule: NoiseSchedule | None = None,
        precondition: Literal["ncsnv2", "karras"] = "ncsnv2",
    ) -> ScoreNet:
        """The network of NCSNv2: it sees the noise level only in the image, and its output is divided by sigma.

        Args:
            channels: of the image.
            image_size: (height, width) of a sample, or the side of a square one.
            width: of the first features, 128 in the published networks.
            depth: how often the image is halved: "standard" once (NCSNv2, 32 and 64 px), "deeper" twice
                (NCSNv2Deeper, 96 and 128 px), "deepest" three times (NCSNv2Deepest, 256 px).
            schedule: the ladder; None is the published one of CIFAR-10, 232 levels from 50 to 0.01.
            precondition: "ncsnv2" as published, or "karras", whose input has unit variance at every level.

        References:
            Song & Ermon, 2020, arXiv:2006.09011.
        """
        if precondition not in ("ncsnv2", "karras"):
            raise ValueError(f'precondition of an NCSNv2 must be "ncsnv2" or "karras", got {precondition!r}.')
        schedule = NoiseSchedule.geometric(50, 0.01, 232) if schedule is None else schedule
        architecture = {"family": "ncsnv2", "channels": channels, "width": width, "depth": depth}
        return cls._build(architecture, schedule, precondition, (channels, *_pair(image_size)))

    @classmethod
    def unet(
        cls,
        channels: int = 3,
        image_size: Size = 32,
        *,
        widths: Sequence[int] = (64, 128, 128),
        layers_per_block: int = 2,
        attention: Sequence[bool] | None = None,
        condition_channels: int = 0,
        classes: int | None = None,
        dropout: float = 0.0,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
    ) -> ScoreNet:
        """A U-Net of DDPM's kind, to be trained from scratch.

        Args:
            channels: of the image.
            image_size: (height, width) of a sample, or the side of a square one.
            widths: of the features at each scale, from the image inward; the image is halved between two scales.
            layers_per_block: residual blocks at each scale.
            attention: at which scales each pixel looks at every other; None is the lowest only.
            condition_channels: of an image that is given as a condition, or 0. The network sees it beside x, in the
                same units.
            classes: the number of classes, for a network whose condition is a class, or None.
            dropout: in the residual blocks.
            schedule: the ladder; None is NCSNv2's of CIFAR-10, 232 levels from 50 to 0.01.
            precondition: a row of the table in ``scorematch.precondition``; "karras" trains best.

        References:
            Ho et al., 2020, arXiv:2006.11239; Karras et al., 2022, arXiv:2206.00364.
        """
        attention = [False] * (len(widths) - 1) + [True] if attention is None else attention
        if len(attention) != len(widths):
            raise ValueError(f"attention must have one entry per scale, {len(widths)}, got {len(attention)}.")
        down = ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention]
        architecture = {
            "family": "unet",
            "in_channels": channels + condition_channels,
            "out_channels": channels,
            "block_out_channels": list(widths),
            "down_block_types": down,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
            "layers_per_block": layers_per_block,
            "attention_head_dim": None,
            "norm_num_groups": math.gcd(32, *widths),
            "dropout": dropout,
            "num_class_embeds": classes,
        }
        schedule = NoiseSchedule.geometric(50, 0.01, 232) if schedule is None else schedule
        net = cls._build(architecture, schedule, precondition, (channels, *_pair(image_size)))
        for module in net.backbone.modules():  # every block begins as the identity, the whole as zero (Ho et al. 2020)
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(net.backbone.get_submodule("conv_out").weight)  # type: ignore[arg-type]
        return net

    @classmethod
    def _build(
        cls,
        architecture: dict[str, Any],
        schedule: NoiseSchedule,
        precondition: str,
        sample_shape: tuple[int, ...] | None,
        value_range: tuple[float, float] | None = (0, 1),
        backbone: nn.Module | None = None,
    ) -> ScoreNet:
        family = architecture["family"]
        if family == "unet":
            backbone = UNet(**{key: value for key, value in architecture.items() if key != "family"})
        elif family != "custom":
            backbone = RefineNet(
                architecture["channels"],
                architecture["width"],
                depth=architecture["depth"],
                levels=len(schedule) if family == "ncsn" else None,
                center=precondition != "karras",
            )
        assert backbone is not None  # noqa: S101  (pretrained asks the user for it)
        net = cls(backbone, schedule, precondition=precondition, sample_shape=sample_shape, value_range=value_range)
        net._architecture = architecture
        return net

    # -- The score ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: float | Tensor, condition: Tensor | None = None) -> Tensor:
        """The score of the perturbed data at x.

        Args:
            x: noisy data (N, ...), images in [0, 1] plus noise, floating point.
            sigma: the noise level, a float, () or (N,), positive, in the units of x. Beyond the ladder a network that
                was trained on levels takes the nearest.
            condition: int64 (N,), a class, or float (N, K, H, W), an image in x's units, [0, 1]; for backbones that
                take one. A row that brings x to [-1, 1] brings the image there too.

        Returns:
            The score, with the shape and dtype of x.

        Raises:
            TypeError: for integer x, or a condition where the network takes none.
            ValueError: for a sigma of another shape, or images that the network cannot take.
        """
        sigma = self._checked(x, sigma, condition)
        return self._score(self.backbone, x, self._coefficients(sigma), condition)

    def _checked(self, x: Tensor, sigma: float | Tensor, condition: Tensor | None) -> Tensor:
        """Sigma as a tensor beside x; the same one where it is one already."""
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point, images in [0, 1], got {x.dtype}. Write x / 255 for 8-bit images."
            )
        if condition is not None and isinstance(self.backbone, RefineNet):
            raise TypeError("this network takes no condition; an NCSN is unconditional.")
        sigma = torch.as_tensor(sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
            raise ValueError(
                f"sigma must be a float, () or ({len(x)},) like the batch, got shape {tuple(sigma.shape)}."
            )
        return sigma

    def _coefficients(self, sigma: Tensor) -> Coefficients:
        row = ROWS[self.precondition]
        return row.coefficients(sigma, self.schedule, self._units()[0] if row.centered else 1.0)

    def _score(self, backbone: nn.Module, x: Tensor, coefficients: Coefficients, condition: Tensor | None) -> Tensor:
        """The formula of ``scorematch.precondition``, computed in float32 at least around the backbone."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        c_in, c_skip, c_out, c_noise = coefficients
        k, middle = self._units() if ROWS[self.precondition].centered else (1.0, 0.0)
        u = k * (x.to(dtype) - middle)
        parameter = next(backbone.parameters(), None)
        inner = dtype if parameter is None else parameter.dtype
        arguments = [
            (expand(c_in, x) * u).to(inner),
            c_noise.to(torch.promote_types(inner, torch.float32)).expand(len(x)),
        ]
        if condition is not None and condition.ndim == 4 and condition.is_floating_point():
            condition = (k * (condition.to(dtype) - middle)).to(inner)
        output = backbone(*arguments) if condition is None else backbone(*arguments, condition)
        if output.shape[1:2] == (2 * x.shape[1],):  # a network that predicts a variance too: its second half
            output = output[:, : x.shape[1]]
        return (expand(c_skip, x) * u + expand(c_out, x) * output.to(dtype)).to(x.dtype)

    def denoise(self, x: Tensor, sigma: float | Tensor, condition: Tensor | None = None) -> Tensor:
        r"""The mean of the clean data that could have become x: :math:`x + \sigma^2 \nabla_x \log p_\sigma(x)`.

        Tweedie's formula; arguments and result as for the score itself.
        """
        variance = torch.as_tensor(sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) ** 2
        return (x + expand(variance, x) * self(x, sigma, condition)).to(x.dtype)

    def inference_copy(self, *, compile: bool = False) -> Callable[..., Tensor]:  # noqa: A002  (torch's word)
        """A copy for sampling: as fast as the device can, with samples that are statistically the same.

        What differs is in ``scorematch.nets.inference``: the layout, bfloat16 inside the network where the processor
        has it natively, and what depends on sigma alone, which is computed once for as long as sigma is the very same
        tensor. A network of the user's own, or one that is not float32 as it was built, is returned itself.

        Args:
            compile: whether to compile the copy at its first call, with ``torch.compile``, on CUDA with CUDA graphs.
                Where that fails there is a warning, and the copy runs without.

        Returns:
            The score, called as this network. It does not follow later changes of the weights.
        """
        if not isinstance(self.backbone, RefineNet | UNet) or not is_plain(self, self.backbone):
            return self
        dtype = native_dtype(next(self.backbone.parameters()).device)
        backbone, settle = inference_copy(self.backbone, dtype, compile=compile)

        @functools.lru_cache(maxsize=1)  # a tensor is its own key; its version says whether it was written to
        def at(sigma: Tensor, version: int) -> Coefficients:
            coefficients = self._coefficients(sigma)
            settle(coefficients.c_noise.to(torch.float32))
            return coefficients

        def score(x: Tensor, sigma: float | Tensor, condition: Tensor | None = None) -> Tensor:
            sigma = self._checked(x, sigma, condition)
            if sigma.ndim:  # a level for each image: those of one level together
                scores = torch.empty_like(x)
                for level in sigma.unique():
                    of = sigma == level
                    scores[of] = score(x[of], level, None if condition is None else condition[of])
                return scores
            # A tensor of inference mode has no version: nothing is kept of it.
            coefficients = at.__wrapped__(sigma, 0) if sigma.is_inference() else at(sigma, sigma._version)
            size = part_size(backbone, x)
            conditions = itertools.repeat(None) if condition is None else condition.split(size)
            parts = [
                self._score(backbone, *part) for part in zip(x.split(size), itertools.repeat(coefficients), conditions)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return score

    def _units(self) -> tuple[float, float]:
        """The k and the middle of u = k (x - middle) in [-1, 1]; 1 and 0 for data without a range."""
        if self.value_range is None:
            return 1.0, 0.0
        low, high = self.value_range
        return 2 / (high - low), (low + high) / 2

    # -- Files --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds this network, less its weights, as a plain dict: the content of config.json."""
        return {
            "format_version": pretrained.FORMAT_VERSION,
            **self._architecture,
            "precondition": self.precondition,
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
            "value_range": None if self.value_range is None else list(self.value_range),
            "sampler": self.sampler_settings,
            "schedule": self.schedule.to_dict(),
        }

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        backbone: nn.Module | None = None,
    ) -> ScoreNet:
        """The trained network of that name, in that folder, or in that repository of the Hugging Face Hub.

        Args:
            name_or_folder: a short name ("mnist" and "palette-mnist" ship with the package; ``python -m scorematch
                models`` lists all), or a folder: one that ``save_pretrained`` wrote, or a U-Net in the layout of
                diffusers, flat or a pipeline; or a repository of the Hub, ``owner/name``, with either.

            Rarely needed:

            revision: of a repository, a branch, a tag or a commit; None is the commit on its card, or the main
                branch. A commit that is in the cache needs no request.
            token: for private and gated repositories; None is the one that is logged in.
            cache_dir: where downloads are kept; None is huggingface_hub's own cache.
            local_files_only: whether to look in the cache only.
            backbone: for a saved network of the user's own, a module of the same class to fill with the weights.

        Returns:
            The network in eval mode, float32 whatever is stored, on the CPU.

        Raises:
            FileNotFoundError: if there is no such name, folder, repository or revision, or a file is missing in it.
            PermissionError: if the repository is gated.
            ValueError: if a file is damaged or of another format, or the weights do not fit the configuration.

        Example:
            >>> ScoreNet.from_pretrained("mnist").sample_shape
            (1, 28, 28)
        """
        folder, card = pretrained.locate(
            name_or_folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        with pretrained.unaltered(folder):
            config = pretrained.read_config(folder, card)
        if (config["family"] == "custom") != (backbone is not None):
            raise ValueError(
                f"{folder} holds a network of the user's own: pass its module as backbone=."
                if backbone is None
                else f"{folder} holds a network of the family {config['family']!r}, which needs no backbone=."
            )
        value_range, sample_shape = config["value_range"], config["sample_shape"]
        net = cls._build(
            pretrained.architecture(config),
            NoiseSchedule.from_dict(config["schedule"]),
            config["precondition"],
            None if sample_shape is None else tuple(sample_shape),
            None if value_range is None else tuple(value_range),
            backbone,
        )
        net.sampler_settings = config["sampler"]
        with pretrained.unaltered(folder):
            ladder = pretrained.load_weights(net.backbone, folder)
        if ladder is not None and not (
            len(ladder) == len(net.schedule) and np.allclose(ladder, net.schedule.sigmas, rtol=1e-4)
        ):
            warnings.warn(
                f"the noise levels stored with the weights in {folder} are not those of its configuration, "
                f"{net.schedule}; the stored ones count.",
                stacklevel=2,
            )
            net.schedule = NoiseSchedule(ladder)
        return net.float().eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and the weights into a folder, for ``from_pretrained``.

        The weights are in model.safetensors, those of a U-Net in diffusion_pytorch_model.safetensors, where diffusers
        finds them too.

        The weights are stored in their own dtype. An existing folder keeps its other files, and its old network until
        the new one is completely written.

        Args:
            folder: made if it does not exist.

        Raises:
            OSError: if it cannot be written; the folder is then as it was.
        """
        pretrained.save(folder, self.config, self.backbone)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,  # noqa: A002  (the Hub's word)
        datasets: Sequence[str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a score network",
    ) -> str:
        """Uploads the network to the Hugging Face Hub, for ``from_pretrained(repo_id)``.

        One commit holds what ``save_pretrained`` writes, and a model card where the repository has none yet. Weights of
        another network in the repository are deleted by that commit; its other files stay.

        Args:
            repo_id: ``owner/name``; the repository is made if there is none.
            license: for the card, as the Hub abbreviates it ("mit", "apache-2.0").
            datasets: for the card, the names of the training data on the Hub.

            Rarely needed:

            private: whether a new repository is private; None is the owner's default.
            revision: the branch, made if there is none; None is the main branch.
            token: one that may write; None is the one that is logged in.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: if ``repo_id`` is not ``owner/name``.
            PermissionError: if the Hub refuses to write there.
            OSError: if the upload fails otherwise.
        """
        if not hub.is_repository(repo_id):
            raise ValueError(f"repo_id must be owner/name, got {repo_id!r}.")
        parameters = sum(parameter.numel() for parameter in self.parameters())
        card = cards.model_card(repo_id, self.config, parameters, license, datasets)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(
                Path(folder),
                repo_id,
                card,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
            )


def _check_refinenet(backbone: RefineNet, schedule: NoiseSchedule, precondition: str) -> None:
    if (backbone.levels is not None) != (precondition == "ncsn"):
        raise ValueError(
            f"precondition {precondition!r} does not fit this RefineNet: norms that know the noise levels go with "
            '"ncsn", those that do not with "ncsnv2" or "karras".'
        )
    if backbone.levels is not None and backbone.levels != len(schedule):
        raise ValueError(
            f"the network's norms know {backbone.levels} noise levels, but the schedule has {len(schedule)}: each "
            "level needs its own row. Use the ladder that the network was trained on."
        )


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
