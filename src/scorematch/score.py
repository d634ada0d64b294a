r"""ScoreNet: a neural network that is called as a score, ``net(x, sigma)``.

The score of noisy data is :math:`\nabla_x \log p_\sigma(x)`, where :math:`p_\sigma` is the distribution of the data
convolved with a Gaussian of standard deviation sigma. Tweedie's formula turns it into the denoised image, the mean of
the clean images given x, :math:`\mathbb{E}[x_0 | x] = x + \sigma^2 \nabla_x \log p_\sigma(x)`.

Each family of networks has its own units and conventions. A ScoreNet combines a backbone with the noise levels that it
was trained on and with its preconditioning (``scorematch.nets.precondition``), and has the same interface for all
families: it takes noisy images (N, C, H, W) in the units of images in [0, 1] and sigma in the same units, and returns
the score. Networks of k-diffusion and azula return the denoised image instead, which is ``net.denoise(x, sigma)`` here,
and ``net.as_denoiser()`` as a module.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scorematch.core.arguments import check_choice, check_sizes
from scorematch.core.batches import as_sigma, check_data
from scorematch.core.conditions import Condition, as_condition
from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.schema import Field
from scorematch.core.scores import NetworkScore
from scorematch.nets import FAMILIES, family_of
from scorematch.nets.blocks import VectorEmbedding
from scorematch.nets.inference import InferenceScore, is_plain
from scorematch.nets.ncsnpp import Pyramid, TimeEmbedding
from scorematch.nets.precondition import ROWS, Preconditioning, Units, check_options
from scorematch.nets.refinenet import Depth
from scorematch.nets.space import Padding
from scorematch.noise import NoiseSchedule, check_schedule
from scorematch.pretrained.configuration import FORMAT_VERSION, FREE_KEYS, Stored, architecture
from scorematch.pretrained.convert import read_checkpoint
from scorematch.pretrained.diffusers import read_objects
from scorematch.pretrained.hub import upload
from scorematch.pretrained.loading import build, load
from scorematch.pretrained.model_card import model_card
from scorematch.pretrained.names import locate
from scorematch.pretrained.saving import save
from scorematch.sampling.settings import SamplerSettings

__all__ = ["ScoreNet"]

Size = int | tuple[int, int]
AnySize = int | Sequence[int]
Range = tuple[float, float]
_ENDS = Field(list, low=2, high=2, each=Field(float))
_NUMBERS = Field(list, low=1, each=Field(float))


class ScoreNet(NetworkScore, nn.Module):
    """A network that returns the score of noisy data: a backbone with its noise levels and its preconditioning.

    ``ScoreNet.ncsn``, ``ScoreNet.ncsnv2``, ``ScoreNet.unet`` and ``ScoreNet.ncsnpp`` build networks to train,
    ``ScoreNet.from_pretrained`` loads trained ones, and the constructor wraps a network of your own.

    Args:
        backbone: a ``torch.nn.Module``, called as ``backbone(x, c_noise)``, or as ``backbone(x, c_noise, condition)``
            if a condition is given. The preconditioning scales x and computes ``c_noise`` (N,) from sigma; it is
            float32, or float64 for a float64 network. The backbone returns a tensor of the shape of x. If it has an
            attribute ``conditioning``, a ``scorematch.nets.Condition``, conditions are checked, and ``train`` passes
            the labels of the data: ``Condition(classes=10)``, or ``Condition(channels=3)`` for an image.
        schedule: the noise levels that the backbone is trained on.
        precondition: the formulas for the backbone's input, and for the score as a function of its output: the name of
            a row of the table in ``scorematch.nets.precondition``, such as "karras", "ddpm", "ncsnv2" or "ncsn".
        sample_shape: the shape of one sample without the batch axis, (C, H, W) for images. Samplers draw samples of
            this shape by default; the network itself may take other shapes.
        value_range: (low, high) of the data. Samplers clamp their samples to this range, and some preconditionings
            (see the table) map it to [-1, 1]. None is for data without a fixed range. "auto" is (0, 1) if
            ``sample_shape`` is the shape of an image, (C, H, W), and None otherwise.
        predicts_variance: whether the backbone returns twice as many channels as x has. The second half predicts the
            variance of ancestral sampling (``score_and_variance``); the score does not use it.
        precondition_options: the options of the row that differ from their defaults, by name, such as
            ``{"sigma_data": 0.25}`` for "karras"; None is the defaults.

    Attributes:
        sampler_settings: the SamplerSettings recommended for this network, or None; saved with the weights.
        class_names: the names of the classes of a class-conditional network, a tuple of strings, or None; saved with
            the weights. Class k is ``class_names[k]``, and ``net.class_names.index("cat")`` is the class "cat".

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
        precondition_options: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            hint = "Pass an instance, YourModule()." if isinstance(backbone, type) else "Wrap it in a torch.nn.Module."
            raise TypeError(f"backbone must be a torch.nn.Module, got {backbone!r}. {hint}")
        check_schedule(schedule)
        check_choice("precondition", precondition, ROWS)
        precondition_options = {key: native(value) for key, value in dict(precondition_options or {}).items()}
        check_options(precondition, precondition_options, "precondition_options")
        if sample_shape is not None:
            sample_shape = check_sizes("sample_shape", sample_shape, "a tuple such as (3, 32, 32)")
        if isinstance(value_range, str) and value_range == "auto":
            value_range = (0, 1) if sample_shape is not None and len(sample_shape) == 3 else None
        self.value_range = value_range
        self.family = family_of(backbone)
        if self.family is not None:
            self.family.check(backbone, levels=len(schedule), precondition=precondition)
        self.backbone = backbone
        self.schedule = schedule
        self.precondition, self.precondition_options = precondition, precondition_options
        self.sample_shape = sample_shape
        self.predicts_variance = native(predicts_variance)
        self.units = None
        self.sampler_settings = None
        self.class_names = None
        self._architecture: dict[str, Any] = {"family": "custom"}
        self._scheduler: dict[str, Any] | None = None  # that of diffusers, for ``save_pretrained``

    def extra_repr(self) -> str:
        """The noise levels, the row of the preconditioning table and the shape of a sample, which ``print`` shows."""
        return f"{self.schedule}, precondition={self.precondition!r}, sample_shape={self.sample_shape}"

    @property
    def value_range(self) -> Range | None:
        """(low, high) of the data, or None for data without a fixed range."""
        return self._value_range

    @value_range.setter
    def value_range(self, value_range: Range | None) -> None:
        ends = native(value_range)
        if ends is not None and not (_ENDS.fits(ends) and ends[0] < ends[1]):
            raise ValueError(
                f"value_range must be (low, high), finite with low < high, or None for data without a fixed range, got "
                f"{value_range!r}."
            )
        self._value_range = None if ends is None else (float(ends[0]), float(ends[1]))

    @property
    def units(self) -> Units | None:
        """The mean and the standard deviation of each channel of data without a range, or None; see ``fit_units``."""
        return self._units

    @units.setter
    def units(self, units: Units | None) -> None:
        if units is not None:
            if not ROWS[self.precondition].centered:
                raise ValueError(f"units need a preconditioning such as 'karras', got {self.precondition!r}.")
            mean, std = (native(list(part)) for part in units)
            if not (_NUMBERS.fits(mean) and _NUMBERS.fits(std) and len(mean) == len(std) and min(std) > 0):
                raise ValueError(
                    "units must have a mean and a positive standard deviation for each channel, finite numbers, got "
                    f"{quote(tuple(units))}."
                )
            units = Units(tuple(map(float, mean)), tuple(map(float, std)))
            self.value_range = None
        self._units = units

    def fit_units(self, data: Tensor, condition: Tensor | None = None) -> None:
        """Measures the mean and the standard deviation of each channel of data that are not images.

        They are stored as ``units``, and are applied inside the network, so that x, sigma and samples are in the units
        of the data. The highest and the lowest noise level are multiplied by the largest and the smallest ratio of a
        standard deviation to that which the network expected before. Call it once, before the training.

        Args:
            data: (N, C, ...) or (N, D), floating point, all data or a large random part. For (N, D) each of the D
                values is a channel.
            condition: the vectors (N, K) of a network with ``condition_features``, which are standardized too.

        Raises:
            TypeError: if data is not a floating-point tensor.
            ValueError: if it has NaN or infinite values, or a channel that is constant.
        """
        if isinstance(data, Tensor) and not data.is_floating_point():
            raise TypeError(f"data must be floating point, got {data.dtype}. Write data.float().")
        check_data(data, "data")
        mean, std = _moments(data, "channel", "data")
        embeddings = [module for module in self.backbone.modules() if isinstance(module, VectorEmbedding)]
        if condition is not None:
            if not embeddings:
                raise TypeError("this network takes no vector as its condition. Leave out condition.")
            center, spread = _moments(condition, "value", "condition")
            embeddings[0].mean.copy_(center)
            embeddings[0].std.copy_(spread)
        expected = 0.5 / self.preconditioning.units[0]
        own = self.schedule
        self.units = Units(tuple(mean.tolist()), tuple(std.tolist()))
        self.schedule = NoiseSchedule.geometric(
            own.sigma_max * float(std.max()) / expected, own.sigma_min * float(std.min()) / expected, len(own)
        )

    @property
    def sampler_settings(self) -> SamplerSettings | None:
        """The sampler settings recommended for this network, or None."""
        return self._sampler_settings

    @sampler_settings.setter
    def sampler_settings(self, settings: SamplerSettings | None) -> None:
        if not isinstance(settings, SamplerSettings | None):
            raise TypeError(
                f"sampler_settings must be a SamplerSettings or None, got {type(settings).__name__}. Write "
                "scorematch.sampling.SamplerSettings(levels=..., ...)."
            )
        self._sampler_settings = settings

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, or None."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        if names is not None:
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"class_names must be a sequence of strings or None, got {quote(names)}.")
            takes = self.conditioning
            if takes is None or takes.classes is None:
                raise ValueError("class_names is for class-conditional networks, and this network is not one.")
            if len(names) != takes.classes:
                raise ValueError(f"class_names must have {takes.classes} names, one per class, got {len(names)}.")
        self._class_names = None if names is None else tuple(names)

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
        """Builds an NCSN: every normalization layer depends on the noise level, and the output is the score.

        Args:
            channels: the number of channels of an image.
            image_size: (height, width) of a sample in pixels, or the side of a square one. The network takes all sizes
                that are multiples of 2, 4 or 8, and at least twice as large, for the depth "standard", "deeper" or
                "deepest".
            width: the number of channels of the first feature map, at least 2: 64 in the published network for MNIST,
                128 for CIFAR-10 and CelebA.
            depth: how many times height and width are halved: "standard" once, "deeper" twice, "deepest" three times.
            schedule: the noise levels. Each normalization layer has one set of parameters per level, and interpolates
                linearly between two levels. None is the published schedule, 10 levels from 1 to 0.01.

        Returns:
            The network, with new weights drawn from torch's global generator.

        References:
            Song & Ermon, 2019, arXiv:1907.05600.
        """
        given = {"channels": channels, "width": width, "depth": depth}
        return cls._build("ncsn", image_size, schedule, "ncsn", given)

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
        """Builds an NCSNv2: its layers do not receive the noise level; as published, its output is divided by sigma.

        Args:
            channels: the number of channels of an image.
            image_size: (height, width) of a sample in pixels, or the side of a square one. The network takes all sizes
                that are multiples of 2, 4 or 8, and at least twice as large, for the depth "standard", "deeper" or
                "deepest".
            width: the number of channels of the first feature map, at least 2; 128 in the published networks.
            depth: how many times height and width are halved: "standard" once (NCSNv2, 32 and 64 px), "deeper" twice
                (NCSNv2Deeper, 96 and 128 px), "deepest" three times (NCSNv2Deepest, 256 px).
            schedule: the noise levels; None is the published schedule for CIFAR-10, 232 levels from 50 to 0.01.
            precondition: "ncsnv2" as published, or "karras", which scales the input to unit variance at every level.

        Returns:
            The network, with new weights drawn from torch's global generator.

        References:
            Song & Ermon, 2020, arXiv:2006.09011.
        """
        given = {"channels": channels, "width": width, "depth": depth}
        return cls._build("ncsnv2", image_size, schedule, precondition, given)

    @classmethod
    def unet(
        cls,
        channels: int = 3,
        image_size: AnySize = 32,
        *,
        widths: Sequence[int] = (64, 128, 128),
        layers_per_block: int | Sequence[int] = 2,
        attention: Sequence[bool] | None = None,
        condition_channels: int = 0,
        classes: int | None = None,
        null_class: bool = False,
        dropout: float = 0.0,
        patch: int = 1,
        pixel_channels: int = 0,
        pixel_layers: int = 1,
        padding: Padding | Sequence[Padding] = "zeros",
        condition_features: int = 0,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
        precondition_options: Mapping[str, float] | None = None,
    ) -> ScoreNet:
        """Builds a U-Net with the architecture of DDPM, to be trained from scratch.

        Args:
            channels: the number of channels of an image.
            image_size: (height, width) of a sample in pixels, or the side of a square one; (length,) for signals
                (N, C, L), (depth, height, width) for volumes (N, C, D, H, W). Every side is at least the largest
                stride, ``patch * 2 ** (len(widths) - 1)``; sides that are no multiples of it are extended inside.
            widths: the number of feature channels at each scale, from full resolution down; all sides are halved from
                one scale to the next.
            layers_per_block: the number of residual blocks at each scale on the way down; the way up has one more. Or
                one number per scale, from full resolution down; such a network is saved in this package's own layout,
                which diffusers cannot read.
            attention: one bool per scale, True for self-attention at this scale; None gives it to the lowest resolution
                only.
            condition_channels: the number of channels of a conditioning image, which is concatenated with x and has the
                same units; 0 for none.
            classes: the number of classes of a class-conditional network; None for none.
            null_class: whether there is one more class, with the index ``classes``, for samples without a class, as
                needed for classifier-free guidance. It is used if no condition is given.
            dropout: the dropout probability in the residual blocks.
            patch: the side of the patches in pixels. With ``patch`` above 1 each patch becomes one position with more
                channels; with 2 the network takes about a quarter of the time. Such a network is saved in this
                package's own layout, which diffusers cannot read.
            pixel_channels: the width of more residual blocks at full resolution, for ``patch`` above 1: a multiple of 4
                up to 64, or a multiple of 32; 0 for none.
            pixel_layers: the number of these blocks on the way down, and their number on the way up.
            padding: what lies beyond the ends of the axes: "zeros"; "circular", for periodic data; "reflect"; or a
                sequence with one of these for each axis.
            condition_features: K, the number of values of a vector as the condition, float (N, K); 0 for none. A vector
                of NaN stands for no condition, and is used if none is given.
            schedule: the noise levels; None is NCSNv2's schedule for CIFAR-10, 232 levels from 50 to 0.01.
            precondition: a row of the table in ``scorematch.nets.precondition``; "karras" is the best one to train
                with.
            precondition_options: the options of the row, as for the constructor.

        Returns:
            The network, with new weights drawn from torch's global generator. The last convolution is zero at first, so
            that the backbone returns zero.

        References:
            Ho et al., 2020, arXiv:2006.11239; Karras et al., 2022, arXiv:2206.00364.
        """
        given = {
            "channels": channels,
            "widths": widths,
            "layers_per_block": layers_per_block,
            "attention": attention,
            "condition_channels": condition_channels,
            "classes": classes,
            "null_class": null_class,
            "dropout": dropout,
            "patch": patch,
            "pixel_channels": pixel_channels,
            "pixel_layers": pixel_layers,
            "padding": padding,
            "condition_features": condition_features,
        }
        return cls._build("unet", image_size, schedule, precondition, given, precondition_options)

    @classmethod
    def ncsnpp(
        cls,
        channels: int = 3,
        image_size: Size = 32,
        *,
        widths: Sequence[int] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        attention: Sequence[bool] | None = None,
        condition_channels: int = 0,
        classes: int | None = None,
        null_class: bool = False,
        dropout: float = 0.1,
        embedding: TimeEmbedding = "fourier",
        resample_filter: Sequence[int] = (1, 3, 3, 1),
        input_pyramid: Pyramid = "residual",
        output_pyramid: Pyramid = "none",
        model_channels: int | None = None,
        patch: int = 1,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
        precondition_options: Mapping[str, float] | None = None,
    ) -> ScoreNet:
        """Builds an NCSN++ or DDPM++ to be trained from scratch.

        The defaults are the NCSN++ of Song et al. for CIFAR-10 with the preconditioning of EDM. For their own training,
        pass ``precondition="ncsnpp"``. DDPM++ has ``embedding="positional"``, ``resample_filter=(1, 1)`` and
        ``input_pyramid="none"``; the networks for 256 pixels have ``input_pyramid="skip"``, ``output_pyramid="skip"``
        and other widths. ``scorematch.nets.ncsnpp`` describes these parts.

        Args:
            channels: the number of channels of an image.
            image_size: (height, width) of a sample in pixels, or the side of a square one. The network takes all sizes
                that are multiples of ``patch * 2 ** (len(widths) - 1)``.
            widths: the number of feature channels at each scale, from full resolution down; height and width are halved
                from one scale to the next.
            layers_per_block: the number of residual blocks at each scale on the way down; the way up has one more.
            attention: one bool per scale, True for self-attention at this scale; None gives it to the scale whose
                features have a shorter side of 16, as published. The middle block always has attention.
            condition_channels: the number of channels of a conditioning image, which is concatenated with x and has the
                same units; 0 for none.
            classes: the number of classes of a class-conditional network; None for none.
            null_class: whether there is one more class, with the index ``classes``, for samples without a class, as
                needed for classifier-free guidance. It is used if no condition is given.
            dropout: the dropout probability in the residual blocks.
            embedding: the embedding of the noise level: "fourier", or "positional" for a preconditioning whose c_noise
                is a time step or an index.
            resample_filter: the filter for resampling: (1, 3, 3, 1); or (1, 1), which averages 2 x 2 pixels on the way
                down and repeats pixels on the way up.
            input_pyramid: the input pyramid, "residual", "skip" or "none".
            output_pyramid: the output pyramid, "residual", "skip" or "none".
            model_channels: the number of output channels of the first convolution, and a quarter of the width of the
                embedding; None is ``widths[0]``. EDM's network for CIFAR-10 has 128, with three scales of 256.
            patch: the side of the patches in pixels. With ``patch`` above 1 each patch becomes one position with more
                channels; with 2 the network takes about a quarter of the time.
            schedule: the noise levels; None is the published schedule for CIFAR-10, 1000 levels from 50 to 0.01.
            precondition: a row of the table in ``scorematch.nets.precondition``.
            precondition_options: the options of the row, as for the constructor.

        Returns:
            The network, with new weights drawn from torch's global generator as in the authors' code. The last
            convolution is zero at first, so that the backbone returns zero.

        References:
            Song et al., 2021, arXiv:2011.13456; Karras et al., 2022, arXiv:2206.00364.
        """
        given = {
            "channels": channels,
            "widths": widths,
            "layers_per_block": layers_per_block,
            "attention": attention,
            "condition_channels": condition_channels,
            "classes": classes,
            "null_class": null_class,
            "dropout": dropout,
            "embedding": embedding,
            "resample_filter": resample_filter,
            "input_pyramid": input_pyramid,
            "output_pyramid": output_pyramid,
            "model_channels": model_channels,
            "patch": patch,
        }
        return cls._build("ncsnpp", image_size, schedule, precondition, given, precondition_options)

    @classmethod
    def mlp(
        cls,
        features: int,
        *,
        width: int = 256,
        depth: int = 4,
        condition_features: int = 0,
        classes: int | None = None,
        null_class: bool = False,
        dropout: float = 0.0,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
        precondition_options: Mapping[str, float] | None = None,
    ) -> ScoreNet:
        """Builds a network for vectors (N, D), such as the parameters of a simulation; see ``scorematch.nets.mlp``.

        Call ``net.fit_units(data)`` before the training, unless the data have mean 0 and standard deviation 0.5.

        Args:
            features: D, the number of values of a vector.
            width: the number of hidden features, at least 2.
            depth: the number of residual blocks.
            condition_features: K, the number of values of a vector as the condition, float (N, K); 0 for none. A vector
                of NaN stands for no condition, and is used if none is given.
            classes: the number of classes of a class-conditional network; None for none.
            null_class: whether there is one more class, with the index ``classes``, for samples without a class.
            dropout: the dropout probability in the blocks.
            schedule: the noise levels; None is 232 levels from 50 to 0.005.
            precondition: a row of the table in ``scorematch.nets.precondition``: "karras", "flow" or "flow_reverse".
            precondition_options: the options of the row, as for the constructor.

        Returns:
            The network, with new weights drawn from torch's global generator. Its output is zero at first.

        Example:
            >>> net = ScoreNet.mlp(2, width=64, condition_features=3)
            >>> net(torch.rand(5, 2), 0.1, torch.rand(5, 3)).shape
            torch.Size([5, 2])
        """
        given = {
            "features": features,
            "width": width,
            "depth": depth,
            "condition_features": condition_features,
            "classes": classes,
            "null_class": null_class,
            "dropout": dropout,
        }
        return cls._build("mlp", (), schedule, precondition, given, precondition_options)

    @classmethod
    def _build(
        cls,
        name: str,
        image_size: AnySize,
        schedule: NoiseSchedule | None,
        precondition: str,
        given: Mapping[str, Any],
        precondition_options: Mapping[str, float] | None = None,
    ) -> ScoreNet:
        """Builds a network of images in [0, 1], or other data, with new weights, from the arguments of its builder."""
        family = FAMILIES[name]
        check_choice("precondition", precondition, family.preconditions)
        schedule = NoiseSchedule.geometric(*family.levels) if schedule is None else schedule
        check_schedule(schedule)
        sides = (image_size, image_size) if isinstance(image_size, Integral) else image_size
        size = check_sizes("image_size", sides, "a side or (height, width)") if family.dimensions != (0,) else ()
        if len(size) not in family.dimensions:
            wanted = "a side, (height, width)" + (
                ", (length,) or (depth, height, width)" if len(family.dimensions) > 1 else ""
            )
            raise ValueError(f"image_size must be {wanted}, got {image_size!r}.")
        backbone, architecture = family.create(given, size, levels=len(schedule), precondition=precondition)
        net = cls(
            backbone,
            schedule,
            precondition=precondition,
            sample_shape=(given["channels"], *size) if size else (given["features"],),
            value_range=(0, 1) if len(size) == 2 else None,
            precondition_options=precondition_options,
        )
        net._architecture = {"family": name, **architecture}
        return net

    # -- The score ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: float | Tensor, condition: Tensor | int | None = None) -> Tensor:
        """The score of the noisy data at x.

        Args:
            x: noisy data (N, ...), images in [0, 1] plus noise, floating point.
            sigma: the noise level, a float or a tensor () or (N,), positive, in the units of x. Networks that receive
                the position of sigma in the schedule (NCSN, DDPM) clamp a sigma outside the schedule to its ends.
            condition: for conditional networks: classes, int64 (N,), or an int, the class of all samples; or an image
                (N, K, H, W) in [0, 1]. It is mapped to [-1, 1] if x is.

        Returns:
            The score, with the shape and dtype of x.
        """
        return self._outputs(x, sigma, condition)[0]

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Tensor | int | None, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        shape = self.sample_shape  # networks of the package check x themselves
        if self.family is None and shape is not None and len(shape) == 3 and (x.ndim != 4 or x.shape[1] != shape[0]):
            raise ValueError(f"x must be images (N, {shape[0]}, H, W), got shape {tuple(x.shape)}.")
        condition = as_condition(condition, x, self.conditioning)
        preconditioning = self.preconditioning
        coefficients = preconditioning.coefficients(as_sigma(sigma, x))
        return preconditioning.outputs(self.backbone, x, coefficients, condition, variance=variance)

    @property
    def preconditioning(self) -> Preconditioning:
        """The row of the preconditioning table with the values of this network, such as its noise levels."""
        options = self.precondition_options
        return Preconditioning(
            self.precondition, self.schedule, self.value_range, self.predicts_variance, options, self.units
        )

    @property
    def conditioning(self) -> Condition | None:
        """The condition that the network takes; None for a backbone of your own without ``conditioning``."""
        if self.family is None:
            own = getattr(self.backbone, "conditioning", None)
            return own if isinstance(own, Condition) else None
        return self.family.condition(self.backbone, predicts_variance=self.predicts_variance)

    def inference_copy(self, *, compile: bool = False) -> InferenceScore | ScoreNet:  # noqa: A002  (torch's word)
        """Returns a copy that is optimized for inference; its samples are statistically the same.

        Any sampler accepts it in place of the network. It uses a faster memory layout, bfloat16 inside the network
        where the processor multiplies it natively, and computes what depends on sigma alone once per noise level
        (``scorematch.nets.inference``). The method returns the network itself if its backbone is your own, its weights
        are not float32, or it was changed after it was built, for example by hooks or adapters.

        Args:
            compile: whether to compile the copy with ``torch.compile`` at its first call, with CUDA graphs on CUDA. If
                compilation fails, the copy warns and runs uncompiled. Pass the compiled copy to a sampler to compile
                once and sample often.

        Returns:
            The copy, which is called in the same way as this network. Later changes of this network's weights do not
            affect it.
        """
        if self.family is None or type(self) is not ScoreNet or not is_plain(self, self.backbone):
            return self
        return InferenceScore(
            self.family,
            self.backbone,
            self.preconditioning,
            sample_shape=self.sample_shape,
            sampler_settings=self.sampler_settings,
            compile=compile,
        )

    # -- Files --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as a plain dict: all that is needed to rebuild this network without its weights.

        ``save_pretrained`` writes it to config.json.
        """
        return {
            "format_version": FORMAT_VERSION,
            **copy.deepcopy(self._architecture),
            "precondition": self.precondition,
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
            "value_range": None if self.value_range is None else list(self.value_range),
            "predicts_variance": self.predicts_variance,
            **(
                {}
                if self.units is None
                else {"units": {name: list(part) for name, part in self.units._asdict().items()}}
            ),
            **({"precondition_options": dict(self.precondition_options)} if self.precondition_options else {}),
            "sampler_settings": None if self.sampler_settings is None else self.sampler_settings.to_dict(),
            **({} if self.class_names is None else {"class_names": list(self.class_names)}),
            **({} if self._scheduler is None else {"scheduler": copy.deepcopy(self._scheduler)}),
            "schedule": self.schedule.to_dict(),
        }

    def definition(self) -> list[Any]:
        """The parts of the configuration that affect the score, and the weights."""
        config = {key: value for key, value in self.config.items() if key not in FREE_KEYS}
        return [config, dict(self.state_dict())]

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
            name_or_folder: a short name (networks such as "mnist" and "cifar10-small" ship with the package; ``python
                -m scorematch models`` lists all names); or a folder, given as a path or as a string with a slash
                ("./cifar10"); or a repository of the Hub, ``owner/name``. Folders and repositories hold the files of
                ``save_pretrained``, or a U-Net of diffusers, alone or in a pipeline.

            Rarely needed:

            revision: the branch, tag or commit of a repository. None is the commit that this package lists for the
                network (``models``), or the main branch. A commit in the cache is loaded without a request.
            token: an access token for private and gated repositories; None is the token of the current login.
            cache_dir: the folder for downloads; None is the cache of huggingface_hub.
            local_files_only: whether to load from the cache only, without requests.
            backbone: for a saved network whose backbone is your own: a module of the same class, into which the weights
                are loaded.

        Returns:
            The network in eval mode, on the CPU, in float32 whatever the dtype of the stored weights.

        Raises:
            FileNotFoundError: if there is no such name, folder, repository or revision, or a file is missing in it; or
                the Hub cannot be reached and the network is not in the cache.
            PermissionError: if the repository is gated and the token has no access.
            ValueError: if a file is damaged or has an unknown format, the weights do not fit the configuration, or
                ``backbone`` is missing or not needed.
            OSError: if the download fails for another reason.

        Example:
            >>> ScoreNet.from_pretrained("mnist").sample_shape
            (1, 28, 28)
        """
        with torch.inference_mode(False):  # the weights of a network that is loaded inside it can be trained later
            place = locate(
                name_or_folder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
            return cls.from_stored(load(place), backbone)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, raw: bool = False
    ) -> ScoreNet:
        """Reads a checkpoint of another project; ``save_pretrained`` then writes it in the format of this package.

        The projects are NCSN, NCSNv2, adversarial consistent score matching, score_sde, EDM, improved-diffusion and
        guided-diffusion. No code in the file is run. The result is a score in the units of this package, with the
        published noise levels and sampler settings. The command ``scorematch convert`` reads and saves.

        Args:
            checkpoint: the authors' file: ``checkpoint_<step>.pth`` (NCSN, NCSNv2, score_sde), ``.pkl`` (EDM), or
                ``.pt`` (improved-diffusion, guided-diffusion).
            config: the configuration that the network was trained with. For score_sde, improved-diffusion and
                guided-diffusion it is required: the name of a published one, such as "ve/cifar10_ncsnpp_continuous" or
                "cifar10_uncond_50M_500K", or a JSON or YAML file with the authors' options. For NCSN and NCSNv2 it is
                config.yml, which is required unless the checkpoint contains its noise levels or is an NCSN with 10
                levels. A file of EDM contains its options.
            raw: whether to read the weights of the last step instead of their moving average. For EDM,
                improved-diffusion and guided-diffusion True is an error.

        Returns:
            The network in eval mode, in float32, on the CPU.

        Raises:
            IsADirectoryError: if ``checkpoint`` is a folder.
            FileNotFoundError: if a file is missing, or there is no published configuration with this name.
            ImportError: if ``config`` is a YAML file and PyYAML is not installed.
            ValueError: if the file is damaged, has an unknown format, refers to anything but tensors and plain values,
                or needs an option that is not supported; or if the configuration is missing or does not fit.
        """
        return cls.from_stored(read_checkpoint(checkpoint, config=config, raw=raw))

    @classmethod
    def from_diffusers(cls, unet: nn.Module, scheduler: Any) -> ScoreNet:
        """A ScoreNet with the weights of a UNet2DModel of diffusers.

        Args:
            unet: a ``UNet2DModel``. Its weights are copied.
            scheduler: the scheduler that it was trained with, such as a ``DDPMScheduler``. It defines what the network
                predicts, and the noise levels.

        Returns:
            The network in eval mode, in float32, on the CPU.
        """
        return cls.from_stored(read_objects(unet, scheduler))

    @classmethod
    def from_stored(cls, stored: Stored, backbone: nn.Module | None = None) -> ScoreNet:
        """Builds the network of a checked configuration and its weights, which the readers of file formats return.

        Args:
            stored: the configuration and the weights. The weights are moved out of it into the network.
            backbone: for a backbone that is your own: a module of the same class, into which the weights are loaded.

        Returns:
            The network in eval mode, in float32, on the CPU; on the meta device if there are no weights.
        """
        config = stored.config
        net = cls(
            build(stored, backbone),
            NoiseSchedule.from_dict(config["schedule"]),
            precondition=config["precondition"],
            sample_shape=config["sample_shape"],
            value_range=config["value_range"],
            predicts_variance=config["predicts_variance"],
            precondition_options=config.get("precondition_options"),
        )
        net._architecture, net._scheduler = architecture(config), copy.deepcopy(config.get("scheduler"))
        settings = config["sampler_settings"]
        net.sampler_settings = None if settings is None else SamplerSettings.from_dict(settings)
        try:
            net.class_names = config.get("class_names")
            if "units" in config:
                net.units = Units(**config["units"])
        except ValueError as error:
            raise ValueError(f"{stored.source}: {error}") from error
        return net.float().eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, diffusers: bool = False) -> None:
        """Writes config.json and the weights into a folder, for ``from_pretrained``.

        The weights are stored in their own dtype. Other files in an existing folder are kept, and a network in it is
        replaced only when the new one is completely written. If the process is killed at any time,
        ``from_pretrained`` loads either the previous network or the new one, and the next call deletes incomplete
        files. Except on Windows, other processes may load from the folder and save to it at the same time.

        A U-Net that diffusers can run is written in the layout of diffusers, with the weights in
        diffusion_pytorch_model.safetensors; the weights of every other network are in model.safetensors.
        ``DDPMPipeline.from_pretrained`` of diffusers also loads the folder of a U-Net with the preconditioning of a
        DDPM ("ddpm", "ddpm_v" or "ddpm_x0"), without a condition. Its number of time steps is the number of the
        network's noise levels.

        Args:
            folder: created if it does not exist.
            diffusers: whether to raise an error if a ``DDPMPipeline`` cannot run the network.

        Raises:
            ValueError: if ``diffusers`` is True and a ``DDPMPipeline`` cannot run the network; the message says why. Or
                if the backbone was wrapped or parametrized, so that the network could not be loaded.
            FileExistsError: if the folder holds another network in unet/, or is the folder of a training run.
            OSError: if the folder cannot be written; it is then as it was.
        """
        backbone = getattr(self.backbone, "_orig_mod", self.backbone)  # without torch.compile
        save(folder, self.config, backbone.state_dict(), diffusers=diffusers)

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

        One commit adds the files that ``save_pretrained`` writes, and a model card if the repository has none. It
        deletes the weights of another network in the repository and keeps all other files.

        Args:
            repo_id: ``owner/name``; the repository is created if it does not exist.
            license: the license in the model card, by its identifier on the Hub ("mit", "apache-2.0").
            datasets: the names of the training data on the Hub, for the model card.

            Rarely needed:

            private: whether a new repository is private; None is the owner's default.
            revision: the branch, created if it does not exist; None is the main branch.
            token: an access token with write permission; None is the token of the current login.
            commit_message: the message of the commit.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: if ``repo_id`` is not ``owner/name``.
            PermissionError: if the token may not write to the repository.
            OSError: if the upload fails for another reason.
        """
        count = sum(parameter.numel() for parameter in self.parameters())
        card = model_card(
            repo_id, self.config, count, conditioning=self.conditioning, license=license, datasets=datasets
        )
        return upload(
            self.save_pretrained,
            repo_id,
            card,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )


def _moments(data: Tensor, part: str, name: str) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each channel of data (N, C, ...), float64."""
    std, mean = torch.std_mean(data.detach().double().transpose(0, 1).flatten(1), 1)
    if not bool(torch.isfinite(std).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite values, or a single sample.")
    if not bool((std > 0).all()):
        raise ValueError(f"{part} {int((std == 0).nonzero()[0])} of {name} is constant. Leave it out.")
    return mean, std
