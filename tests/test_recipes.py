"""The recipes: what was published, that it can be trained, what it costs, and their page."""

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.cosines import Cosines
from scorematch.core.records import as_stored
from scorematch.data import open_arrays, open_images
from scorematch.evaluation import exact
from scorematch.nets.precondition import ROWS, Preconditioning
from scorematch.nets.unet import UNET
from scorematch.pretrained import score_sde
from scorematch.pretrained.configuration import Stored, architecture
from scorematch.restoration.palette import MultiTask
from scorematch.sampling import SamplerSettings, data_moments, recommended_sampler
from scorematch.training import RECIPES, network_for, recipes, train
from scorematch.training.flops import sampling_flop, training_flop
from scorematch.training.recipes import growing
from scorematch.training.report import expectation
from scorematch.training.sampler import FAITHFUL, take_sampler
from scorematch.training.settings import TrainSettings
from tests.helpers import on_meta, seed
from tests.published import ScoreSDE

pytestmark = pytest.mark.usefixtures("no_plots")

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"

# Parameters, noise levels, steps, batch size and learning rate of the papers and of the configurations of their code.
PUBLISHED = {
    "ncsn-mnist": (7_638_657, (1, 0.01, 10), 200_000, 128, 1e-3),
    "ncsn-cifar10": (30_117_635, (1, 0.01, 10), 200_000, 128, 1e-3),
    "ncsn-celeba": (30_117_635, (1, 0.01, 10), 200_000, 128, 1e-3),
    "ncsnv2-cifar10": (29_694_083, (50, 0.01, 232), 300_000, 128, 1e-4),
    "ncsnv2-celeba": (29_694_083, (90, 0.01, 500), 210_000, 128, 1e-4),
    "ncsnv2-church": (83_445_379, (140, 0.01, 788), 200_000, 128, 1e-4),
    "ncsnv2-bedroom": (83_445_379, (190, 0.01, 1086), 150_000, 128, 1e-4),
    "ncsnv2-ffhq": (94_132_611, (348, 0.01, 2311), 80_000, 32, 1e-4),
    "ddpm-cifar10": (35_746_307, (78.88, 0.005, 1000), 800_000, 128, 2e-4),
    "ncsnpp-cifar10": (62_758_915, (50, 0.01, 1000), 1_300_000, 128, 2e-4),
    "ddpmpp-cifar10": (61_804_419, (76.08, 0.00524, 1000), 1_300_000, 128, 2e-4),
    "edm-cifar10": (55_733_891 - 9 * 128, (40, 0.001, 256), 390_625, 512, 1e-3),  # without augmentation's parameters
    "palette": (480_728_835, (75.6, 0.0005, 2000), 1_000_000, 1024, 1e-4),
}


def _meta(recipe, **options):
    """The network on the meta device, where weights need no memory."""
    with on_meta():
        return recipe.build(recipe.channels or 3, **options)


