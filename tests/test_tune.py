"""``tune``: the best of many sampler settings is found and stored, and a stopped call continues."""

import json
from dataclasses import replace
from functools import partial
from pathlib import PureWindowsPath

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from scorematch import NoiseSchedule, ScoreNet
from scorematch.evaluation import (
    METRICS,
    Estimate,
    Tuning,
    energy_distance,
    evaluate_restoration,
    frechet_distance,
    pixels,
    settings_of_paths,
    settings_table,
    settings_with_few_calls,
    tune,
)
from scorematch.evaluation.per_image import choose
from scorematch.evaluation.tune import MeasuredSampler, _as_name
from scorematch.guidance import autoguidance, classifier_free
from scorematch.restoration import AveragePool, Mask
from scorematch.sampling import (
    ODESampler,
    SamplerSettings,
    bulk_samples,
    data_moments,
    recommended_sampler,
    schedules_of_paths,
)
from tests.helpers import seed

SETTINGS = [
    SamplerSettings("ode", levels=3),
    SamplerSettings("ode", levels=2, method="dpm-solver++"),
    SamplerSettings("ancestral", levels=3),
    SamplerSettings(levels=40),
]
REAL = torch.rand(30, 1, 8, 8, generator=seed(0))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=NoiseSchedule.geometric(1, 0.01, 9))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.2)
    return made


def mean_color(images):
    return images.flatten(1)[:, :3].float() / 255


def run(net, reference=REAL, **options):
    options = {"features": mean_color, "settings": SETTINGS, "calls": 30, "n": 6, "cache": False, **options}
    return tune(net, reference, progress=False, **options)


@pytest.mark.slow
def test_the_best_settings_have_the_smallest_distance(net):
    result = run(net)
    assert [row.settings for row in result.rows] == SETTINGS[:3]  # the last takes 40 calls
    for row in result.rows:
        sampler = recommended_sampler(net, row.settings)
        samples = torch.cat([batch.images for batch in bulk_samples(sampler, 6)])
        expected = frechet_distance(mean_color((samples * 255).round()), mean_color((REAL * 255).round()))
        assert row.figures[result.source]["frechet"].value == pytest.approx(expected.value, rel=1e-6)
        assert (row.calls, row.sampler) == (len(sampler), str(sampler))
    assert result.best is min(result.rows, key=lambda row: row.figures[result.source]["frechet"].value)
    assert net.sampler_settings is None


def test_the_fewest_calls_near_the_best_the_best_of_each_kind_and_the_ladder_are_stored():
    def row(distance, calls, kind, **options):
        figures = {"x": {"frechet": Estimate(distance, None)}}
        return MeasuredSampler(kind, calls, 0.0, figures, SamplerSettings(kind, **options))

    rows = [
        row(10.0, 50, "langevin", levels=50),
        row(10.15, 18, "ode", levels=18),
        row(10.1, 35, "ode", levels=36),
        row(10.2, 99, "predictor-corrector", levels=50),
        row(13.0, 6, "ode", levels=6),
        row(13.5, 8, "ode", levels=8),
        row(12.0, 10, "langevin", levels=10),
        row(20.0, 4, "ode", levels=4),
    ]
    result = Tuning(rows, None, "x", "frechet")
    assert result.best is rows[0] and result.recommended is rows[1]
    assert [each.calls for each in result.ladder] == [4, 6, 10, 18, 35, 50]
    stored = result.stored()
    assert stored.alone() == rows[1].settings
    expected = [rows[0], rows[3], rows[7], rows[4], rows[6], rows[2]]
    assert list(stored.alternatives) == [each.settings for each in expected]


