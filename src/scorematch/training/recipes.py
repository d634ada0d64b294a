"""Recipes: a network and the settings to train it with, as they were published, under one name each.

==================  ==========================================  =======================================================
recipe              what it was published for                   network
==================  ==========================================  =======================================================
tiny                trials and tests                            U-Net on 2 x 2 patches, less than 100,000 parameters
small-32            any pictures, little compute                U-Net on 2 x 2 patches, 16 million parameters
small-64            any pictures, little compute                U-Net on 2 x 2 patches, 16 million parameters
ncsn-mnist          MNIST                                       NCSN, width 64
ncsn-cifar10        CIFAR-10                                    NCSN, width 128
ncsn-celeba         CelebA, 32 px                               NCSN, width 128
ncsnv2-cifar10      CIFAR-10                                    NCSNv2
ncsnv2-celeba       CelebA, 64 px                               NCSNv2
ncsnv2-church       LSUN church, 96 px                          NCSNv2Deeper
ncsnv2-bedroom      LSUN bedroom and tower, 128 px              NCSNv2Deeper
ncsnv2-ffhq         FFHQ, 256 px                                NCSNv2Deepest
ddpm-cifar10        CIFAR-10                                    DDPM's U-Net
palette             restoration, 256 px                         U-Net of ADM's widths
==================  ==========================================  =======================================================

A recipe may be used for other pictures and sizes than those that it was published for; noise levels and learning rates
are then those of the publication all the same. NCSN++ and DDPM++ are missing: their residual blocks, which rescale
skip connections and resample with a filter, exist in this package in the variant of diffusers only.

References:
    NCSN: Song & Ermon, 2019, arXiv:1907.05600, and github.com/ermongroup/ncsn, configs/anneal.yml.
    NCSNv2: Song & Ermon, 2020, arXiv:2006.09011, and github.com/ermongroup/ncsnv2, configs/.
    DDPM: Ho et al., 2020, arXiv:2006.11239, Appendix B.
    Palette: Saharia et al., 2022, arXiv:2111.05826, Appendix A.
    EDM: Karras et al., 2022, arXiv:2206.00364, Table 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scorematch.noise import NoiseSchedule
from scorematch.palette import TASKS, MultiTask
from scorematch.sampling.settings import SamplerSettings
from scorematch.score import ScoreNet
from scorematch.training.sources import Crop


@dataclass(frozen=True)
class Recipe:
    """A network and the settings to train it with.

    Attributes:
        name: of the recipe.
        source: where the values are from.
        constructor: of the network, ``ScoreNet.ncsn``, ``ScoreNet.ncsnv2`` or ``ScoreNet.unet``.
        network: its arguments, except the channels, the size and the schedule.
        schedule: the noise levels of the network.
        image_size: the side of the square images.
        channels: of the images, 1 or 3; None is that of the data.
        crop: of the pictures, as in ``open_images``.
        training: the arguments of ``train`` that differ from its defaults, except the condition.
        tasks: the restoration tasks of ``scorematch.palette`` that make the condition, by name.
        sampler: the published or measured settings to sample with.
        differs: what differs from the publication.

    Example:
        >>> net = RECIPES["tiny"].build(channels=1)
        >>> net.sample_shape, sum(parameter.numel() for parameter in net.parameters()) < 100_000
        ((1, 32, 32), True)
    """

    name: str
    source: str
    constructor: Literal["ncsn", "ncsnv2", "unet"]
    network: Mapping[str, Any]
    schedule: NoiseSchedule
    image_size: int
    training: Mapping[str, Any]
    sampler: SamplerSettings
    channels: int | None = None
    crop: Crop = "center"
    tasks: tuple[str, ...] = ()
    differs: str = ""

    def build(
        self, channels: int = 3, image_size: int | tuple[int, int] | None = None, *, classes: int | None = None
    ) -> ScoreNet:
        """The network, with new weights drawn from torch's global generator.

        Args:
            channels: of the images.
            image_size: (height, width), or the side of a square; None is the recipe's.
            classes: the number of classes, for a class-conditional U-Net.

        Raises:
            ValueError: for classes, if the network is not a U-Net.
        """
        make = getattr(ScoreNet, self.constructor)
        if classes is not None and "classes" not in inspect.signature(make).parameters:
            raise ValueError(f"the network of {self.name} takes no classes. Choose a recipe with a U-Net.")
        options = dict(self.network) if classes is None else {**self.network, "classes": classes}
        size = self.image_size if image_size is None else image_size
        net: ScoreNet = make(channels, size, schedule=self.schedule, **options)
        net.sampler_settings = self.sampler
        return net

    def options(self) -> dict[str, Any]:
        """The arguments of ``train`` that differ from its defaults, with the task that makes the condition.

        Raises:
            ImportError: without Pillow, for tasks that need it.
        """
        task = {"condition": MultiTask([TASKS[name]() for name in self.tasks])} if self.tasks else {}
        return {**self.training, **task}


_ADAM = {"betas": (0.9, 0.999), "decay": "constant"}
_AVERAGE = "the average of the weights forgets its start sooner, as in the later code of Song et al."


def _ncsn(data: str, width: int, size: int, channels: int, *, flip: bool, crop: Crop = "center") -> Recipe:
    return Recipe(
        name=f"ncsn-{data}",
        source="Song & Ermon, 2019, arXiv:1907.05600; github.com/ermongroup/ncsn, configs/anneal.yml",
        constructor="ncsn",
        network={"width": width},
        schedule=NoiseSchedule.geometric(1, 0.01, 10),
        image_size=size,
        channels=channels,
        crop=crop,
        training={
            **_ADAM,
            "images": 200_000 * 128,
            "batch_size": 128,
            "lr": 1e-3,
            "warmup_images": 0,
            "clip": None,
            "ema": (),
            "flip": flip,
        },
        sampler=SamplerSettings(steps_per_level=100, step_size=2e-5),
        differs="the pixels were dequantized, x 255/256 + u/256 with u uniform in [0, 1)",
    )


def _ncsnv2(
    data: str,
    size: int,
    depth: str,
    schedule: tuple[float, int],
    steps: int,
    sampler: tuple[int, float],
    *,
    batch_size: int = 128,
    eps: float = 1e-8,
    crop: Crop = "center",
) -> Recipe:
    sigma_max, levels = schedule
    return Recipe(
        name=f"ncsnv2-{data}",
        source=f"Song & Ermon, 2020, arXiv:2006.09011; github.com/ermongroup/ncsnv2, configs/{data}.yml",
        constructor="ncsnv2",
        network={"width": 128, "depth": depth},
        schedule=NoiseSchedule.geometric(sigma_max, 0.01, levels),
        image_size=size,
        channels=3,
        crop=crop,
        training={
            **_ADAM,
            "images": steps * batch_size,
            "batch_size": batch_size,
            "lr": 1e-4,
            "eps": eps,
            "warmup_images": 0,
            "clip": None,
            "ema": (0.999,),
        },
        sampler=SamplerSettings(steps_per_level=sampler[0], step_size=sampler[1]),
        differs=_AVERAGE,
    )


def _small(name: str, size: int, widths: tuple[int, ...]) -> Recipe:
    """A U-Net on patches for little compute.

    EDM's loss and levels (row "karras", log-normal levels: the defaults of ``train``) learn most from an image, and a
    network on 2 x 2 patches takes the least time for it. In a trial on CIFAR-10 (470,000 parameters, 12,800 images) two
    blocks of 8 channels at full resolution lowered the loss by 3 to 7 % at levels up to 0.05, where the pattern of the
    patches would show. There is no regularization, since short runs see each image a few hundred times at most.
    """
    return Recipe(
        name=name,
        source="of this package; loss, noise levels and sampler: Karras et al., 2022, arXiv:2206.00364, Table 1",
        constructor="unet",
        network={"widths": widths, "patch": 2, "pixel_channels": 8},
        schedule=NoiseSchedule.geometric(40, 0.001, 256),  # EDM's 80 to 0.002 for images in [-1, 1]
        image_size=size,
        training={},
        sampler=SamplerSettings(sampler="ode", levels=18),
    )


_ALL = (
    Recipe(
        name="tiny",
        source="of this package",
        constructor="unet",
        network={"widths": (12, 16), "layers_per_block": 1, "patch": 2, "pixel_channels": 4},
        schedule=NoiseSchedule.geometric(40, 0.001, 256),
        image_size=32,
        training={"images": 50_000, "batch_size": 32},
        sampler=SamplerSettings(sampler="ode", levels=18),
    ),
    _small("small-32", 32, (128, 256)),
    _small("small-64", 64, (64, 128, 256)),
    _ncsn("mnist", 64, 28, 1, flip=False),
    _ncsn("cifar10", 128, 32, 3, flip=True),
    _ncsn("celeba", 128, 32, 3, flip=True, crop="celeba"),
    _ncsnv2("cifar10", 32, "standard", (50, 232), 300_000, (5, 6.2e-6)),
    _ncsnv2("celeba", 64, "standard", (90, 500), 210_000, (5, 3.3e-6), crop="celeba"),
    _ncsnv2("church", 96, "deeper", (140, 788), 200_000, (4, 4.9e-6)),
    _ncsnv2("bedroom", 128, "deeper", (190, 1086), 150_000, (3, 1.8e-6)),
    _ncsnv2("ffhq", 256, "deepest", (348, 2311), 80_000, (3, 9e-7), batch_size=32, eps=1e-3),
    Recipe(
        name="ddpm-cifar10",
        source="Ho et al., 2020, arXiv:2006.11239, Appendix B",
        constructor="unet",
        network={
            "widths": (128, 256, 256, 256),
            "attention": (False, True, False, False),  # at 16 x 16 pixels
            "dropout": 0.1,
            "precondition": "ddpm",
        },
        schedule=NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000)),
        image_size=32,
        channels=3,
        training={
            **_ADAM,
            "images": 800_000 * 128,
            "batch_size": 128,
            "lr": 2e-4,
            "warmup_images": 5000 * 128,
            "clip": 1.0,
            "ema": (0.9999,),
        },
        sampler=SamplerSettings(sampler="ancestral", levels=1000, variance="large"),
        differs=f"{_AVERAGE}; features are downsampled with padding on all sides",
    ),
    Recipe(
        name="palette",
        source="Saharia et al., 2022, arXiv:2111.05826, Appendix A",
        constructor="unet",
        network={
            "widths": (256, 256, 512, 512, 1024, 1024),
            "attention": (False, False, False, True, True, True),  # at 32, 16 and 8 pixels
            "condition_channels": 3,
            "precondition": "ddpm",
        },
        schedule=NoiseSchedule.from_betas(np.linspace(1e-6, 0.01, 2000)),
        image_size=256,
        channels=3,
        training={
            **_ADAM,
            "images": 1_000_000 * 1024,
            "batch_size": 1024,
            "lr": 1e-4,
            "warmup_images": 10_000 * 1024,
            "clip": None,
            "ema": (0.9999,),
        },
        tasks=("jpeg", "inpainting", "colorization"),
        sampler=SamplerSettings(sampler="ancestral", variance="large"),
        differs=(
            f"{_AVERAGE}; the residual blocks and the attention are those of DDPM, with 481 million parameters against "
            "552; noise levels are those of the schedule, and none between them"
        ),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