def _parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_every_recipe_is_in_the_table_of_the_module():
    assert [name for name in RECIPES if f"\n{name} " not in recipes.__doc__] == []
    assert set(RECIPES) == {*PUBLISHED, "tiny", "small-32", "small-64", "growing"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name):
    recipe, (parameters, (high, low, levels), steps, batch, lr) = RECIPES[name], PUBLISHED[name]
    net, settings = _meta(recipe), TrainSettings(**recipe.options())
    assert _parameters(net) == parameters
    assert net.schedule.sigma_max == pytest.approx(high, rel=0.01)
    assert net.schedule.sigma_min == pytest.approx(low, rel=0.01) and len(net.schedule) == levels
    assert (settings.steps, settings.batch_size, settings.lr) == (steps, batch, lr)
    assert settings.betas == (0.9, 0.999) and settings.weight_decay == 0 and settings.decay == "constant"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_valid_settings_and_a_sampler(name):
    recipe = RECIPES[name]
    assert recipe.source
    assert recipe.options().keys() <= inspect.signature(train).parameters.keys()
    settings = TrainSettings(**recipe.options())
    assert settings.rate(settings.total // 2) > 0
    net = _meta(recipe)
    assert net.sample_shape[1:] == (recipe.image_size,) * 2
    assert net.sampler_settings is recipe.sampler
    assert (recipe.sampler is not None) == (name in PUBLISHED)
    takes_an_image = net.conditioning is not None and net.conditioning.channels > 0
    assert takes_an_image == (settings.condition is not None)


@pytest.mark.parametrize("name", ["small-32", "small-64", "tiny"])
def test_recipes_for_little_compute_are_small_unets_with_patches(name):
    recipe = RECIPES[name]
    net = _meta(recipe)
    assert net.precondition == "karras" and net.backbone.patch == 2
    assert _parameters(_meta(recipe, classes=11)) < (100_000 if name == "tiny" else 20_000_000)
    assert _meta(recipe, image_size=(48, 64)).sample_shape == (3, 48, 64)


def _grown(recipe, **options):
    """The network of each stage of a recipe, on the meta device."""
    nets = [_meta(recipe, **options)]
    for stage in recipe.training["growth"]:
        config = nets[-1].config
        larger = UNET.larger(config, stage.network)
        assert {key for key in larger if larger[key] != config.get(key)} <= UNET.growth(config, {**config, **larger})
        nets.append(ScoreNet.from_stored(Stored({**config, **larger}, {}, "", has_weights=False)))
    return nets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "shipped", "options"),
    [(32, "cifar10-small", {"classes": 10, "null_class": True}), (64, "celeba-small", {})],
)
def test_the_last_network_of_growing_is_the_one_that_ships(side, shipped, options):
    net, last = ScoreNet.from_pretrained(shipped), _grown(growing(side), **options)[-1]
    assert as_stored(architecture(last.config)) == as_stored(architecture(net.config))
    assert last.schedule == net.schedule and last.sample_shape == net.sample_shape


@pytest.mark.parametrize(("side", "patch"), [(16, 2), (28, 2), (45, 2), (46, 4), (64, 4), (96, 8)])
def test_growing_has_about_16_patches_per_side(side, patch):
    recipe = RECIPES["growing"].resized((side + 8, side))
    assert (recipe.image_size, recipe.network["patch"], recipe.resized(None)) == (side, patch, recipe)
    assert RECIPES["tiny"].resized(side) is RECIPES["tiny"]


def test_growing_has_fewer_stages_for_fewer_images():
    options = growing(32).options()
    for images, stages in [(499_999, 1), (500_000, 2), (1_200_000, 3), (3_000_000, 3)]:
        settings = TrainSettings(**{**options, "images": images})
        assert len(settings.stages()) == stages and settings.total == pytest.approx(images, abs=3 * 64)
    assert [stage.lr for stage in settings.stages()] == [5e-3, 2.5e-3, 2.5e-3]
    assert all(stage.optimizer == "muon" and stage.fixed_norms for stage in settings.stages())
    short = growing(32).of_length(499_999)
    assert short.network["widths"] == (48, 96, 128) and "growth" not in short.training and short.training["fixed_norms"]
    assert growing(32).of_length(500_000).network["widths"] == (64, 128, 160)
    assert RECIPES["tiny"].of_length(1) is RECIPES["tiny"]
    with pytest.raises(ValueError, match="growing is for images of at least 16 pixels, got 8"):
        growing(8)


@pytest.mark.parametrize(("side", "means", "high"), [(32, (-1.2, -1.5, -1.5), 0), (64, (-1.0, -1.3, -1.3), 0.1)])
def test_the_last_stage_of_growing_has_high_levels_for_larger_images(side, means, high):
    places = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    stages = TrainSettings(**growing(side).options()).stages()
    above = [float((stage.levels.quantile(places) > 3).double().mean()) for stage in stages]
    expected = [float(torch.special.ndtr(torch.tensor((mean - math.log(6)) / 1.2))) for mean in means]
    expected[2] = (1 - high) * expected[2] + high * math.log(40 / 3, 40)
    assert above == pytest.approx(expected, abs=1e-4)


