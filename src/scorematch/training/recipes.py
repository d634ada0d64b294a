"""Recipes: networks with the settings to train them, mostly from publications.

==================  ==========================================  =======================================================
recipe              published for                               network
==================  ==========================================  =======================================================
tiny                trials and tests                            U-Net on 2 x 2 patches, less than 100,000 parameters
small-32            any images, little compute                  U-Net on 2 x 2 patches, 16 million parameters
small-64            any images, little compute                  U-Net on 2 x 2 patches, 16 million parameters
growing             any images, 28 to 64 px, one night          U-Net on patches that grows during the run (``growing``)
ncsn-mnist          MNIST                                       NCSN, width 64
ncsn-cifar10        CIFAR-10                                    NCSN, width 128
ncsn-celeba         CelebA, 32 px                               NCSN, width 128
ncsnv2-cifar10      CIFAR-10                                    NCSNv2
ncsnv2-celeba       CelebA, 64 px                               NCSNv2
ncsnv2-church       LSUN church, 96 px                          NCSNv2Deeper
ncsnv2-bedroom      LSUN bedroom and tower, 128 px              NCSNv2Deeper
ncsnv2-ffhq         FFHQ, 256 px                                NCSNv2Deepest
ddpm-cifar10        CIFAR-10                                    DDPM's U-Net
ncsnpp-cifar10      CIFAR-10                                    NCSN++, variance exploding, continuous levels
ddpmpp-cifar10      CIFAR-10                                    DDPM++, variance preserving, continuous levels
edm-cifar10         CIFAR-10                                    EDM's DDPM++
palette             restoration, 256 px                         U-Net of ADM's widths
==================  ==========================================  =======================================================

A recipe can be used for other images and sizes than those of the publication; the noise levels and the learning rate do
not change with them.

References:
    NCSN: Song & Ermon, 2019, arXiv:1907.05600, and github.com/ermongroup/ncsn, configs/anneal.yml.
    NCSNv2: Song & Ermon, 2020, arXiv:2006.09011, and github.com/ermongroup/ncsnv2, configs/.
    DDPM: Ho et al., 2020, arXiv:2006.11239, Appendix B.
    Palette: Saharia et al., 2022, arXiv:2111.05826, Appendix A.
    NCSN++, DDPM++: Song et al., 2021, arXiv:2011.13456, Appendices C, G and H, and
        github.com/yang-song/score_sde_pytorch, configs/.
    EDM: Karras et al., 2022, arXiv:2206.00364, Tables 1 and 7.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from scorematch.data.pictures import Crop
from scorematch.nets.space import Padding
from scorematch.noise import NoiseSchedule
from scorematch.restoration.palette import TASKS, MultiTask
from scorematch.sampling.settings import SamplerSettings
from scorematch.score import ScoreNet
from scorematch.training.growth import Stage
from scorematch.training.levels import LevelMixture, LogNormal, LogUniform, UniformTime
from scorematch.training.sampler import FAITHFUL


@dataclass(frozen=True)
class Recipe:
    """A network and the settings to train it with.

    Attributes:
        name: the name of the recipe.
        title: the network in words.
        source: the source of the values.
        constructor: the constructor of the network, "ncsn", "ncsnv2", "unet" or "ncsnpp" of ScoreNet.
        network: the arguments of the constructor, except the channels, the size and the schedule.
        schedule: the noise levels of the network.
        image_size: the side of the square images in pixels.
        channels: the number of channels of the images, 1 or 3; None is that of the data.
        crop: the crop of the images, as in ``open_images``.
        training: the arguments of ``train`` that differ from its defaults, except ``condition``.
        tasks: the names of the tasks of ``scorematch.restoration.palette`` that compute the condition.
        sampler: the published settings for sampling; None: ``train`` chooses them (``take_sampler``).
        differs: the differences from the publication.
        published_time: the published training time.
        of_side: the function that returns the recipe for images of another side; None if it is the same for all.
        short: the recipe for runs that are too short for the second stage; None if it is the same.

    Example:
        >>> net = RECIPES["tiny"].build(channels=1)
        >>> net.sample_shape, sum(parameter.numel() for parameter in net.parameters()) < 100_000
        ((1, 32, 32), True)
    """

    name: str
    title: str
    source: str
    constructor: Literal["ncsn", "ncsnv2", "unet", "ncsnpp"]
    network: Mapping[str, Any]
    schedule: NoiseSchedule
    image_size: int
    training: Mapping[str, Any]
    sampler: SamplerSettings | None = None
    channels: int | None = None
    crop: Crop = "center"
    tasks: tuple[str, ...] = ()
    differs: str = ""
    published_time: str = ""
    of_side: Callable[[int], Recipe] | None = None
    short: Recipe | None = None

    def of_length(self, images: int) -> Recipe:
        """The recipe for a run of so many images; only ``growing`` depends on it."""
        return self if self.short is None or images >= self.training["growth"][0].fewest else self.short

    def resized(self, image_size: int | tuple[int, int] | None) -> Recipe:
        """The recipe for images of another size, (height, width) or a side; only ``growing`` depends on it."""
        if image_size is None or self.of_side is None:
            return self
        return self.of_side(image_size if isinstance(image_size, int) else min(image_size))

    def build(
        self,
        channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        *,
        classes: int | None = None,
        null_class: bool = False,
    ) -> ScoreNet:
        """Builds the network.

        Args:
            channels: the number of channels of an image.
            image_size: (height, width) in pixels, or the side of a square; None is the size of the recipe.
            classes: the number of classes of a class-conditional network; None for none.
            null_class: whether it also has a null class, for training with ``label_drop``.

        Returns:
            The network, with new weights drawn from torch's global generator, and the published sampler settings.

        Raises:
            ValueError: if ``classes`` is given and the network is an NCSN or NCSNv2.
        """
        make = getattr(ScoreNet, self.constructor)
        if classes is not None and "classes" not in inspect.signature(make).parameters:
            raise ValueError(f"the network of {self.name} takes no classes. Choose a recipe with a U-Net or DDPM++.")
        of_classes = {} if classes is None else {"classes": classes, "null_class": null_class}
        options = {**self.network, **of_classes}
        size = self.image_size if image_size is None else image_size
        net: ScoreNet = make(channels, size, schedule=self.schedule, **options)
        net.sampler_settings = self.sampler
        return net

    def options(self) -> dict[str, Any]:
        """The arguments of ``train`` that differ from its defaults, including ``condition`` for recipes with tasks.

        Raises:
            ImportError: if a task needs Pillow and it is not installed.
        """
        task = {"condition": MultiTask([TASKS[name]() for name in self.tasks])} if self.tasks else {}
        return {**self.training, **task}


def network_for(
    shape: Sequence[int],
    *,
    condition_features: int = 0,
    condition_channels: int = 0,
    classes: int | None = None,
    null_class: bool = False,
    padding: Padding | Sequence[Padding] = "zeros",
) -> ScoreNet:
    """A new network for data of a shape: ``ScoreNet.mlp`` for vectors, and a U-Net for signals, fields and volumes.

    The U-Net halves every side until the shortest has 4 to 8 values, at most four times. In two and three dimensions it
    works on patches from 32 values per side on. The recommended sampler is UniPC with 36 levels; ``train`` replaces it
    for signals, fields and volumes by UniPC with the moments of the data, if there are at least 100 samples.

    Args:
        shape: the shape of one sample, (D,), (C, L), (C, H, W) or (C, D, H, W).
        condition_features: the number of values of a vector as the condition; 0 for none.
        condition_channels: the number of channels of an image as the condition; 0 for none.
        classes: the number of classes; None for none.
        null_class: whether there is one more class, for samples without a class.
        padding: what lies beyond the ends of the axes, as for ``ScoreNet.unet``.

    Raises:
        ValueError: if the data have more than three axes after the channels.

    Example:
        >>> network_for((2, 64), condition_features=3).sample_shape
        (2, 64)
    """
    conditions: dict[str, Any] = {"condition_features": condition_features, "classes": classes}
    conditions["null_class"] = null_class and classes is not None
    channels, *sides = shape
    conditions |= {"condition_channels": condition_channels} if condition_channels else {}
    if len(sides) > 3:
        raise ValueError(f"samples must be (D,), (C, L), (C, H, W) or (C, D, H, W), got shape {tuple(shape)}.")
    if not sides:
        net = ScoreNet.mlp(channels, **conditions)
    else:
        patch = 2 if len(sides) > 1 and min(sides) >= 32 else 1
        scales = min(5, max(1, (min(sides) // patch).bit_length() - 3))
        width = 32 if len(sides) == 1 else 64
        widths = (width, *[2 * width] * (scales - 1))
        pixels = 8 if patch > 1 else 0
        net = ScoreNet.unet(
            channels, tuple(sides), widths=widths, patch=patch, pixel_channels=pixels, padding=padding, **conditions
        )
    net.sampler_settings = FAITHFUL
    return net


# Adam's eps and the clipping of gradients depend on the scale of the loss. ``dsm_loss`` is half of the sum of the
# squared errors, and ``clip`` is for the loss divided by D/2. Published losses are the mean (Ho et al., and VP of Song
# et al.), the sum (Karras et al.) or half of the sum (VE of Song et al.).
_HALF = 3 * 32 * 32 / 2  # D/2
_AVERAGE = "EMA of the weights with a smaller decay at first, as in the later code of Song et al."
_EDM = NoiseSchedule.geometric(40, 0.001, 256)  # EDM's 80 to 0.002 for images in [-1, 1]
_DDPMPP = {"embedding": "positional", "resample_filter": (1, 1), "input_pyramid": "none"}


def _adam(steps: int, batch_size: int, lr: float, **others: Any) -> dict[str, Any]:
    """The settings of publications: Adam with a constant learning rate; no warm-up and no clipping unless given."""
    options = {"images": steps * batch_size, "batch_size": batch_size, "lr": lr, "warmup_images": 0, "clip": None}
    return {"betas": (0.9, 0.999), "decay": "constant", **options, **others}


def _small(name: str, size: int, widths: tuple[int, ...], title: str) -> Recipe:
    """A U-Net on patches for little compute.

    It is trained with EDM's loss and noise levels (preconditioning "karras" and log-normal levels, the defaults of
    ``train``), with which a network learns most from each image. A network on 2 x 2 patches takes the least time per
    image. In a trial on CIFAR-10 (470,000 parameters, 12,800 images) two blocks of 8 channels at full resolution
    reduced the loss by 3 to 7 % at levels up to 0.05, where the pattern of the patches would be visible. There is no
    regularization, since short runs see each image a few hundred times at most.
    """
    return Recipe(
        name,
        title,
        source="this package; loss, noise levels and sampler: Karras et al., 2022, arXiv:2206.00364, Table 1",
        constructor="unet",
        network={"widths": widths, "patch": 2, "pixel_channels": 8},
        schedule=_EDM,
        image_size=size,
        training={},
    )


def growing(side: int) -> Recipe:
    r"""The recipe ``growing`` for images of a side in pixels: that of the U-Nets that ship, in one run of three stages.

    ======  ======================================================  ================================  ===============
    stage   network, 5.8, 6.5 and 7.9 million parameters (32 px)    learning rate, mean of the        share of the
                                                                    levels (below 46 px, above)       images
    ======  ======================================================  ================================  ===============
    1       widths 64, 128, 160; one block per scale; attention     0.005; -1.2, -1.0                 25 %
            at the lowest; 16 channels at full resolution
    2       attention at all scales; 64 channels at full            0.0025; -1.5, -1.3                25 %
            resolution (32 from 46 px on)
    3       two blocks at the upper scales; four blocks at full     0.0025; -1.5, -1.3                50 %
            resolution instead of two (six from 46 px on)
    ======  ======================================================  ================================  ===============

    Each stage has the optimizer Muon with fixed norms of the weights, a warm-up and a decay to zero, batches of 64, and
    averages of relative length 0.05 and 0.10. The logarithm of the levels, in units in which images are in [-1, 1], is
    normal with this mean and deviation 1.2. From 46 px on, a tenth of the levels of the third stage is log-uniform from
    1 to 40, for images in [0, 1]: of the others 0.5 % are above 3, too few for restorations of large missing parts. A
    patch has the power of two, at least 2, for which the side is nearest to 16 patches: 2 to 45 px, 4 from 46 to 90 px.
    A run of less than 500,000 images has the first stage only, with the widths 48, 96 and 128, and one of less than 1.2
    million the first two, as a run of twice as many images has them. The channels and the classes of the images change
    nothing else.

    Args:
        side: the side of the images, or the shorter one, in pixels, at least 16.

    Example:
        >>> growing(64).network["patch"], len(growing(64).training["growth"])
        (4, 2)
    """
    if side < 16:
        raise ValueError(f"the recipe growing is for images of at least 16 pixels, got {side}. Take tiny.")
    patch = 2 ** max(1, round(math.log2(side / 16)))
    large = patch > 2

    def levels(mean: float) -> LogNormal:
        return LogNormal(mean - math.log(2), 1.2)  # for images in [0, 1]

    most = levels(-1.3 if large else -1.5)
    second = {"lr": 2.5e-3, "levels": most}
    high = LevelMixture((most,) * 9 + (LogUniform(1, 40),))  # restorations of large missing parts need them
    third = {**second, "levels": high} if large else second
    pixels = {"attention": (True,) * 3, "pixel_channels": 32 if large else 64}
    blocks = {"layers_per_block": (2, 2, 1), "pixel_layers": 3 if large else 2}
    recipe = Recipe(
        "growing",
        f"U-Net 64 128 160, patches of {patch} x {patch}, which grows",
        source="this package, the networks cifar10-small and celeba-small",
        constructor="unet",
        network={"widths": (64, 128, 160), "layers_per_block": 1, "patch": patch, "pixel_channels": 16},
        schedule=NoiseSchedule.geometric(40, 0.002, 256),
        image_size=side,
        training={
            "images": 3_000_000,
            "batch_size": 64,
            "optimizer": "muon",
            "lr": 5e-3,
            "fixed_norms": True,
            "levels": levels(-1.0 if large else -1.2),
            "growth": (Stage(0.5, pixels, second, fewest=500_000), Stage(0.5, blocks, third, fewest=1_200_000)),
        },
        of_side=growing,
    )
    training = {name: value for name, value in recipe.training.items() if name != "growth"}
    narrow = {**recipe.network, "widths": (48, 96, 128)}  # 1.8 times as fast
    title = f"U-Net 48 96 128, patches of {patch} x {patch}"
    return replace(recipe, short=replace(recipe, title=title, network=narrow, training={**training, "images": 400_000}))


def _ncsn(
    data: str, width: int, size: int, channels: int, *, augment: Sequence[str] | None = None, crop: Crop = "center"
) -> Recipe:
    return Recipe(
        f"ncsn-{data}",
        f"NCSN {width}",
        source="Song & Ermon, 2019, arXiv:1907.05600; github.com/ermongroup/ncsn, configs/anneal.yml",
        constructor="ncsn",
        network={"width": width},
        schedule=NoiseSchedule.geometric(1, 0.01, 10),
        image_size=size,
        channels=channels,
        crop=crop,
        training=_adam(200_000, 128, 1e-3, ema=(), **({} if augment is None else {"augment": augment})),
        sampler=SamplerSettings(steps_per_level=100, step_size=2e-5),
        differs="the publication dequantizes the images, x 255/256 + u/256 with u uniform in [0, 1)",
    )


def _ncsnv2(
    data: str,
    size: int,
    depth: str,
    schedule: tuple[float, int],
    steps: int,
    sampler: tuple[int, float],
    time: str,
    *,
    batch_size: int = 128,
    eps: float = 1e-8,
    crop: Crop = "center",
) -> Recipe:
    sigma_max, levels = schedule
    return Recipe(
        f"ncsnv2-{data}",
        f"NCSNv2 128, {depth}",
        source=f"Song & Ermon, 2020, arXiv:2006.09011; github.com/ermongroup/ncsnv2, configs/{data}.yml",
        constructor="ncsnv2",
        network={"width": 128, "depth": depth},
        schedule=NoiseSchedule.geometric(sigma_max, 0.01, levels),
        image_size=size,
        channels=3,
        crop=crop,
        training=_adam(steps, batch_size, 1e-4, eps=eps, ema=(0.999,)),
        sampler=SamplerSettings(steps_per_level=sampler[0], step_size=sampler[1]),
        differs=_AVERAGE,
        published_time=f"{time} (Appendix B)",
    )


def _continuous(
    name: str,
    title: str,
    config: str,
    network: Mapping[str, Any],
    schedule: NoiseSchedule,
    training: Mapping[str, Any],
    **corrector: Any,
) -> Recipe:
    """A network of Song et al. (2021) for CIFAR-10, trained in continuous time.

    The average of the weights is that of their code, whose decay is smaller at first.
    """
    return Recipe(
        name,
        title,
        source=f"Song et al., 2021, arXiv:2011.13456; github.com/yang-song/score_sde_pytorch, configs/{config}.py",
        constructor="ncsnpp",
        network={"widths": (128, 256, 256, 256), "layers_per_block": 4, "dropout": 0.1, **network},
        schedule=schedule,
        image_size=32,
        channels=3,
        training=_adam(1_300_000, 128, 2e-4, warmup_images=5000 * 128, **training),
        sampler=SamplerSettings("predictor-corrector", levels=1000, predictor="reverse-diffusion", **corrector),
        published_time="about 3 days on 4 V100 (issue 4 of the repository, for NCSN++ and sub-VP)",
    )


_ALL = (
    Recipe(
        "tiny",
        "U-Net 12 16, patches of 2 x 2",
        source="this package",
        constructor="unet",
        network={"widths": (12, 16), "layers_per_block": 1, "patch": 2, "pixel_channels": 4},
        schedule=_EDM,
        image_size=32,
        training={"images": 50_000, "batch_size": 32},
    ),
    _small("small-32", 32, (128, 256), "U-Net 128 256, patches of 2 x 2"),
    _small("small-64", 64, (64, 128, 256), "U-Net 64 128 256, patches of 2 x 2"),
    growing(32),
    _ncsn("mnist", 64, 28, 1, augment=()),
    _ncsn("cifar10", 128, 32, 3),
    _ncsn("celeba", 128, 32, 3, crop="celeba"),
    _ncsnv2("cifar10", 32, "standard", (50, 232), 300_000, (5, 6.2e-6), "22 h on 2 V100"),
    _ncsnv2("celeba", 64, "standard", (90, 500), 210_000, (5, 3.3e-6), "29 h on 4 V100", crop="celeba"),
    _ncsnv2("church", 96, "deeper", (140, 788), 200_000, (4, 4.9e-6), "52 h on 8 V100"),
    _ncsnv2("bedroom", 128, "deeper", (190, 1086), 150_000, (3, 1.8e-6), "52 h on 8 V100"),
    _ncsnv2("ffhq", 256, "deepest", (348, 2311), 80_000, (3, 9e-7), "41 h on 8 V100", batch_size=32, eps=1e-3),
    Recipe(
        "ddpm-cifar10",
        "U-Net 128 256 256 256",
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
        training=_adam(800_000, 128, 2e-4, eps=1e-8 * _HALF, warmup_images=5000 * 128, clip=1.0, ema=(0.9999,)),
        sampler=SamplerSettings(sampler="ancestral", levels=1000, variance="large"),
        differs=f"{_AVERAGE}; the strided convolutions pad all sides",
        published_time="10.6 h on a TPU v3-8 (Appendix B)",
    ),
    _continuous(
        "ncsnpp-cifar10",
        "NCSN++ 128 256 256 256",
        "ve/cifar10_ncsnpp_continuous",
        {"precondition": "ncsnpp"},
        NoiseSchedule.geometric(50, 0.01, 1000),
        {
            "eps": 1e-8,
            "clip": 1 / _HALF,
            "ema": (0.999,),
            "levels": LogUniform(0.01 * (50 / 0.01) ** 1e-5, 50),  # uniform times from 1e-5 to 1
        },
        corrector_steps=1,
        snr=0.16,
    ),
    _continuous(
        "ddpmpp-cifar10",
        "DDPM++ 128 256 256 256",
        "vp/cifar10_ddpmpp_continuous",
        {"precondition": "vp", **_DDPMPP},
        NoiseSchedule(UniformTime(first=1e-3).quantile(torch.linspace(1, 0, 1000, dtype=torch.float64, device="cpu"))),
        {"eps": 1e-8 * _HALF, "clip": 1.0, "ema": (0.9999,), "levels": UniformTime()},
        corrector_steps=0,
    ),
    Recipe(
        "edm-cifar10",
        "DDPM++ 256 256 256",
        source="Karras et al., 2022, arXiv:2206.00364, Tables 1 and 7",
        constructor="ncsnpp",
        network={"widths": (256,) * 3, "layers_per_block": 4, "model_channels": 128, "dropout": 0.13, **_DDPMPP},
        schedule=_EDM,
        image_size=32,
        channels=3,
        training={
            **_adam(390_625, 512, 1e-3, eps=1e-8 / 2, warmup_images=10_000_000),
            "ema": (0.5 ** (512 / 500_000),),  # a half-life of 500,000 images
            "augment": ("nonleaking",),
        },
        sampler=SamplerSettings(sampler="ode", levels=18),
        differs=f"the augmentation interpolates with cubic splines, without oversampling; {_AVERAGE}",
    ),
    Recipe(
        "palette",
        "U-Net 256 256 512 512 1024 1024, with an image as its condition",
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
        training=_adam(1_000_000, 1024, 1e-4, warmup_images=10_000 * 1024, ema=(0.9999,)),
        tasks=("jpeg", "hole", "gray"),
        sampler=SamplerSettings(sampler="ancestral", variance="large"),
        differs=(
            f"{_AVERAGE}; the residual blocks and the attention are those of DDPM, with 481 million parameters instead "
            "of 552 million; the noise levels of the schedule are used, without levels between them"
        ),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
