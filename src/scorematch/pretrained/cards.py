"""Cards: facts about published networks, and what is not known about them.

A card names the source of each quality figure, and says whether the sampler settings were measured with these weights.
A network whose license or origin is unclear has no short name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scorematch.sampling.settings import SamplerSettings

SHIPPED = Path(__file__).parent.parent / "weights"  # the networks that ship with the package, each with a README.md


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts about one network.

    Attributes:
        name: the short name for ``ScoreNet.from_pretrained``, or None.
        repository: ``owner/name`` on the Hugging Face Hub, or None for a network that ships with the package.
        revision: the commit to load, or None for the main branch.
        license: the license of the weights.
        shape: the shape of a sample, (C, H, W).
        data: the training data.
        sigmas: the highest and the lowest noise level, in units of images in [0, 1].
        levels: the number of noise levels.
        parameters: the number of parameters.
        settings: the recommended sampler settings, or None to use the settings that the loader of its file format
            recommends.
        settings_source: where the settings come from.
        quality: what is known about the quality of its samples, with the source.
        correction: whether ``sigmas`` and ``levels`` replace those of the repository's configuration.
    """

    name: str | None = None
    repository: str | None = None
    revision: str | None = None
    license: str
    shape: tuple[int, int, int]
    data: str
    sigmas: tuple[float, float]
    levels: int
    parameters: int
    settings: SamplerSettings | None = None
    settings_source: str
    quality: str
    correction: bool = False


# The source of the settings that pretrained/diffusers.py recommends.
_OF_DDPM = (
    "consistent annealed sampling with 250 network calls and little new noise, which was best in published results of "
    "similar networks and for a small network of color images (docs/pretrained.md); not measured with these weights"
)
_OF_VE = (
    "consistent annealed sampling with 250 network calls and nearly the published step size of variance-exploding "
    "networks (docs/pretrained.md); not measured with these weights"
)


def _ncsnpp(repository: str, data: str, sigma_max: float, name: str | None = None) -> Card:
    return Card(
        name=name,
        repository=f"google/ncsnpp-{repository}",
        license="Apache-2.0",
        shape=(3, 256, 256),
        data=data,
        sigmas=(sigma_max, 0.01),
        levels=2000,
        parameters=65_574_549,
        settings_source=_OF_VE,
        quality="not published",
        # It was trained with this sigma_max. The repository may store 1348, the default of its scheduler's class.
        correction=True,
    )