def test_a_short_run_says_what_to_expect():
    text = expectation(80_000, 1 / 100, (3, 32, 32), None)
    assert text.startswith("80,000 images are few") and text.endswith("take 0.6 hours at this speed.")
    for images, shape in [(200_000, (3, 32, 32)), (80_000, (3, 8, 8)), (80_000, (2, 64)), (80_000, (5, 32, 32))]:
        assert expectation(images, 1 / 100, shape, None) is None
    assert expectation(20_000, 1 / 100, (3, 32, 32), "cifar10-small") is None  # fine-tuned networks draw objects


def test_only_unets_accept_classes():
    assert RECIPES["tiny"].build(1, 8, classes=4).conditioning.classes == 4
    with pytest.raises(ValueError, match="the network of ncsnv2-celeba takes no classes"):
        RECIPES["ncsnv2-celeba"].build(3, classes=4)


def test_the_palette_recipe_has_three_tasks():
    task = RECIPES["palette"].options()["condition"]
    assert isinstance(task, MultiTask)
    assert [type(each).__name__ for each in task.tasks] == ["JPEGRestoration", "Inpainting", "Colorization"]


@pytest.mark.parametrize(
    ("name", "config"),
    [("ncsnpp-cifar10", "ve/cifar10_ncsnpp_continuous"), ("ddpmpp-cifar10", "vp/cifar10_ddpmpp_continuous")],
)
def test_networks_of_song_et_al_are_those_of_their_configurations(name, config):
    options = score_sde._options(config)
    recipe, net = RECIPES[name], _meta(RECIPES[name])
    expected = score_sde._architecture(options)
    assert expected.pop("skip_rescale")  # the default
    assert {key: net.config[key] for key in expected} == expected
    with on_meta():
        theirs = ScoreSDE({"data": options, "model": options})
    assert _parameters(theirs) == PUBLISHED[name][0]
    schedule, row = score_sde._noise(options, config)
    torch.testing.assert_close(net.schedule.sigmas, schedule.sigmas, rtol=1e-12, atol=0)
    assert net.precondition == row["precondition"]
    assert {**ROWS[net.precondition].options, **net.precondition_options} == row.get("precondition_options", {})
    theirs = score_sde._settings(options)
    options = {
        key: value for key, value in theirs.options.items() if key != "published"
    }  # images do not depend on others
    assert recipe.sampler.sampler == theirs.sampler and recipe.sampler.options == options
    assert config in recipe.source


def test_levels_of_song_et_al_are_those_of_uniform_times():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    time = 1e-5 + u * (1 - 1e-5)
    exploding = RECIPES["ncsnpp-cifar10"].training["levels"].quantile(u)
    torch.testing.assert_close((exploding / 0.01).log() / math.log(5000), time, rtol=1e-9, atol=0)
    preserving = RECIPES["ddpmpp-cifar10"].training["levels"].quantile(u)
    row = Preconditioning("vp", NoiseSchedule([1.0]), (0, 1))
    torch.testing.assert_close(row.coefficients(preserving).c_noise / 999, time, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "factor", "clip"),  # the published loss, divided by that of dsm_loss, and the largest norm of its gradient
    [
        ("ddpm-cifar10", 2 / 3072, 1),  # a mean
        ("ncsnpp-cifar10", 1, 1),  # half of the sum
        ("ddpmpp-cifar10", 2 / 3072, 1),  # a mean
        ("edm-cifar10", 2, None),  # the sum
    ],
)
def test_the_optimizer_is_that_of_the_published_loss(name, factor, clip):
    settings = TrainSettings(**RECIPES[name].options())
    assert settings.eps * factor == pytest.approx(1e-8)
    assert settings.clip is None if clip is None else settings.clip * 3072 / 2 * factor == pytest.approx(clip)