@pytest.mark.slow
def test_settings_of_paths_have_the_numbers_of_calls(net):
    found = settings_of_paths(net, [3, 5], seed=1, progress=False)
    assert [len(recommended_sampler(net, each)) for each in found] == [3, 5]
    assert found == settings_of_paths(net, [3, 5], seed=1, progress=False)
    usual, *noisy = settings_with_few_calls(net, [5])
    higher = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, schedule=NoiseSchedule.geometric(40, 0.01, 9))
    expected = [40, *NoiseSchedule.geometric(6, 0.03, 4)]  # 24 deviations of 0.25
    assert settings_with_few_calls(higher, [5])[1].options["sigmas"] == pytest.approx(expected, rel=1e-4)
    images = torch.rand(9, 1, 8, 8)
    sigmas = pytest.approx([4, 1.1769, 0.34641, 0.10194, 0.03], rel=1e-3)
    expected = {"method": "dpm-solver++", "order": 1, "sigmas": sigmas}
    first, *others = (each.options for each in settings_with_few_calls(higher, [5], images)[2:5])
    assert [(each["sigmas"][0], each["order"]) for each in (first, *others)] == [(4, 1), (8, 1), (40, 2)]
    started = dict(first)
    assert {name: list(values) for name, values in data_moments(images, 8).items()} == {
        name: list(started.pop(name)) for name in ("data_mean", "data_spectrum")
    }
    assert started == expected
    for shape in ((3,), (2, 7), (30, 9, 8), (9, 8, 6, 9)):  # at most 1,000 numbers of the mean
        data = torch.randn(9, *shape)
        ODESampler(lambda x, sigma: -x, **settings_with_few_calls(higher, [5], data)[4].options).start(data)
    assert usual == SamplerSettings("ode", levels=5, sigma_min=0.03, method="unipc")
    assert [each.options["eta"] for each in noisy] == [1.0, (1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0)]
    exact = [*schedules_of_paths(net, [4], generator=1, progress=False)[0], 0.03]
    assert found[1].options["sigmas"] == pytest.approx(exact, rel=1e-4)


def test_the_table_of_a_result(net):
    result = run(net, held_out=REAL.flip(0))
    lines = result.table().splitlines()
    assert lines[0] == f"| sampler settings | calls | frechet, {result.source} | std | variation | seconds |"
    assert [line.startswith("| **") for line in lines[2:5]] == [row is result.recommended for row in result.rows]
    figure = result.rows[0].figures["images"]["std"]
    assert (
        "sampler ode, levels 3" in lines[2] and str(figure) in lines[2] and lines[5].startswith("| held-out images |")
    )


def test_the_table_with_too_few_held_out_images_for_the_distance(net, monkeypatch):
    line = METRICS["kernel"]
    monkeypatch.setitem(METRICS, "kernel", replace(line, function=partial(line.function, subset_size=5), least=5))
    result = run(net, by="kernel", held_out=REAL[:4], settings=SETTINGS[:1])
    std = result.held_out["images"]["std"]
    assert result.table().splitlines()[-1].startswith(f"| held-out images |  |  | {std} | ")


def test_held_out_images_are_opened_before_settings_are_measured(net, tmp_path, monkeypatch):
    monkeypatch.setattr(ODESampler, "sample", lambda *arguments, **options: pytest.fail("it samples"))
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        run(net, held_out=tmp_path / "absent")


@pytest.mark.slow
def test_a_folder_with_the_network_and_its_card(net, tmp_path):
    out = tmp_path / "tuned"
    first = run(net, out=out, settings=SETTINGS[:2])
    stored = ScoreNet.from_pretrained(out)
    assert stored.sampler_settings.alone() == first.recommended.settings
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), net.parameters(), strict=True))
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: scorematch") and first.table() in card
    assert f"| sampler settings | {first.recommended.settings} |" in card
    (out / "README.md").write_text("# Mine\n\n" + card + "\nThe end.\n")
    second = run(net, out=out)
    card = (out / "README.md").read_text()
    assert card.startswith("# Mine") and card.endswith("The end.\n")
    assert (
        second.table() in card and card.count("## Sampler settings") == card.count("| sampler settings | calls |") == 1
    )


@pytest.mark.slow
def test_settings_are_measured_with_guidance_and_the_network_is_stored(tmp_path):
    net = ScoreNet.unet(
        1, 8, widths=(4,), layers_per_block=1, classes=2, null_class=True, schedule=NoiseSchedule.geometric(1, 0.01, 9)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    guided = classifier_free(net, 3.0)
    result = run(guided, out=tmp_path, settings=SETTINGS[:2], classes="cycle")
    sampler = recommended_sampler(guided, SETTINGS[0])
    samples = torch.cat([batch.images for batch in bulk_samples(sampler, 6, classes="cycle")])
    expected = frechet_distance(mean_color((samples * 255).round()), mean_color((REAL * 255).round()))
    assert result.rows[0].figures[result.source]["frechet"].value == pytest.approx(expected.value, rel=1e-6)
    stored = ScoreNet.from_pretrained(tmp_path)
    assert stored.sampler_settings == result.stored() and net.sampler_settings is None
    assert "from the same seeds, with ClassifierFree(weight=3)." in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="measured with other settings: network"):
        run(classifier_free(net, 2.0), out=tmp_path, settings=SETTINGS[:2], classes="cycle")
    with pytest.raises(ValueError, match=r"guidance is for samples\. Leave it out with operators"):
        run(guided, operators="gray")
    with pytest.raises(ValueError, match="operators are for networks that were trained to restore, and this one draws"):
        run(net, operators="gray")
    with pytest.raises(TypeError, match="net must be a ScoreNet, or one with guidance, got function"):
        run(autoguidance(lambda x, sigma: -x, net, 2.0))