CARDS = (
    Card(
        name="mnist",
        license="MIT",
        shape=(1, 28, 28),
        data="MNIST, 60,000 handwritten digits",
        sigmas=(16.9, 0.01),
        levels=95,
        parameters=2_938_009,
        settings=SamplerSettings(levels=100, step_size=5e-5, consistent=True),
        settings_source="measured on these weights; see the network's README",
        quality=(
            "a classifier with an accuracy of 99.3 % gives one digit a probability above 0.9 for 89.9 % of 1,000 "
            "samples and 98.5 % of test digits; about one sample in ten is not a clear digit"
        ),
    ),
    Card(
        name="mnist-classes",
        license="MIT",
        shape=(1, 28, 28),
        data="MNIST, 60,000 handwritten digits with their classes",
        sigmas=(17.0, 0.005),
        levels=256,
        parameters=1_939_265,
        settings=SamplerSettings(sampler="ode", levels=18),
        settings_source="those of Karras et al., 2022 (18 levels, Heun's method); others were not measured",
        quality=(
            "with guidance of weight 1.5 a classifier with an accuracy of 99.3 % gives one digit a probability above "
            "0.9 for 98.3 % of 1,000 samples and 98.5 % of test digits; without guidance for 92.4 %"
        ),
    ),
    Card(
        name="cifar10-small",
        license="MIT",
        shape=(3, 32, 32),
        data="CIFAR-10, 50,000 images with their classes",
        sigmas=(40.0, 0.002),
        levels=256,
        parameters=7_892_771,
        settings=SamplerSettings(sampler="ode", levels=18, method="dpm-solver++"),
        settings_source="measured on the weights of an earlier run; see the network's README",
        quality=(
            "ships, trucks and horses can be recognized, birds and frogs hardly; Fréchet distance to 5,000 training "
            "images in EfficientNet-Lite0 features 37.6 with 1,500 samples and rescaled guidance of weight 2.5, 47.7 "
            "without guidance; 18.2 for test images, 234 for a Gaussian of the same covariance"
        ),
    ),
    Card(
        name="celeba-small",
        license="research only, as CelebA",
        shape=(3, 64, 64),
        data="CelebA, 14,283 aligned faces, 64x64",
        sigmas=(40.0, 0.002),
        levels=256,
        parameters=7_948_259,
        settings=SamplerSettings(levels=50, step_size=1.3e-6, consistent=True),
        settings_source="measured on the weights of an earlier run; see the network's README",
        quality=(
            "faces with smeared details and low contrast; Fréchet distance to 5,000 training images in "
            "EfficientNet-Lite0 features 21.5 with 1,500 samples; 13.2 for held-out images, 133 for a Gaussian of the "
            "same covariance"
        ),
    ),
    Card(
        name="palette-mnist",
        license="MIT",
        shape=(3, 28, 28),
        data="MNIST digits in three colors of equal luma, with degraded versions of them",
        sigmas=(21.6, 0.01),
        levels=173,
        parameters=1_114_819,
        settings=SamplerSettings(levels=30, step_size=4.112e-5, consistent=True),
        settings_source="measured on these weights; see the network's README",
        quality=(
            "a classifier recognizes 89.4 % of 500 test digits after inpainting, 85.9 % after uncropping, 94.5 % after "
            "JPEG of quality 5 and 99.2 % after colorization; before, 77.6 %, 76.4 %, 55.8 % and 99.4 %"
        ),
    ),
    Card(
        name="palette-celeba",
        license="research only, as CelebA",
        shape=(3, 64, 64),
        data="CelebA, 14,283 aligned faces, 64x64, with degraded versions of them",
        sigmas=(40.0, 0.002),
        levels=256,
        parameters=6_437_915,
        settings=SamplerSettings(sampler="ancestral", levels=30, variance="small"),
        settings_source="measured on these weights; see the network's README",
        quality=(
            "rmse to 100 held-out faces 0.062 after inpainting, 0.164 after uncropping, 0.062 after colorization and "
            "0.065 after JPEG of quality 5; of the degraded faces 0.228, 0.355, 0.100 and 0.074"
        ),
    ),
    Card(
        name="cifar10",
        repository="google/ddpm-cifar10-32",
        revision="267b167dc01f0e4e61923ea244e8b988f84deb80",
        license="Apache-2.0",
        shape=(3, 32, 32),
        data="CIFAR-10",
        sigmas=(78.7, 0.005),
        levels=1000,
        parameters=35_746_307,
        settings_source=_OF_DDPM,
        quality=(
            "unknown for the stored weights. The repository quotes the paper (FID 3.17, 1,000 ancestral steps) and "
            "does not say whether it holds the averaged weights; an independent conversion measured FID 3.21 with the "
            "averaged weights and 12.14 without averaging"
        ),
    ),
    _ncsnpp("celebahq-256", "CelebA-HQ at 256 pixels", 348, name="celebahq"),
    _ncsnpp("bedroom-256", "LSUN bedrooms at 256 pixels", 378),
    _ncsnpp("church-256", "LSUN churches at 256 pixels", 380),
    _ncsnpp("ffhq-256", "FFHQ at 256 pixels", 348),
    Card(
        repository="google/ddpm-celebahq-256",
        revision="cd5c944777ea2668051904ead6cc120739b86c4d",
        license="Apache-2.0",
        shape=(3, 256, 256),
        data="CelebA-HQ at 256 pixels",
        sigmas=(78.7, 0.005),
        levels=1000,
        parameters=113_673_219,
        settings_source=_OF_DDPM,
        quality="not published for these weights",
    ),
    Card(
        repository="newsyctw/NCSN_CIFAR10_my",
        license="not stated",
        shape=(3, 32, 32),
        data="CIFAR-10",
        sigmas=(380, 0.01),
        levels=2000,
        parameters=61_894_924,
        settings_source=_OF_VE,
        quality="not published. The same account also holds networks with a backdoor: use only this repository",
    ),
)

# -- Checkpoints that are converted ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointCard:
    """The facts about one published checkpoint of another project, which ``python -m scorematch convert`` reads.

    Attributes:
        name: the name of the file, or of the folder in which the authors keep it.
        config: the name of its configuration for ``--config``, or None if the file contains its options.
        address: where it can be downloaded.
        license: the license of the weights.
        shape: the shape of a sample, (C, H, W).
        data: the training data.
        quality: what is known about the quality of its samples, with the source.
    """

    name: str
    config: str | None
    address: str
    license: str
    shape: tuple[int, int, int]
    data: str
    quality: str