def test_the_settings_of_edm():
    recipe = RECIPES["edm-cifar10"]
    settings = TrainSettings(**recipe.options())
    assert settings.total == 200_000_000 and settings.rate(5_000_000 - 512) == pytest.approx(5e-4)
    assert settings.ema[0] ** (500_000 / 512) == pytest.approx(0.5)  # the half-life
    assert recipe.network["dropout"] == 0.13 and settings.augment == ("nonleaking",)
    sampler = recommended_sampler(_meta(recipe))
    assert len(sampler) == 35 and sampler.schedule == NoiseSchedule.karras(40, 0.001, 18)
    assert _meta(recipe, classes=10).conditioning.classes == 10


# -- The cost


@pytest.mark.slow
@pytest.mark.parametrize("network", [ScoreNet.ncsn, ScoreNet.ncsnv2])  # torch does not count attention on a CPU
def test_the_costs_equal_the_counted_operations_of_a_step_and_of_a_call(network):
    net = network(1, 8, width=4)
    with FlopCounterMode(display=False) as counter:
        dsm_loss(net, torch.rand(1, 1, 8, 8), sigma=0.5).backward()
    net.zero_grad()
    assert training_flop(net) == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        net(torch.rand(1, 1, 8, 8), 0.5)
    assert sampling_flop(net) == counter.get_total_flops() > 0
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"patch": 2, "condition_channels": 3}, {"classes": 5}])
def test_the_cost_of_networks_with_conditions(options):
    costs = [training_flop(ScoreNet.unet(3, 16, widths=widths, **options)) for widths in ((8, 16), (16, 32))]
    assert 3 * costs[0] < costs[1] < 4 * costs[0]  # convolutions cost the product of their channels


def test_the_cost_of_a_network_that_is_not_known():
    net = ScoreNet(torch.nn.Conv2d(1, 1, 1), RECIPES["tiny"].schedule, sample_shape=(1, 8, 8))
    with pytest.raises(ValueError, match="a backbone whose condition is known"):
        training_flop(net)


# -- The page