def test_data_that_are_not_pictures(tmp_path):
    net = ScoreNet.mlp(3, width=8, depth=1, condition_features=2, schedule=NoiseSchedule.geometric(300, 1, 9))
    rng = seed(1)
    x, condition = 250 + 30 * torch.randn(40, 3, generator=rng), torch.randn(40, 2, generator=rng)
    np.savez(tmp_path / "data.npz", x=x.numpy(), condition=condition.numpy())
    net.fit_units(x)
    options = {"features": "inception", "n": 40, "settings": SETTINGS[:3], "held_out": x[:20]}
    result = run(net, tmp_path / "data.npz", out=tmp_path / "tuned", **options)
    assert result.best is min(result.rows, key=lambda row: row.figures["values"]["energy"].value)
    sampler, chosen = recommended_sampler(net, SETTINGS[1]), condition[choose(40, 40, seed=0)]
    drawn = torch.cat([batch.images for batch in bulk_samples(sampler, 40, condition=chosen)])
    mean, std = x.double().mean(0), x.double().std(0)
    expected = energy_distance((drawn - mean) / std, (x - mean) / std)
    assert result.rows[1].figures["values"]["energy"].value == pytest.approx(expected.value, rel=1e-5)
    lines = result.table().splitlines()
    assert lines[0] == "| sampler settings | calls | energy, values | seconds |" and lines[-1].startswith(
        "| held-out data |"
    )
    assert result.rows == run(net, tmp_path / "data.npz", out=tmp_path / "tuned", **options).rows
    with pytest.raises(
        ValueError, match=r"by must be one of 'energy', .* for data that are not pictures, got 'kernel'"
    ):
        run(net, x, features="inception", by="kernel")
    with pytest.raises(ValueError, match="'spectrum' is for signals, fields and volumes"):
        run(net, tmp_path / "data.npz", features="inception", by="spectrum")
    with pytest.raises(ValueError, match=r"must have the shape of the reference, \(4,\), got \(3,\)"):
        run(net, torch.randn(9, 4), features="inception")


@pytest.mark.slow
def test_numbers_of_numpy(net, tmp_path):
    numbers = {"n": np.int64(6), "seed": np.int64(1), "batch_size": np.int64(4)}
    result = run(net, out=tmp_path, settings=SETTINGS[:1], **numbers)
    assert result.rows == run(net, out=tmp_path, settings=SETTINGS[:1], n=6, seed=1, batch_size=4).rows


@pytest.mark.slow
def test_rows_are_measured_once(net, tmp_path, monkeypatch):
    first = run(net, out=tmp_path, settings=SETTINGS[:2])
    drawn = []
    sample = ODESampler.sample
    monkeypatch.setattr(ODESampler, "sample", lambda self, *a, **b: drawn.append(self) or sample(self, *a, **b))
    second = run(net, out=tmp_path)
    assert drawn == [] and second.rows[:2] == first.rows and len(second.rows) == 3
    assert len(json.loads((tmp_path / "tune.json").read_text())["rows"]) == 3
    for options in ({"seed": 1}, {"n": 7}, {"reference": REAL[:20]}):
        with pytest.raises(ValueError, match=f"measured with other settings: {next(iter(options))}.* Pass the same"):
            run(net, out=tmp_path, **options)
    (tmp_path / "tune.json").write_text("{")
    with pytest.raises(ValueError, match=r"tune\.json is not valid JSON"):
        run(net, out=tmp_path)
    (tmp_path / "tune.json").write_text('{"format_version": 1, "rows": []}')
    with pytest.raises(ValueError, match=r"tune\.json lacks settings"):
        run(net, out=tmp_path)


@pytest.fixture(scope="module")
def restorer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        levels = NoiseSchedule.geometric(1, 0.01, 9)
        made = ScoreNet.unet(3, 8, widths=(4, 6), layers_per_block=1, condition_channels=3, schedule=levels)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.2)
    return made


COLORED = torch.rand(8, 3, 8, 8, generator=seed(1))