_DRIVE = "https://drive.google.com/drive/folders/"
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/"
_LANGEVIN = "a reverse diffusion predictor and a Langevin corrector, 1,000 levels"
_EULER, _ANCESTRAL = "Euler-Maruyama's method, 1,000 steps", "ancestral sampling, 1,000 steps"


def _score_sde(name: str, folder: str, quality: str, size: int = 32, data: str = "CIFAR-10") -> CheckpointCard:
    apache = "Apache-2.0, that of the repository"
    return CheckpointCard(name, name, f"{_DRIVE}{folder}", apache, (3, size, size), data, quality)


def _fid(fid: str, sampler: str) -> str:
    return (
        f"FID {fid} (README of the repository, for the file with the smaller number); the sampler of its configuration "
        f"is {sampler}"
    )


def _edm(name: str, size: int, data: str, fid: float, calls: int, how: str = "") -> CheckpointCard:
    return CheckpointCard(
        name=f"edm-{name}",
        config=None,
        address=f"{_NVIDIA}edm-{name}.pkl",
        license="CC BY-NC-SA 4.0: not for commercial use",
        shape=(3, size, size),
        data=data,
        quality=f"FID {fid} (README of NVlabs/edm) with Heun's method{how}, {calls} network calls per image",
    )


def _improved(
    name: str, size: int, data: str, month: str = "march", quality: str = "not published with the file"
) -> CheckpointCard:
    license_ = "not stated for the weights; that of the code is MIT"
    address = f"{_OPENAI}{month}-2021/{name}.pt"
    return CheckpointCard(name, name, address, license_, (3, size, size), data, quality)


def _guided(name: str, size: int, data: str, quality: str) -> CheckpointCard:
    return _improved(name, size, data, "jul", f"{quality} (README of openai/guided-diffusion)")


