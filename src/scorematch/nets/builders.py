r"""The constructors of networks with new weights, which ``ScoreNet`` inherits: one for each family.

Each has the arguments of its family with the published values as their defaults. ``FAMILIES`` has what they stand on:
how a backbone is made of the arguments, which rows of the preconditioning table it takes, and its default noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from scorematch.core.arguments import check_choice, check_sizes
from scorematch.nets import FAMILIES
from scorematch.nets.ncsnpp import Pyramid, TimeEmbedding
from scorematch.nets.refinenet import Depth
from scorematch.nets.space import Padding
from scorematch.noise import NoiseSchedule, check_schedule

if TYPE_CHECKING:
    from typing_extensions import Self

Size = int | tuple[int, int]
AnySize = int | Sequence[int]


class Builders:
    """The constructors ``ScoreNet.ncsn``, ``ncsnv2``, ``unet``, ``ncsnpp`` and ``mlp``."""

    _architecture: dict[str, Any]
    is_new: bool

    @classmethod
    def ncsn(
        cls,
        channels: int = 3,
        image_size: Size = 32,
        *,
        width: int = 128,
        depth: Depth = "standard",
        schedule: NoiseSchedule | None = None,
    ) -> Self:
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
    ) -> Self:
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
        condition_encoder: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
        precondition_options: Mapping[str, float] | None = None,
    ) -> Self:
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
                of NaN stands for no condition, and is used if none is given. The condition of a network that takes
                several is a dict with the names "class", "features" and "image".
            condition_encoder: a module of your own that maps a condition (N, ...), of any shape and in its own units,
                to ``condition_features`` features (N, K). It is trained with the network. A saved folder has its
                weights; pass the module again to ``from_pretrained``.
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
            "condition_encoder": condition_encoder,
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
    ) -> Self:
        """Builds an NCSN++ or DDPM++ to be trained from scratch.

        The defaults are the NCSN++ of Song et al. for CIFAR-10 with the preconditioning of EDM. For their own training,
        pass ``precondition="ncsnpp"``. DDPM++ has ``embedding="positional"``, ``resample_filter=(1, 1)`` and
        ``input_pyramid="none"``; the networks for 256 pixels have ``input_pyramid="skip"``, ``output_pyramid="skip"``
        and other widths. ``scorematch.nets.ncsnpp`` describes these parts.

        Args:
            channels: the number of channels of an image.
            image_size: (height, width) of a sample in pixels, or the side of a square one. Every side is at least the
                largest stride, ``patch * 2 ** (len(widths) - 1)``; sides that are no multiples of it are extended
                inside.
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
        condition_encoder: nn.Module | None = None,
        classes: int | None = None,
        null_class: bool = False,
        dropout: float = 0.0,
        schedule: NoiseSchedule | None = None,
        precondition: str = "karras",
        precondition_options: Mapping[str, float] | None = None,
    ) -> Self:
        """Builds a network for vectors (N, D), such as the parameters of a simulation; see ``scorematch.nets.mlp``.

        Call ``net.fit_units(data)`` before the training, unless the data have mean 0 and standard deviation 0.5.

        Args:
            features: D, the number of values of a vector.
            width: the number of hidden features, at least 2.
            depth: the number of residual blocks.
            condition_features: K, the number of values of a vector as the condition, float (N, K); 0 for none. A vector
                of NaN stands for no condition, and is used if none is given. The condition of a network that takes
                several is a dict with the names "class", "features" and "image".
            condition_encoder: a module of your own that maps a condition (N, ...), of any shape and in its own units,
                to ``condition_features`` features (N, K). It is trained with the network. A saved folder has its
                weights; pass the module again to ``from_pretrained``.
            classes: the number of classes of a class-conditional network; None for none.
            null_class: whether there is one more class, with the index ``classes``, for samples without a class.
            dropout: the dropout probability in the blocks.
            schedule: the noise levels; None is 232 levels from 50 to 0.005.
            precondition: a row of the table in ``scorematch.nets.precondition``: "karras", "flow" or "flow_reverse".
            precondition_options: the options of the row, as for the constructor.

        Returns:
            The network, with new weights drawn from torch's global generator. Its output is zero at first.

        Example:
            >>> import torch
            >>> from scorematch import ScoreNet
            >>> net = ScoreNet.mlp(2, width=64, condition_features=3)
            >>> net(torch.rand(5, 2), 0.1, torch.rand(5, 3)).shape
            torch.Size([5, 2])
        """
        given = {
            "features": features,
            "width": width,
            "depth": depth,
            "condition_features": condition_features,
            "condition_encoder": condition_encoder,
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
    ) -> Self:
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
        score_net: Any = cls  # the constructor is that of ScoreNet
        net: Self = score_net(
            backbone,
            schedule,
            precondition=precondition,
            sample_shape=(given["channels"], *size) if size else (given["features"],),
            value_range=(0, 1) if len(size) == 2 else None,
            precondition_options=precondition_options,
        )
        net._architecture = {"family": name, **architecture}
        net.is_new = True
        return net