@pytest.mark.parametrize("by", [None, *(pytest.param(by, marks=pytest.mark.slow) for by in ("perceptual", "frechet"))])
def test_the_best_settings_of_restorations(restorer, tmp_path, by):
    """The figures are those of evaluate_restoration; several operators have the geometric mean."""
    operators = ["gray", AveragePool(2)]
    result = run(restorer, COLORED, operators=operators, by=by, out=tmp_path)
    assert (result.operators, result.by) == (["gray", "pool:2"], by or "rmse")
    for row in result.rows:
        sampler = recommended_sampler(restorer, row.settings)
        values = []
        for operator in operators:
            options = {"n": 6, "draws": 1, "features": mean_color, "metrics": ["frechet"], "cache": False}
            found = evaluate_restoration(sampler, COLORED, operator, progress=False, **options).figures["restored"]
            values.append(found["restoration" if by is None else result.source][result.by].value)
            assert row.figures[str(operator)][result.by].value == pytest.approx(values[-1], rel=1e-5)
        assert result.distance(row) == pytest.approx((values[0] * values[1]) ** 0.5, rel=1e-5)
    assert result.best is min(result.rows, key=result.distance)
    head = f"| sampler settings | calls | gray: {result.by} | pool:2: {result.by} | mean: {result.by} |"
    assert result.table().startswith(head)
    assert ScoreNet.from_pretrained(tmp_path).sampler_settings.alone() == result.recommended.settings
    assert run(restorer, COLORED, operators=operators, by=by, out=tmp_path).rows == result.rows
    with pytest.raises(ValueError, match="measured with other settings: tasks"):
        run(restorer, COLORED, operators="gray", by=by, out=tmp_path)


@pytest.mark.slow
def test_the_card_has_the_number_of_restorations(restorer, tmp_path):
    run(restorer, COLORED, operators="gray", settings=SETTINGS[:1], n=1000, out=tmp_path)
    assert "Measured with `scorematch tune` on 8 images for each row" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_rows_of_another_mask_of_the_same_name_are_not_used(restorer, tmp_path):
    left, right = Mask(torch.arange(8) < 4), Mask(torch.arange(8) >= 4)
    assert str(left) == str(right)
    run(restorer, COLORED, operators=left, out=tmp_path)
    with pytest.raises(ValueError, match="measured with other settings: tasks"):
        run(restorer, COLORED, operators=right, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"the network restores images: name the operators to measure, such as operators=\['gray'\]"),
        ({"by": "rmse"}, "by must be one of 'frechet', 'kernel' for pictures, got 'rmse'"),
        ({"operators": "gray", "by": "kernel"}, "by must be one of 'rmse', 'perceptual', 'frechet' for restorations"),
        ({"operators": "gray", "held_out": COLORED}, "held_out is for samples. Leave it out with operators"),
        ({"operators": "gray", "classes": "cycle"}, "classes is for samples. Leave it out with operators"),
        ({"operators": ["gray"] * 2}, "operators must differ in their names, got gray, gray"),
        ({"operators": "gray", "by": "perceptual", "features": []}, "by='perceptual' needs features"),
        ({"operators": "sharpening"}, "operator must be mask:FILE, .* got 'sharpening'"),
    ],
)
def test_restorations_that_cannot_be_measured(restorer, options, message):
    with pytest.raises(ValueError, match=message):
        run(restorer, COLORED, **options)


@pytest.fixture(scope="module")
def one_row(net, tmp_path_factory):
    """A folder in which settings were measured."""
    folder = tmp_path_factory.mktemp("row")
    run(net, out=folder, settings=SETTINGS[:1])
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("calls"), r"lacks calls"),
        (lambda row: row.update(seconds="1"), r"seconds must be a number of at least 0, got '1'"),
        (lambda row: row["figures"].pop("images"), r"figures lacks images"),
        (lambda row: row["figures"]["images"].pop("std"), r"figures: images lacks std"),
        (lambda row: row["figures"]["images"].update(std={"value": None, "error": 1}), r".*std: value must be a"),
        (lambda row: row["settings"].update(levels=0), r"sampler_settings: levels must be"),
    ],
)
def test_a_damaged_row_raises(net, one_row, tmp_path, change, message):
    stored = json.loads((one_row / "tune.json").read_text())
    change(stored["rows"][0])
    (tmp_path / "tune.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"tune\.json: rows\[0\]:? {message}"):
        run(net, out=tmp_path, settings=SETTINGS[:1])


def test_a_card_in_another_encoding_is_kept(net, tmp_path):
    (tmp_path / "README.md").write_bytes(b"# caf\xe9\n")
    (tmp_path / ".saving-x").write_bytes(b"")  # of an interrupted call
    run(net, out=tmp_path, settings=SETTINGS[:1])
    assert (tmp_path / "README.md").read_bytes().startswith(b"# caf\xe9\n") and not list(tmp_path.glob(".*"))


def test_the_card_names_the_folder_with_slashes():
    assert _as_name(PureWindowsPath(r"runs\tuned")) == "runs/tuned" and _as_name(PureWindowsPath("tuned")) == "./tuned"


@pytest.mark.slow
def test_a_network_in_its_own_folder(net, tmp_path):
    net.save_pretrained(tmp_path)
    result = run(net, out=tmp_path, settings=SETTINGS[:1])
    assert ScoreNet.from_pretrained(tmp_path).sampler_settings.alone() == result.recommended.settings == SETTINGS[0]


def test_another_network_is_not_replaced(net, tmp_path):
    other = ScoreNet.unet(1, 8, widths=(4, 6), layers_per_block=1, schedule=net.schedule)
    other.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match=r"config\.json exists already and would be replaced"):
        run(net, out=tmp_path, settings=SETTINGS[:1])