_UNKNOWN = "no FID is published"
_CLASSIFIER, _THOUSAND = "with the guidance of a classifier", "with ancestral sampling, 1,000 steps"
CHECKPOINTS = (
    _score_sde("ve/cifar10_ncsnpp", "1sP4GwvrYiI-sDPTp7sKYzsxJLGVamVMZ", _fid("2.45", _LANGEVIN)),
    _score_sde("ve/cifar10_ncsnpp_continuous", "1b0gy_LLgO_DaQBgoWXwlVnL_rcAUgREh", _fid("2.38", _LANGEVIN)),
    _score_sde("ve/cifar10_ncsnpp_deep_continuous", "11s6A_xM7qiztdj8AHQWqaIAUSC3I7uX2", _fid("2.20", _LANGEVIN)),
    _score_sde("ve/bedroom_ncsnpp_continuous", "18GmxDvfGR8se9uFucc9uweeVrX_GzuUG", _UNKNOWN, 256, "LSUN bedrooms"),
    _score_sde("ve/church_ncsnpp_continuous", "1zVChA0HrnJU66Jkt4P6KOnlREhBMc4Yh", _UNKNOWN, 256, "LSUN churches"),
    _score_sde("ve/ffhq_256_ncsnpp_continuous", "1KG72ZKUCUa8dDcA03hOf1BsnK8kBcdPD", _UNKNOWN, 256, "FFHQ"),
    _score_sde("ve/celebahq_256_ncsnpp_continuous", "19VJ7UZTE-ytGX6z5rl-tumW9c0Ps3itk", _UNKNOWN, 256, "CelebA-HQ"),
    _score_sde("ve/ffhq_1024_ncsnpp_continuous", "1ZqLNr_kH0o9DxvwSlrQPMmkrhEnXhBm2", _UNKNOWN, 1024, "FFHQ"),
    _score_sde("vp/cifar10_ddpm", "1zDKcy3xbsN3F4AfyB_DfY_1oho89iKcf", _fid("3.24", _ANCESTRAL)),
    _score_sde(
        "vp/cifar10_ddpm_continuous", "1RHNxW1qY-mTr0JMAE5t4V181Hi_aVWXK", "FID 3.69 with an ODE solver (README)"
    ),
    _score_sde("vp/cifar10_ddpmpp", "1zOVj03ZBcq339p5QEKJPh2bBrxR_HOCM", _fid("2.78", _ANCESTRAL)),
    _score_sde("vp/cifar10_ddpmpp_continuous", "1xYjVMx10N9ivQQBIsEoXEeu9nvSGTBrC", _fid("2.55", _EULER)),
    _score_sde("vp/cifar10_ddpmpp_deep_continuous", "1ZMLBiu9j7-rpdTQu8M2LlHAEQq4xRYrj", _fid("2.41", _EULER)),
    _score_sde(
        "subvp/cifar10_ddpm_continuous", "1DeebpmBkCxlZx89t3z45Te37T7BPOzd2", "FID 3.56 with an ODE solver (README)"
    ),
    _score_sde("subvp/cifar10_ddpmpp_continuous", "1bLgmnEAZnysRZfWt8qN3omGfijJ_B884", _fid("2.61", _EULER)),
    _score_sde("subvp/cifar10_ddpmpp_deep_continuous", "16QGkviGcizSbIPRk37-YksUhlNIna4Ys", _fid("2.41", _EULER)),
    _edm("cifar10-32x32-cond-vp", 32, "CIFAR-10, by class", 1.79, 35),
    _edm("cifar10-32x32-uncond-vp", 32, "CIFAR-10", 1.97, 35),
    _edm("ffhq-64x64-uncond-vp", 64, "FFHQ", 2.39, 79),
    _edm("afhqv2-64x64-uncond-vp", 64, "AFHQv2", 1.96, 79),
    _edm("imagenet-64x64-cond-adm", 64, "ImageNet, by class", 1.36, 511, " and churn"),
    _improved("cifar10_uncond_50M_500K", 32, "CIFAR-10"),
    _improved("cifar10_uncond_vlb_50M_500K", 32, "CIFAR-10"),
    _improved("imagenet64_uncond_100M_1500K", 64, "ImageNet"),
    _improved("imagenet64_uncond_vlb_100M_1500K", 64, "ImageNet"),
    _improved("imagenet64_cond_270M_250K", 64, "ImageNet, by class"),
    _improved("lsun_uncond_100M_1200K_bs128", 256, "LSUN bedrooms"),
    _improved("lsun_uncond_100M_2400K_bs64", 256, "LSUN bedrooms"),
    _guided("64x64_diffusion", 64, "ImageNet, by class", "FID 2.07"),
    _guided("128x128_diffusion", 128, "ImageNet, by class", f"FID 2.97 {_CLASSIFIER}"),
    _guided("256x256_diffusion", 256, "ImageNet, by class", f"FID 4.59 {_CLASSIFIER}"),
    _guided("256x256_diffusion_uncond", 256, "ImageNet", _UNKNOWN),
    _guided("512x512_diffusion", 512, "ImageNet, by class", f"FID 7.72 {_CLASSIFIER}"),
    _guided("lsun_bedroom", 256, "LSUN bedrooms", f"FID 1.90 {_THOUSAND}"),
    _guided("lsun_cat", 256, "LSUN cats", f"FID 5.57 {_THOUSAND}"),
    _guided("lsun_horse", 256, "LSUN horses", f"FID 2.57 {_THOUSAND}"),
    _guided("lsun_horse_nodropout", 256, "LSUN horses", _UNKNOWN),
)


def find(name: str) -> Card | None:
    """The card with this short name or repository, or None."""
    return next((card for card in CARDS if name in (card.name, card.repository)), None)


def table() -> str:
    """All cards and checkpoints as text, for a terminal."""
    lines, indent = [], 2 + max(len(card.name or "-") for card in CARDS)
    for card in CARDS:
        shape = "x".join(map(str, card.shape))
        where = f"ships with the package in {SHIPPED / str(card.name)}" if card.repository is None else card.repository
        lines.append(f"{card.name or '-':<{indent}}{where}{f' at {card.revision[:12]}' if card.revision else ''}")
        lines.append(
            f"{'':<{indent}}{shape}, {card.data}; {card.parameters:,} parameters; {card.levels} levels "
            f"{card.sigmas[0]:g} -> {card.sigmas[1]:g}; license {card.license}"
        )
        lines.append(f"{'':<{indent}}sampler settings: {card.settings_source}")
        lines.append(f"{'':<{indent}}quality: {card.quality}")
    lines += [
        "",
        "Checkpoints to download, and to convert with scorematch convert FILE FOLDER [--config NAME]:",
    ]
    for checkpoint in CHECKPOINTS:
        lines.append(f"{checkpoint.name}  {checkpoint.address}")
        config = "" if checkpoint.config is None else f"; --config {checkpoint.config}"
        lines.append(
            f"    {'x'.join(map(str, checkpoint.shape))}, {checkpoint.data}; license {checkpoint.license}{config}"
        )
        lines.append(f"    quality: {checkpoint.quality}")
    return "\n".join(lines)
