"""The recipes: what was published, and that it can be trained."""

import inspect

import pytest
import torch

from scorematch import ScoreNet
from scorematch.palette import MultiTask
from scorematch.sampling import recommended_sampler
from scorematch.training import open_images, recipes, train
from scorematch.training.recipes import RECIPES
from scorematch.training.steps import Settings

# Parameters, noise levels, steps, batch size, learning rate: as in the papers and in the configurations of their code.
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
    "palette": (480_728_835, (75.6, 0.0005, 2000), 1_000_000, 1024, 1e-4),
}


def _meta(recipe, **options):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return recipe.build(recipe.channels or 3, **options)


def test_every_recipe_is_in_the_table_of_the_module():
    assert [name for name in RECIPES if f"\n{name} " not in recipes.__doc__] == []
    assert set(RECIPES) == {*PUBLISHED, "tiny", "small-32", "small-64"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_values(name):
    recipe, (parameters, (high, low, levels), steps, batch, lr) = RECIPES[name], PUBLISHED[name]
    net, settings = _meta(recipe), Settings(**recipe.options())
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net.schedule.sigma_max == pytest.approx(high, rel=0.01)
    assert net.schedule.sigma_min == pytest.approx(low, rel=0.01) and len(net.schedule) == levels
    assert (settings.steps, settings.batch_size, settings.lr) == (steps, batch, lr)
    assert settings.betas == (0.9, 0.999) and settings.weight_decay == 0 and settings.decay == "constant"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_the_engine(name):
    recipe = RECIPES[name]
    assert recipe.source
    assert recipe.options().keys() <= inspect.signature(train).parameters.keys()
    settings = Settings(**recipe.options())
    assert settings.rate(settings.total // 2) > 0
    net = _meta(recipe)
    assert net.sample_shape[1:] == (recipe.image_size,) * 2
    assert net.sampler_settings is recipe.sampler
    assert len(recommended_sampler(net)) > 1
    takes_an_image = net.conditioning is not None and net.conditioning.channels > 0
    assert takes_an_image == (settings.condition is not None)


@pytest.mark.parametrize("name", ["small-32", "small-64", "tiny"])
def test_the_recipes_for_little_compute(name):
    recipe = RECIPES[name]
    net = _meta(recipe)
    assert net.precondition == "karras" and net.backbone.patch == 2
    assert sum(parameter.numel() for parameter in _meta(recipe, classes=11).parameters()) < (
        100_000 if name == "tiny" else 20_000_000
    )
    assert _meta(recipe, image_size=(48, 64)).sample_shape == (3, 48, 64)


def test_classes_are_for_unets():
    assert RECIPES["tiny"].build(1, 8, classes=4).conditioning.classes == 4
    with pytest.raises(ValueError, match="the network of ncsnv2-celeba takes no classes"):
        RECIPES["ncsnv2-celeba"].build(3, classes=4)


def test_the_tasks_of_palette():
    task = RECIPES["palette"].options()["condition"]
    assert isinstance(task, MultiTask)
    assert [type(each).__name__ for each in task.tasks] == ["JPEGRestoration", "Inpainting", "Colorization"]


@pytest.mark.slow
def test_a_recipe_trains(tmp_path):
    pytest.importorskip("accelerate")
    recipe = RECIPES["tiny"]
    data = open_images(torch.rand(16, 1, 8, 8))
    options = {**recipe.options(), "images": 16, "batch_size": 8}
    net = train(recipe.build(1, 8), data, tmp_path, **options, progress=False)
    assert isinstance(net, ScoreNet) and net.sampler_settings == recipe.sampler
