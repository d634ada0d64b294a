r"""ScoreNet: a network used as a score, ``score(x, sigma)``.

The score of noisy data is :math:`\nabla_x \log p_\sigma(x)`, where :math:`p_\sigma` is the distribution of the data
convolved with a Gaussian of standard deviation sigma. Tweedie's formula turns it into the denoised image, the mean of
the clean images given x, :math:`\mathbb{E}[x_0 | x] = x + \sigma^2 \nabla_x \log p_\sigma(x)`.

Each family of networks has units and conventions of its own. A ScoreNet holds the backbone, the noise levels that it
was trained on and its row of the preconditioning table, and has one interface: images (N, C, H, W) in [0, 1], sigma in
the same units, and a score. It returns a score, where k-diffusion and azula return the denoised image (``denoise``
here).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from scorematch import pretrained
from scorematch.nets import FAMILIES, Condition, family_of
from scorematch.nets.family import as_condition
from scorematch.nets.inference import InferenceScore, is_plain
from scorematch.nets.refinenet import Depth
from scorematch.nets.unet import ResidualBlock
from scorematch.noise import NoiseSchedule
from scorematch.precondition import ROWS, Preconditioning
from scorematch.protocol import as_sigma, check_data, per_image
from scorematch.sampling.settings import SamplerSettings

Size = int | tuple[int, int]
Range = tuple[float, float]


class ScoreNet(nn.Module):
    """A backbone with its noise levels and its preconditioning, which together are a score of images.

    ``ScoreNet.ncsn``, ``ScoreNet.ncsnv2`` and ``ScoreNet.unet`` build networks to train, ``ScoreNet.from_pretrained``
    loads trained ones, and the constructor wraps a network of your own.

    Args:
        backbone: called as ``backbone(x, c_noise)``, or ``backbone(x, c_noise, condition)`` where a condition is given,
            with x in the units of its row and ``c_noise`` (N,), float32 (float64 for a float64 network). It returns a
            tensor of the shape of x.
        schedule: the noise levels that it is trained on.
        precondition: its row of the table in ``scorematch.precondition``: "karras", "ncsnv2", "ncsn", ...
        sample_shape: the shape of one sample without the batch, (C, H, W) for images. Samplers draw this shape by
            default; the network itself may take others.
        value_range: (low, high) of the data, to which samplers clamp their result and which rows in [-1, 1] are mapped
            from; None for data without a range. "auto" is (0, 1) where ``sample_shape`` is that of an image, (C, H, W),
            and None otherwise.
        predicts_variance: whether the backbone returns twice the channels of x. The second half is a variance, which
            the score does not use.

    Attributes:
        sampler_settings: the SamplerSettings recommended for this network, or None; saved with the weights.

    Raises:
        TypeError, ValueError: for parts that do not fit together.

    Example:
        >>> import torch
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
        value_range: Range | Literal["auto"] | None = "auto",
        predicts_variance: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            hint = "Pass an instance, YourModule()." if isinstance(backbone, type) else "Wrap it in a torch.nn.Module."
            raise TypeError(f"backbone must be a torch.nn.Module, got {backbone!r}. {hint}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}. Write NoiseSchedule(sigmas)."
            )
        if precondition not in ROWS:
            raise ValueError(f"precondition must be one of {', '.join(map(repr, ROWS))}, got {precondition!r}.")
        if sample_shape is not None and not isinstance(sample_shape, Sequence):
            raise TypeError(f"sample_shape must be a tuple such as (3, 32, 32), or None, got {sample_shape!r}.")
        if value_range == "auto":
            value_range = (0, 1) if sample_shape is not None and len(sample_shape) == 3 else None
        pair = isinstance(value_range, Sequence) and len(value_range) == 2
        if value_range is not None and not (pair and value_range[0] < value_range[1]):
            raise ValueError(f"value_range must be (low, high) with low < high, or None, got {value_range!r}.")
        self.family = family_of(backbone)
        if self.family is not None:
            self.family.check(backbone, levels=len(schedule), precondition=precondition)
        self.backbone = backbone
        self.schedule = schedule
        self.precondition = precondition
        self.sample_shape = None if sample_shape is None else tuple(sample_shape)
        self.value_range: Range | None = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        self.predicts_variance = predicts_variance
        self.sampler_settings = None
        self._architecture: dict[str, Any] = {"family": "custom"}

    @property
    def sampler_settings(self) -> SamplerSettings | None:
        """The settings recommended for this network, or None."""
        return self._sampler_settings

    @sampler_settings.setter
    def sampler_settings(self, settings: SamplerSettings | None) -> None:
        if not isinstance(settings, SamplerSettings | None):
            raise TypeError(
                f"sampler_settings must be a SamplerSettings, got {type(settings).__name__}. Write "
                "SamplerSettings(levels=..., ...), of scorematch.sampling."
            )
        self._sampler_settings = settings

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
        """The network of NCSN: the noise level enters every norm, and the output is the score.

        Args:
            channels: of the image.
            image_size: (height, width) of a sample, or the side of a square one. The network takes any even size.
            width: of the first features: 64 for the published MNIST network, 128 for CIFAR-10 and CelebA.
            depth: how often the image is halved: "standard" once, "deeper" twice, "deepest" three times.
            schedule: the noise levels; each has a row in the norms' tables, and between two levels the rows are
                interpolated. None is the published schedule, 10 levels from 1 to 0.01.

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
        """The network of NCSNv2: it sees the noise level in the image alone, and its output is divided by sigma.

        Args:
            channels: of the image.
            image_size: (height, width) of a sample, or the side of a square one.
            width: of the first features, 128 in the published networks.
            depth: how often the image is halved: "standard" once (NCSNv2, 32 and 64 px), "deeper" twice
                (NCSNv2Deeper, 96 and 128 px), "deepest" three times (NCSNv2Deepest, 256 px).
            schedule: the noise levels; None is the published schedule of CIFAR-10, 232 levels from 50 to 0.01.
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
        patch: int = 1,
        pixel_channels: int = 0,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
    ) -> ScoreNet:
        """A U-Net like DDPM's, to be trained from scratch.

        Args:
            channels: of the image.
            image_size: (height, width) of a sample, or the side of a square one.
            widths: of the features at each scale, from the image inward; the image is halved between two scales.
            layers_per_block: residual blocks at each scale.
            attention: at which scales there is self-attention; None is the lowest only.
            condition_channels: of an image that is given as a condition, or 0. The network sees it beside x, in the
                same units.
            classes: the number of classes, for a class-conditional network, or None.
            dropout: in the residual blocks.
            patch: the side of the patches that the network works on, 1 for single pixels. A network on 2 x 2 patches
                takes about a quarter of the time, and is saved in this package's own layout.
            pixel_channels: width of two more residual blocks at full resolution, for a network on patches; 0 is none.
            schedule: the noise levels; None is NCSNv2's schedule of CIFAR-10, 232 levels from 50 to 0.01.
            precondition: a row of the table in ``scorematch.precondition``; "karras" trains best.

        References:
            Ho et al., 2020, arXiv:2006.11239; Karras et al., 2022, arXiv:2206.00364.
        """
        if condition_channels and classes is not None:
            raise ValueError(
                "condition_channels and classes exclude each other: a network takes one condition, an image or a class."
            )
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
        if patch > 1 or pixel_channels:
            architecture |= {"patch": patch, "pixel_channels": pixel_channels}
        schedule = NoiseSchedule.geometric(50, 0.01, 232) if schedule is None else schedule
        net = cls._build(architecture, schedule, precondition, (channels, *_pair(image_size)))
        for module in net.backbone.modules():  # each block starts as the identity, the network as zero (Ho et al. 2020)
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
        for name in FAMILIES["unet"].image_convolutions(net.backbone)[1]:
            for parameter in net.backbone.get_submodule(name).parameters():
                nn.init.zeros_(parameter)
        return net

    @classmethod
    def _build(
        cls,
        architecture: Mapping[str, Any],
        schedule: NoiseSchedule,
        precondition: str,
        sample_shape: tuple[int, ...] | None,
        value_range: Range | None = (0, 1),
        predicts_variance: bool = False,
        backbone: nn.Module | None = None,
    ) -> ScoreNet:
        if backbone is None:
            values = {key: value for key, value in architecture.items() if key != "family"}
            backbone = FAMILIES[architecture["family"]].build(values, levels=len(schedule), precondition=precondition)
        net = cls(
            backbone,
            schedule,
            precondition=precondition,
            sample_shape=sample_shape,
            value_range=value_range,
            predicts_variance=predicts_variance,
        )
        net._architecture = dict(architecture)
        return net

    # -- The score ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: float | Tensor, condition: Tensor | int | None = None) -> Tensor:
        """The score of the noisy data at x.

        Args:
            x: noisy data (N, ...), images in [0, 1] plus noise, floating point.
            sigma: the noise level, a float, () or (N,), positive, in the units of x. Networks that are given the
                position of sigma in the schedule, NCSN and DDPM, use the nearest level for sigma beyond its ends.
            condition: for networks that take one: classes, int64 (N,), or an int, the class of all samples; or an image
                (N, K, H, W) in the units of x, [0, 1]. It is mapped to [-1, 1] where x is.

        Returns:
            The score, with the shape and dtype of x.

        Raises:
            TypeError: for integer x, integer sigma, or a condition of a kind that the network does not take.
            ValueError: for a sigma of another shape or not positive, a condition that is missing, a class that the
                network does not know, images of a size that the network does not take, or a backbone that returns
                another shape than that of x.
        """
        check_data(x)
        condition = as_condition(condition, x, self.conditioning)
        preconditioning = self._preconditioning
        return preconditioning.score(self.backbone, x, preconditioning.coefficients(as_sigma(sigma, x)), condition)

    @property
    def _preconditioning(self) -> Preconditioning:
        return Preconditioning(self.precondition, self.schedule, self.value_range, self.predicts_variance)

    @property
    def conditioning(self) -> Condition | None:
        """What the network takes as its condition; None for a backbone of another package, where it is not known."""
        if self.family is None:
            return None
        return self.family.condition(self.backbone, predicts_variance=self.predicts_variance)

    def denoise(self, x: Tensor, sigma: float | Tensor, condition: Tensor | int | None = None) -> Tensor:
        r"""The denoised image, the mean of the clean data given x: :math:`x + \sigma^2 \nabla_x \log p_\sigma(x)`.

        This is Tweedie's formula. Arguments and errors are those of the score.
        """
        score = self(x, sigma, condition)
        return (x + per_image(as_sigma(sigma, x).square(), x) * score).to(x.dtype)

    def inference_copy(self, *, compile: bool = False) -> InferenceScore | ScoreNet:  # noqa: A002  (torch's word)
        """A copy for inference: as fast as the device can, with samples that are statistically the same.

        Any sampler accepts it in place of the network. What differs is described in ``scorematch.nets.inference``: the
        memory layout, bfloat16 inside the network where the processor has it natively, and what depends on sigma alone,
        which is computed once per level. A network of your own, or one that is not float32 as it was built, is returned
        itself.

        Args:
            compile: whether to compile the copy at its first call, with ``torch.compile``, on CUDA with CUDA graphs.
                Where that fails there is a warning, and the copy runs without. Pass the compiled copy to a sampler to
                compile once and sample often.

        Returns:
            The score, called as this network. It does not follow later changes of the weights.
        """
        if self.family is None or type(self) is not ScoreNet or not is_plain(self, self.backbone):
            return self
        return InferenceScore(
            self.family,
            self.backbone,
            self._preconditioning,
            sample_shape=self.sample_shape,
            sampler_settings=self.sampler_settings,
            compile=compile,
        )

    # -- Files --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds this network without its weights, as a plain dict: the content of config.json."""
        return {
            "format_version": pretrained.FORMAT_VERSION,
            **self._architecture,
            "precondition": self.precondition,
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
            "value_range": None if self.value_range is None else list(self.value_range),
            "predicts_variance": self.predicts_variance,
            "sampler_settings": None if self.sampler_settings is None else self.sampler_settings.to_dict(),
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
        """Loads a trained network by its name, from a folder, or from a repository of the Hugging Face Hub.

        Args:
            name_or_folder: a short name ("mnist" and "palette-mnist" ship with the package; ``python -m scorematch
                models`` lists all); or a folder, as a path or a string with a slash ("./cifar10"), written by
                ``save_pretrained`` or a U-Net in the layout of diffusers, flat or a pipeline; or a repository of the
                Hub, ``owner/name``, with either.

            Rarely needed:

            revision: of a repository, a branch, a tag or a commit; None is the commit on its card, or the main
                branch. A commit that is in the cache needs no request.
            token: for private and gated repositories; None is the token that is logged in.
            cache_dir: where downloads are kept; None is the cache of huggingface_hub.
            local_files_only: whether to look in the cache only.
            backbone: for a saved network of your own, a module of the same class, which receives the weights.

        Returns:
            The network in eval mode, in float32 whatever is stored, on the CPU.

        Raises:
            FileNotFoundError: if there is no such name, folder, repository or revision, or a file is missing in it.
            PermissionError: if the repository is gated.
            ValueError: if a file is damaged or of another format, or the weights do not fit the configuration.

        Example:
            >>> ScoreNet.from_pretrained("mnist").sample_shape
            (1, 28, 28)
        """
        stored = pretrained.load(
            name_or_folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls._of(stored, backbone)

    @classmethod
    def from_diffusers(cls, unet: nn.Module, scheduler: Any) -> ScoreNet:
        """A ScoreNet with the weights of a UNet2DModel of diffusers.

        Args:
            unet: a ``UNet2DModel``. Its weights are copied.
            scheduler: the scheduler that it was trained with, such as a ``DDPMScheduler``: it says what the output
                means and which noise levels there are.

        Returns:
            The network in eval mode, in float32, on the CPU.

        Raises:
            TypeError: for objects that have no ``config``.
            ValueError: for an option that is not supported.
        """
        return cls._of(pretrained.from_diffusers(unet, scheduler), None)

    @classmethod
    def _of(cls, stored: pretrained.Stored, backbone: nn.Module | None) -> ScoreNet:
        """The network of a checked configuration and its weights."""
        config = stored.config
        net = cls._build(
            pretrained.architecture(config),
            NoiseSchedule.from_dict(config["schedule"]),
            config["precondition"],
            None if config["sample_shape"] is None else tuple(config["sample_shape"]),
            None if config["value_range"] is None else tuple(config["value_range"]),
            config["predicts_variance"],
            pretrained.build(stored, backbone),
        )
        settings = config["sampler_settings"]
        net.sampler_settings = None if settings is None else SamplerSettings.from_dict(settings)
        return net.float().eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and the weights into a folder, for ``from_pretrained``.

        The weights are stored in their own dtype. An existing folder keeps its other files, and its old network until
        the new one is completely written. A U-Net that diffusers can run is written in the layout of diffusers, with
        the weights in diffusion_pytorch_model.safetensors; every other network has them in model.safetensors.

        Args:
            folder: created if it does not exist.

        Raises:
            OSError: if the folder cannot be written; it is then as it was.
        """
        pretrained.save(folder, self.config, self.backbone.state_dict())

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
            repo_id: ``owner/name``; the repository is created if it does not exist.
            license: for the card, as the Hub abbreviates it ("mit", "apache-2.0").
            datasets: for the card, the names of the training data on the Hub.

            Rarely needed:

            private: whether a new repository is private; None is the owner's default.
            revision: the branch, created if it does not exist; None is the main branch.
            token: a token that may write; None is the one that is logged in.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: if ``repo_id`` is not ``owner/name``.
            PermissionError: if the Hub refuses to write there.
            OSError: if the upload fails otherwise.
        """
        return pretrained.push(
            repo_id,
            self.config,
            self.backbone.state_dict(),
            conditioning=self.conditioning,
            license=license,
            datasets=datasets,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
