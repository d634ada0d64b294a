"""``evaluate_restoration``: figures of restorations that are known, for scores and for networks of Palette's kind."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from scorematch import NoiseSchedule, ScoreNet
from scorematch.core.conditions import Condition
from scorematch.data import open_images, save_image
from scorematch.evaluation import Extractor, evaluate_restoration, frechet_distance, inception_score
from scorematch.restoration import JPEG, AveragePool, Grayscale, Mask, Uncrop
from scorematch.restoration.palette import TASKS
from scorematch.sampling import AnnealedLangevinSampler, ODESampler
from tests.helpers import seed

SIZE = 8
SCHEDULE = NoiseSchedule([1.0, 0.1, 0.01])
X = torch.rand(12, 3, SIZE, SIZE, generator=seed(0)).mul(255).round() / 255
LABELS = torch.arange(12) % 3


class Level:
    """The exact score of images of one gray level: every restoration has it where nothing is observed."""

    schedule, sample_shape, value_range = SCHEDULE, (3, SIZE, SIZE), (0, 1)

    def __init__(self, level=0.5):
        self.level = level

    def __call__(self, x, sigma):
        return (self.level - x) / sigma**2


class Copy(Level):
    """As a network that was trained for restoration, its score is that of the condition."""

    conditioning = Condition(channels=3)

    def __call__(self, x, sigma, condition):
        assert condition.shape == x.shape
        return (condition - x) / sigma**2


class Noise(Level):
    """The score of independent pixels with a deviation of 0.08, so that restorations differ."""

    def __call__(self, x, sigma):
        return (0.5 - x) / (0.0064 + sigma**2)


def red_class(x):
    """Features, and logits of three classes, by the mean of the red values."""
    red = x[:, 0].float().mean((1, 2)) / 255
    return x.float().mean((2, 3)), torch.stack([red * 0 + 0.2, red, 1 - 2 * red], 1)


CLASSES = Extractor(red_class, "red", "1")


def run(what, operator, data=X, **options):
    options = {"features": "pixels", "metrics": [], "draws": 1, "cache": False, "progress": False, **options}
    sampler = options.pop("sampler", None)
    if sampler is None and not isinstance(what, ODESampler | AnnealedLangevinSampler):
        sampler = partial(ODESampler, levels=3)
    return evaluate_restoration(what, data, operator, sampler=sampler, **options)


def found(result, column="restored", source="restoration"):
    return {name: figure.value for name, figure in result.figures[column][source].items()}


def rms(values):
    return float(values.double().square().mean().sqrt())


def distances(a, b):
    return float((a - b).flatten(1).double().norm(dim=1).mean())


# -- Files


def test_results_do_not_replace_files_or_lie_in_the_folder_of_the_reference(tmp_path):
    save_image(X[0], tmp_path / "faces" / "0.png")
    with pytest.raises(ValueError, match=r"is inside the data folder .*faces"):
        run(Level(), "gray", reference=tmp_path / "faces", out=tmp_path / "faces")
    (tmp_path / "restored.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"restored\.png exists already and would be replaced"):
        run(Level(), "gray", out=tmp_path)


# -- Known restorations


REPLACING = partial(AnnealedLangevinSampler, restore="replace")


def test_a_known_restoration_of_a_missing_half():
    half = torch.arange(SIZE) < SIZE // 2
    restored, degraded = torch.where(half, X, 0.5), torch.where(half, X, 0.0)
    result = run(Level(), Uncrop(right=SIZE // 2), sampler=REPLACING)
    for column, images in [("restored", restored), ("degraded", degraded)]:
        figures = result.figures[column]["restoration"]
        errors = (images - X).double().square().flatten(1).mean(1)
        assert figures["rmse"].value == pytest.approx(rms(images - X), rel=1e-5)
        assert figures["rmse"].error == pytest.approx(float(errors.std()) / 12**0.5 / 2 / rms(images - X), rel=1e-5)
        assert figures["psnr"].value == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)
        assert figures["psnr"].error == pytest.approx(float((-10 * errors.log10()).std()) / 12**0.5, rel=1e-5)
        rounded = (images * 255).round() / 255  # extractors get 8 bits
        assert found(result, column, "pixels")["perceptual"] == pytest.approx(distances(rounded, X), rel=1e-6)
    assert found(result)["consistency"] == 0 and "diversity" not in found(result)
    assert result.sizes == {"restored": 12, "degraded": 12, "original": 12}
    assert set(result.figures["original"]) == {"images", "pixels"} and found(result, "original", "pixels") == {}


@pytest.mark.slow
def test_metrics_of_sets_are_those_of_the_restored_images():
    half = torch.arange(SIZE) < SIZE // 2
    restored = torch.where(half, X, 0.5)
    many = X.repeat(3, 1, 1, 1)
    result = run(
        Level(), Mask(half), metrics=["frechet", "inception-score"], features=CLASSES, data=many, sampler=REPLACING
    )
    real = CLASSES(many)
    expected = CLASSES.extract(restored.repeat(3, 1, 1, 1))
    assert found(result, source="red")["frechet"] == pytest.approx(frechet_distance(expected.features, real).value)
    assert found(result, source="red")["inception-score"] == pytest.approx(inception_score(expected.logits).value)
    original = CLASSES.extract(many).logits
    assert found(result, "original", "red")["inception-score"] == pytest.approx(inception_score(original).value)
    other = run(Level(), Mask(half), metrics=["frechet"], features=CLASSES, reference=1 - X, sampler=REPLACING)
    assert found(other, source="red")["frechet"] == pytest.approx(
        frechet_distance(CLASSES(restored), CLASSES(1 - X)).value, rel=1e-6
    )


def test_accuracy_and_agreement():
    half = torch.arange(SIZE) < SIZE // 2
    result = run(Level(0.9), Mask(half), data=(X, LABELS), labels=True, features=[CLASSES, "pixels"])
    images = {"restored": torch.where(half, X, 0.9), "degraded": torch.where(half, X, 0), "original": X}
    classes = {column: CLASSES.extract(x).logits.argmax(1) for column, x in images.items()}
    for column, best in classes.items():
        figures = result.figures[column]["red"]
        assert figures["accuracy"].value == pytest.approx(float((best == LABELS).double().mean()))
        if column != "original":
            assert figures["agreement"].value == pytest.approx(float((best == classes["original"]).double().mean()))
    assert "accuracy" not in found(result, source="pixels") and "agreement" not in found(result, source="pixels")
    assert "accuracy" not in found(run(Level(), Mask(half), data=(X, LABELS), features=CLASSES), source="red")
    for features, classes in [("pixels", 3), (CLASSES, 4)]:
        with pytest.raises(ValueError, match=f"one logit for each of the {classes} classes"):
            run(Level(), Mask(half), data=(X, torch.arange(12) % classes), labels=True, features=features)
    with pytest.raises(ValueError, match="opened without them"):
        run(Level(), Mask(half), data=open_images(X), labels=True, features=CLASSES)


@pytest.mark.slow
def test_several_restorations_of_each_image():
    """Independent pixels: two restorations differ by the root of 2 times the deviation, in the hole alone."""
    half = torch.arange(SIZE) < SIZE // 2
    x = X.repeat(3, 1, 1, 1)
    sampler = partial(AnnealedLangevinSampler, levels=200, consistent=True, clamp=False, restore="replace")
    result = run(Noise(), Mask(half), data=x, draws=3, sampler=sampler)
    deviation = 0.08 / 2**0.5  # the root mean square over the whole image
    assert found(result)["diversity"] == pytest.approx(deviation * 2**0.5, rel=0.05)
    error = rms(torch.where(half, 0, X - 0.5))
    assert found(result)["rmse"] == pytest.approx((error**2 + deviation**2) ** 0.5, rel=0.05)
    assert found(result)["rmse of the mean"] == pytest.approx((error**2 + deviation**2 / 3) ** 0.5, rel=0.05)
    spread = found(result, source="pixels")["feature diversity"]
    assert spread == pytest.approx(found(result)["diversity"] * (3 * SIZE**2) ** 0.5, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "operator"),
    [("pool:4", AveragePool(4)), ("jpeg:20", JPEG(20)), ("gray", Grayscale()), (Uncrop(top=2), Uncrop(top=2))],
)
def test_the_degraded_images_and_the_consistency(task, operator):
    y = operator.measure(X)
    result = run(Level(), task, sampler=REPLACING)
    assert found(result, "degraded")["rmse"] == pytest.approx(rms(operator.as_image(y).clamp(0, 1) - X), rel=1e-6)
    assert found(result)["consistency"] < (0.2 if operator.gain is None else 0.01)  # the result is clamped to [0, 1]
    noisy = operator.as_image(y + 0.1 * torch.randn(y.shape, generator=seed(9))).clamp(0, 1)
    found_noisy = found(run(Level(), task, sigma=0.1), "degraded")["rmse"]
    assert found_noisy == pytest.approx(rms(noisy - X), rel=0.05)


@pytest.mark.slow
def test_numbers_of_numpy():
    numbers = {"n": 4, "draws": 2, "seed": 1, "batch_size": 3, "sigma": 0.5}
    result = run(Level(), "gray", **{name: np.array(value)[()] for name, value in numbers.items()})
    assert result.to_json() == run(Level(), "gray", **numbers).to_json()


def test_the_consistency_counts_observed_values_only():
    """The noise of y is large: the restoration does not follow it, and differs from it by the noise."""
    seen = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    seen[::2, ::2] = True
    result = run(Level(), Mask(seen), sigma=5.0, sampler=partial(ODESampler, levels=3, restore="guide"))
    assert found(result)["consistency"] == pytest.approx(5.0, rel=0.1)


# -- Networks of Palette's kind


@pytest.mark.parametrize(("task", "tolerance"), [("gray", 1e-4), ("jpeg:20", 5e-3)])
def test_a_network_gets_the_degraded_image(task, tolerance):
    """It copies its condition, which the observation changes only by the rounding of a second compression."""
    result = run(Copy(), task)
    assert found(result)["rmse"] == pytest.approx(found(result, "degraded")["rmse"], rel=tolerance)
    assert found(result)["consistency"] < 0.05


class Dark(Copy):
    """A network that contradicts its condition: it draws the image at half the brightness."""

    def __call__(self, x, sigma, condition):
        return super().__call__(x, sigma, condition / 2)


@pytest.mark.parametrize(("task", "bound"), [("gray", 0.01), ("hole", 0.01), ("jpeg:80", 0.1)])
def test_restorations_agree_with_the_measurement_also_if_the_network_contradicts_it(task, bound):
    """Without the observation the difference is half of the image; JPEG is corrected up to its rounding."""
    assert float((X / 2).square().mean().sqrt()) > 0.25
    assert found(run(Dark(), task))["consistency"] < bound


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hole", "half"])
def test_a_network_fills_the_hole_with_its_condition(task):
    """The condition has noise of mean 1/2 and deviation 1/2 in the hole, clamped to [0, 1]."""
    data = X.repeat(8, 1, 1, 1)
    result = run(Copy(), task, data=data, draws=2)
    assert found(result)["consistency"] == 0
    noise = (0.5 + 0.5 * torch.randn(100_000, 2, generator=seed(1))).clamp(0, 1)
    apart = float((noise[:, 0] - noise[:, 1]).square().mean())
    hole = found(result)["diversity"] ** 2 / apart  # the share of the hole
    assert hole == pytest.approx(0.5, abs=0.03) if task == "half" else 0.05 < hole < 0.6


# -- Random numbers


@pytest.mark.slow
def test_figures_depend_neither_on_the_order_nor_on_the_batches():
    sampler = partial(AnnealedLangevinSampler, levels=3, consistent=True)
    options = {"draws": 2, "sigma": 0.05, "metrics": ["precision-recall"], "features": CLASSES, "sampler": sampler}
    one = run(Noise(), "hole", **options)
    other = run(Noise(), "hole", data=X.flip(0), batch_size=5, **options)
    for column, sources in one.figures.items():
        for source, figures in sources.items():
            for name, figure in figures.items():
                assert other.figures[column][source][name] == pytest.approx(figure, rel=1e-5), (column, source, name)
    again = run(Noise(), "hole", seed=1, **options)
    assert found(again) != found(one) and found(again, "degraded") != found(one, "degraded")
    state = torch.get_rng_state()
    run(Noise(), "hole", n=4, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_random_subset_of_images():
    few, same, other = (run(Level(), "pool:4", n=5, seed=number) for number in (0, 0, 1))
    assert few.sizes["restored"] == 5 and few == same and found(few) != found(other)
    assert few.hash == same.hash != other.hash


# -- Files and errors


@pytest.mark.slow
def test_the_files_of_an_evaluation(tmp_path):
    net = ScoreNet.unet(3, SIZE, widths=(4, 6), layers_per_block=1, schedule=SCHEDULE)
    net.save_pretrained(tmp_path / "network")
    out = tmp_path / "out"
    result = run(str(tmp_path / "network"), "jpeg:5", n=6, draws=2, out=out, name="tiny", batch_size=4)
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.md", "restored.png"]
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["settings"] == result.settings and stored["hash"] == result.hash
    assert stored["settings"]["operator"] == "jpeg:5" and stored["settings"]["draws"] == 2
    assert stored["settings"]["network"].startswith("ScoreNet ")
    page = (out / "evaluation.md").read_text()
    assert page.startswith("# Evaluation of tiny, jpeg:5\n\n|  | restored | degraded | original |")
    assert all(f"| {name} |" in page for name in ("rmse ↓", "PSNR in dB ↑", "diversity", "perceptual distance ↓"))
    with Image.open(out / "restored.png") as picture:
        assert picture.size == (4 * 10 + 2, 4 * 10 + 2)  # of the first batch: degraded, two restorations, original


@pytest.mark.slow
def test_the_identity_of_a_mask_is_part_of_the_settings():
    hashes = {run(Level(), Mask(torch.arange(SIZE) < k)).hash for k in (2, 3, 3)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("jpeg", {}, "operator must be jpeg:QUALITY, such as jpeg:5, got 'jpeg'"),
        ("pool:3", {}, "multiples of 3"),
        ("jpeg:0", {}, "quality must be an integer from 1 to 100"),
        (Mask(torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)), {}, "for one image, got one mask for each of 2"),
        ("pool:4", {"draws": 0}, "draws must be an integer of at least 1, got 0"),
        ("pool:4", {"sigma": -1.0}, "sigma, the standard deviation of the noise in y, must be at least 0, got -1"),
        ("pool:4", {"n": 1}, "n must be from 2 to the number of images, 12, got 1"),
        ("pool:4", {"metrics": ["kernel"]}, "'kernel' needs at least 1,000 images"),
        ("gray", {"data": torch.rand(4, 1, SIZE, SIZE)}, "must have images of shape"),
    ],
)
def test_wrong_arguments_are_named(task, options, message):
    with pytest.raises(ValueError, match=message):
        run(Level(), task, **options)


def test_a_task_of_another_type():
    with pytest.raises(TypeError, match=r"operator must be an Operator .* such as 'pool:4', got Inpainting"):
        run(Level(), TASKS["hole"]())


@pytest.mark.slow
def test_two_processes_equal_one(forks, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ScoreNet.unet(1, SIZE, widths=(4, 6), layers_per_block=1, schedule=SCHEDULE)
    net.save_pretrained(tmp_path / "network")
    torch.save(X[:, :1], tmp_path / "x.pt")
    code = (
        "import torch\n"
        "from scorematch.evaluation import evaluate_restoration\n"
        "from scorematch.sampling import SamplerSettings\n"
        "options = dict(features='pixels', metrics=['precision-recall'], sampler=SamplerSettings(levels=4))\n"
        "evaluate_restoration('./network', torch.load('x.pt'), 'hole', sigma=0.1, batch_size=5, out={name!r},\n"
        "    cache=False, progress=False, **options)\n"
    )
    for size, name in [(1, "one"), (2, "two"), (4, "four")]:  # one of the four has no images
        forks.group(size, code.format(name=name), tmp_path)
    one, *others = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two", "four"))
    for other in others:
        assert other["settings"] == one["settings"]
        for column, sources in one["figures"].items():
            for source, figures in sources.items():
                for name, figure in figures.items():
                    again = other["figures"][column][source][name]
                    assert again["value"] == pytest.approx(figure["value"], rel=1e-6), (column, name)
                    assert again["error"] == (figure["error"] and pytest.approx(figure["error"], rel=1e-6)), name


# -- Calibration


class White(Level):
    """The score of independent pixels N(0.5, 0.01), within the range of images up to 5 deviations."""

    schedule = NoiseSchedule.geometric(2, 0.005, 60)

    def __call__(self, x, sigma):
        return (0.5 - x) / (0.01 + sigma**2)


def white(n, deviation=0.1, number=3):
    return (0.5 + deviation * torch.randn(n, 3, SIZE, SIZE, generator=seed(number))).clamp(0, 1)


def near(figure, expected, errors=5):
    return abs(figure.value - expected) < errors * figure.error


def calibrated(what=None, **options):
    """The figures of the calibration with images of which the left half is known."""

    return run(what or White(), Uncrop(right=SIZE // 2), sampler=partial(ODESampler, levels=20), **options).figures[
        "restored"
    ]["restoration"]


@pytest.mark.slow
def test_exact_draws_are_calibrated():
    """Unknown pixels are independent of the known ones, so that restorations are draws from the posterior."""
    figures = calibrated(data=white(100), draws=9)
    assert near(figures["ratio"], 1)
    for of in ("pixels", "projections"):
        assert near(figures[f"coverage of {of}, nominal 80.0%"], 0.8)
    assert near(figures["rank of pixels"], 0.5) and figures["rank p value"].value > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("deviation", "brighter"), [(0.05, 0), (0.2, 0), (0.1, 0.05)])
def test_draws_that_are_not_of_the_posterior_are_found(deviation, brighter):
    """Of images with another deviation or another brightness than those of the prior."""
    figures = calibrated(data=white(100, deviation) + brighter, draws=9)
    draw, truth = 2 * 0.1**2, 0.1**2 + deviation**2 + brighter**2
    assert figures["ratio"].value == pytest.approx((draw / truth) ** 0.5, rel=0.03)
    covered = figures["coverage of projections, nominal 80.0%"].value
    assert (covered > 0.85) if deviation < 0.1 else (covered < 0.75) if deviation > 0.1 else covered < 0.8
    assert figures["rank p value"].value < 1e-3 or brighter
    z = 0.05 / (0.1 * 2**0.5) if brighter else 0.0  # the probability that the truth is above a draw is Phi(z)
    assert figures["rank of pixels"].value == pytest.approx(float(torch.special.ndtr(torch.tensor(z))), abs=0.01)


@pytest.mark.slow
def test_draws_of_the_network_as_truth_separate_the_prior_from_the_method():
    other = white(60, 0.3)
    wrong, own = calibrated(data=other, draws=2), calibrated(data=other, draws=2, truth="network")
    assert wrong["ratio"].value < 0.7 and near(own["ratio"], 1)
    assert near(own["coverage of pixels, nominal 33.3%"], 1 / 3)
    assert calibrated(data=other, draws=2, truth="network") == own


def test_images_that_are_known_have_the_calibration_of_exact_draws():
    figures = run(White(), Mask(torch.ones(SIZE, dtype=torch.bool)), draws=2).figures["restored"]["restoration"]
    assert "ratio" not in figures and "rank p value" not in figures
    assert figures["coverage of pixels, nominal 33.3%"] == (pytest.approx(1 / 3), pytest.approx(0))
    assert figures["rank of pixels"].value == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truth": "data set"}, "truth must be one of 'data', 'network'"),
        ({"truth": "network", "labels": True, "data": (X, LABELS)}, "draws of the network have no labels"),
        ({"truth": "network", "what": Copy()}, "needs a network that draws images, but this one restores them"),
    ],
)
def test_truths_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        calibrated(**options)