def test_rows_of_another_data_set_of_equal_length_are_not_used(net, tmp_path):
    one, other = (list(images) for images in (REAL, REAL.flip(2)))
    run(net, one, out=tmp_path, settings=SETTINGS[:1])
    with pytest.raises(ValueError, match="measured with other settings: reference"):
        run(net, other, out=tmp_path, settings=SETTINGS[:1])


def test_rows_of_other_conditions_are_not_used(tmp_path):
    net = ScoreNet.unet(2, (8,), widths=(4, 6), layers_per_block=1, condition_features=1)
    x, conditions = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6.0)[:, None]
    options = {"n": 6, "settings": [SamplerSettings("ode", levels=2)], "out": tmp_path, "progress": False}
    first = tune(net, TensorDataset(x, conditions), **options)
    assert tune(net, TensorDataset(x, conditions), **options).rows == first.rows
    with pytest.raises(ValueError, match="measured with other settings: conditions"):
        tune(net, TensorDataset(x, conditions + 1), **options)


@pytest.mark.slow
def test_rows_of_another_function_of_the_same_name_are_not_used(net, tmp_path):
    def scaled(factor):
        return lambda images: factor * mean_color(images)

    first = run(net, features=scaled(1), out=tmp_path, settings=SETTINGS[:1])
    assert run(net, features=scaled(1), out=tmp_path, settings=SETTINGS[:1]).rows == first.rows
    with pytest.raises(ValueError, match="measured with other settings: function"):
        run(net, features=scaled(2), out=tmp_path, settings=SETTINGS[:1])


def test_the_default_settings_that_are_measured(net):
    listed = settings_table(net, calls=100)
    samplers = [recommended_sampler(net, settings) for settings in listed]
    assert max(map(len, samplers)) <= 100 and len(set(listed)) == len(listed) > 10
    assert {settings.sampler for settings in listed} == {"ode", "langevin", "ancestral", "predictor-corrector"}
    assert len(settings_table(net)) > len(listed)
    own = SamplerSettings("ode", levels=7)
    net.sampler_settings = own
    assert settings_table(net, calls=100) == [own, *listed]
    net.sampler_settings = None


def test_one_step_of_consistent_sampling_in_the_table_is_that_of_ancestral_sampling(net):
    """With p = 2 the step is 1 - r^2."""
    steps = {
        each.options["step_size"]
        for each in settings_table(net)
        if each.sampler == "langevin" and each.options["levels"] == 100
    }
    ratio = (0.01 / 1) ** (1 / 99)
    assert min(abs(step - (1 - ratio**2) * 0.01**2) for step in steps) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "fid"}, "by must be one of 'frechet', 'kernel' for pictures, got 'fid'"),
        ({"by": "kernel"}, "'kernel' needs at least 1,000 images in each set, and there are 6"),
        ({"calls": 1}, "no settings have at most 1 network calls per image: the fewest are 2"),
        ({"n": 1}, "at least 2 images, got 1"),
    ],
)
def test_wrong_arguments_are_named(net, options, message):
    with pytest.raises(ValueError, match=message):
        run(net, **options)


def test_a_network_without_a_sample_shape():
    net = ScoreNet(torch.nn.Identity(), NoiseSchedule([1.0, 0.1]), precondition="karras")
    with pytest.raises(ValueError, match=r"must draw images \(C, H, W\), but its sample_shape is None"):
        run(net)


def test_pixels_are_an_extractor_by_name(net):
    with pytest.warns(UserWarning, match="is singular"):
        result = run(net, features="pixels", settings=SETTINGS[:1])
    assert result.source == pixels().name


def test_a_network_with_one_noise_level_has_no_settings_to_compare():
    with pytest.raises(ValueError, match="has one noise level, so there are no settings to compare"):
        settings_table(ScoreNet.unet(1, 8, widths=(4,), schedule=NoiseSchedule([0.5])))