def _cells(text, header):
    """The rows of the first table whose header begins like this, a regular expression, by their first cell."""
    table = re.search(rf"^\| {header} +\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_page_has_the_settings_of_every_recipe():
    rows = _cells(PAGE.read_text(encoding="utf-8"), "recipe")
    assert list(rows) == list(RECIPES)
    for name, row in rows.items():
        recipe, settings = RECIPES[name], TrainSettings(**RECIPES[name].options())
        numbers = [
            PUBLISHED[name][0] if name in PUBLISHED else _parameters(_meta(recipe)),
            recipe.image_size,
            settings.batch_size,
            settings.lr,
        ]
        assert [float(cell.replace(",", "")) for cell in row[1:5]] == numbers
        assert row[5] == (", ".join(f"{length:g}" for length in settings.ema) or "none")
        assert row[6] == f"{settings.total:,}"
        assert float(row[8]) == pytest.approx(float(row[7].replace(",", "")) * 1e9 * settings.total, rel=0.06)


@pytest.mark.slow
def test_the_page_has_the_mean_cost_of_growing():
    settings = TrainSettings(**growing(32).options())
    shares = [stage.total / settings.total for stage in settings.stages()]
    mean = sum(a * training_flop(net) for a, net in zip(shares, _grown(growing(32)), strict=True))
    assert float(_cells(PAGE.read_text("utf-8"), "recipe")["growing"][7]) == pytest.approx(mean / 1e9, abs=0.005)


@pytest.mark.parametrize("name", ["28, gray", "32, color", "64, color"])
def test_the_page_has_the_networks_of_growing_by_size(name):
    patch, pixels, blocks, means, parameters = _cells(PAGE.read_text("utf-8"), "side in pixels")[name]
    recipe = replace(growing(int(name[:2])), channels=1 if "gray" in name else 3)
    nets = _grown(recipe)
    assert patch == f"{nets[0].backbone.patch} x {nets[0].backbone.patch}"
    assert pixels == ", ".join(str(net.config["pixel_channels"]) for net in nets)
    assert int(blocks) == 2 * nets[-1].config["pixel_layers"]
    levels = [getattr(stage.levels, "parts", [stage.levels])[0] for stage in TrainSettings(**recipe.options()).stages()]
    assert means == ", ".join(f"{level.mean + math.log(2):.1f}" for level in levels)
    counts = [sum(parameter.numel() for parameter in net.parameters()) for net in nets]
    assert parameters == ", ".join(f"{count:,}" for count in counts)


def test_the_page_has_the_source_of_every_recipe():
    rows = _cells(PAGE.read_text(encoding="utf-8"), r"recipe \| source")
    assert list(rows) == list(RECIPES)
    for name, (source, time, differs) in rows.items():
        recipe = RECIPES[name]
        assert (source, time, differs) == (recipe.source, recipe.published_time or "-", recipe.differs or "-")


@pytest.mark.slow
def test_a_recipe_can_be_trained(tmp_path):
    pytest.importorskip("accelerate")
    recipe = RECIPES["tiny"]
    data = open_images(torch.rand(16, 1, 8, 8))
    options = {**recipe.options(), "images": 16, "batch_size": 8}
    net = train(recipe.build(1, 8), data, tmp_path, **options, progress=False)
    assert isinstance(net, ScoreNet) and len(recommended_sampler(net)) == 8


def _new(channels, **options):
    return ScoreNet.unet(channels, 8, widths=(8, 8), **options)


def test_color_pictures_are_drawn_in_few_calls_with_their_moments():
    pictures = 0.2 + 0.6 * torch.rand(120, 3, 8, 8, generator=seed(0))
    net = _new(3)
    take_sampler(net, open_images((255 * pictures).round().to(torch.uint8)))
    expected = data_moments((255 * pictures).round() / 255)
    sampler = recommended_sampler(net)
    assert (len(sampler), len(recommended_sampler(net, calls=4)), len(recommended_sampler(net, calls=18))) == (6, 4, 18)
    assert sampler.data_mean == pytest.approx(expected["data_mean"], rel=1e-3)
    assert sampler.data_spectrum == pytest.approx(expected["data_spectrum"], rel=1e-3)
    assert list(sampler.schedule)[::5] == [
        8,
        0.03,
    ]  # 32 deviations of pictures, which are 1/4, and barely visible noise
    before = net.sampler_settings

    take_sampler(net, open_images(pictures[:99]))  # too few to measure
    assert net.sampler_settings == before
    take_sampler(net, open_images(pictures[:99, :, :4, :4]))  # and of another size
    assert len(recommended_sampler(net)) == 18 and not net.sampler_settings.alternatives
    net.sampler_settings = SamplerSettings("ancestral", levels=5, alternatives=[before.alone()])
    take_sampler(net, open_images(1 - pictures))
    first, (few,) = net.sampler_settings, net.sampler_settings.alternatives
    assert (first.sampler, first.options["levels"], few.options["sigmas"]) == ("ancestral", 5, before.options["sigmas"])
    brighter = data_moments(1 - pictures)["data_mean"]
    assert list(few.options["data_mean"]) == brighter != list(before.options["data_mean"])


def test_other_networks_than_those_of_color_pictures_keep_their_samplers():
    def chosen(net, data):
        take_sampler(net, data)
        return net.sampler_settings

    colors, gray = torch.rand(120, 3, 8, 8, generator=seed(1)), torch.rand(120, 1, 8, 8, generator=seed(2))
    eight, many = (SamplerSettings("ode", levels=n, method=name) for n, name in ((8, "unipc"), (18, "dpm-solver++")))
    eight = SamplerSettings("ode", sigma_min=0.03, **eight.options, alternatives=[many])
    assert chosen(_new(1), open_images(gray)) == chosen(_new(3), open_images(colors[:50])) == eight
    assert chosen(_new(3), open_arrays(colors)) is None
    assert chosen(_new(3, condition_channels=3), open_images(colors)) is None
    assert chosen(ScoreNet.ncsn(3, 8, width=4), open_images(colors)) is None
    net = _new(3)
    net.sampler_settings = SamplerSettings(levels=7)
    assert chosen(net, open_images(colors)) == SamplerSettings(levels=7)


def _walks(n):
    """Two channels of random walks, 250 +- 30 and 3 +- 0.1."""
    steps = torch.randn(n, 2, 16, generator=seed(3))
    return (steps - steps.mean(2, keepdim=True)).cumsum(2) * torch.tensor([[30.0], [0.1]]) + torch.tensor(
        [[250.0], [3]]
    )


def test_signals_in_their_own_units_are_drawn_with_their_moments():
    x = _walks(120)
    net = network_for((2, 16))
    net.fit_units(x)
    take_sampler(net, open_arrays(x))
    sampler, deviation = recommended_sampler(net), net.units.typical
    assert (len(sampler), len(recommended_sampler(net, calls=36))) == (18, 36)
    given = network_for((2, 16), condition_features=3)
    given.fit_units(x)
    take_sampler(given, open_arrays({"x": x, "condition": torch.rand(120, 3)}))
    assert (len(recommended_sampler(given)), len(recommended_sampler(given, calls=18))) == (36, 18)
    expected = data_moments(x, net=net)
    assert sampler.data_mean == pytest.approx(expected["data_mean"], rel=1e-3)
    assert sampler.data_spectrum == pytest.approx(expected["data_spectrum"], rel=1e-3)
    highest = max(32 * deviation, 8 * max(expected["data_spectrum"]) ** 0.5)
    assert [*sampler.schedule][::17] == pytest.approx([highest, 0.01 * deviation], rel=1e-2)

    few, flat, named = network_for((2, 16)), network_for((3,)), network_for((2, 16))
    named.sampler_settings = SamplerSettings(levels=7)
    for other, data in ((few, x[:99]), (flat, x[:, 0, :3]), (named, x)):
        other.fit_units(data)
        take_sampler(other, open_arrays(data))
    assert few.sampler_settings == flat.sampler_settings == FAITHFUL
    assert named.sampler_settings == SamplerSettings(levels=7)


@pytest.mark.parametrize("calls", [18, 36])
def test_the_sampler_of_signals_keeps_the_variance_of_all_scales(calls):
    """Signals with another spectrum than the moments: for a Gaussian the flow is linear in each cosine."""
    x = _walks(200)[:, :1]
    net = network_for((1, 16))
    net.fit_units(x)
    take_sampler(net, open_arrays(x))
    first = net.sampler_settings
    settings = first.alone() if calls == 18 else first.alternatives[0]
    cosines, spectrum = Cosines(x), torch.tensor([settings.options["data_spectrum"]])
    directions = cosines.inverse(torch.eye(16)[:, None])[:, 0].double()
    factors = torch.logspace(-0.5, 0.5, 16, dtype=torch.float64)[torch.randperm(16, generator=seed(1))]
    variance = cosines.spread(spectrum)[0, 0].double() * factors
    mean = x.mean(0)[0].double()
    normal = exact.Gaussian(mean, directions.T @ variance.diag() @ directions, sample_shape=(1, 16))
    sampler = recommended_sampler(normal, settings)
    init = mean + (float(sampler.schedule.sigmas[0]) ** 2 + variance).sqrt()[:, None] * directions
    found = (sampler.sample(16, init=init[:, None], progress=False)[:, 0].double() - mean) @ directions.T
    torch.testing.assert_close(found.diag().square() / variance, torch.ones(16).double(), rtol=0, atol=0.03)
