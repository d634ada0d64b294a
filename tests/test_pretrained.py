"""Networks on disk: names, configurations, weights, and how they are saved and loaded."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scorematch import NoiseSchedule, ScoreNet, score
from scorematch.core.conditions import Condition, describe_classes
from scorematch.core.schema import Field, check
from scorematch.guidance import classifier_free
from scorematch.nets import FAMILIES
from scorematch.pretrained import cards, load, names, saving
from scorematch.pretrained.model_card import model_card
from scorematch.sampling import SamplerSettings
from tests.conftest import FIXTURES
from tests.helpers import python
from tests.networks import built

WEIGHTS = "model.safetensors"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE = ("model_index.json", "scheduler_config.json")
SKIP = {
    "block_out_channels": [8, 16],
    "down_block_types": ["SkipDownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["SkipUpBlock2D", "SkipUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "time_embedding_type": "fourier",
}


def _net(seed=0, **arguments):
    torch.manual_seed(seed)
    return ScoreNet.ncsnv2(**{"channels": 1, "image_size": (8, 12), "width": 4, **arguments})


def _unet(seed=0, **arguments):
    torch.manual_seed(seed)
    return ScoreNet.unet(**{"channels": 1, "image_size": 8, "widths": (8, 8), "layers_per_block": 1, **arguments})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a network, which no test changes."""
    path = tmp_path_factory.mktemp("original") / "network"
    _net().save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the folder, which tests may change."""
    return shutil.copytree(original, tmp_path / "network")


def _edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- Properties of every family and format

# The options of a small network of each family. It is tested with every row of the preconditioning table that the
# family supports; some networks with other options follow. A new family needs an entry here.
SMALL = {
    "ncsn": {"width": 4, "schedule": NoiseSchedule.geometric(1, 0.01, 7)},
    "ncsnv2": {"width": 4},
    "unet": {"widths": (8, 16), "layers_per_block": 1},
    "ncsnpp": {"widths": (8, 16), "layers_per_block": 1},
}


def _small(family, row, **options):
    torch.manual_seed(0)
    options = {**SMALL[family.name], **options}
    if len(family.preconditions) > 1:
        options["precondition"] = row
    return getattr(ScoreNet, family.name)(1, 8, **options)


def _skip(channels=3):
    """An NCSN++ with Skip blocks, Fourier features, and filters that are not stored in the file."""
    torch.manual_seed(0)
    architecture = {"family": "unet", "in_channels": channels, "out_channels": channels, **SKIP}
    return built(architecture, NoiseSchedule.geometric(30, 0.01, 20), "ncsnpp", (channels, 8, 8))


def _several():
    """A network with many options that differ from their defaults."""
    net = _unet(channels=2, classes=4, dropout=0.1, schedule=NoiseSchedule([3.0, 1 / 3, 0.01]))
    net.sample_shape, net.value_range = None, (-3.0, 5.0)
    return net


NETWORKS = {
    **{
        f"{family.name}, {row}": lambda family=family, row=row: _small(family, row)
        for family in FAMILIES.values()
        if 2 in family.dimensions  # tests/test_mlp.py has the networks for vectors
        for row in family.preconditions
    },
    "deeper": lambda: _small(FAMILIES["ncsn"], "ncsn", depth="deeper"),
    "deepest": lambda: _net(depth="deepest", image_size=16, precondition="karras"),
    "NCSN++": _skip,
    "options of the row": lambda: _small(
        FAMILIES["ncsnpp"], "vp", precondition_options={"beta_max": 12, "time_scale": 1.5}, classes=3, null_class=True
    ),
    "null class": lambda: _unet(classes=3, null_class=True, precondition="ddpm"),
    "patches": lambda: _unet(patch=2, pixel_channels=4, precondition="ddpm"),
    "several options": _several,
    **{
        folder.name: lambda folder=folder: ScoreNet.from_pretrained(folder)
        for folder in sorted((FIXTURES / "hub").iterdir())
    },
    **{
        card.name: lambda card=card: ScoreNet.from_pretrained(card.name)
        for card in cards.CARDS
        if card.repository is None
    },
}


# Of the two families with all rows, each is tested with half of them; the other pairs, and large networks, are slow.
ROWS = list(FAMILIES["unet"].preconditions)
SLOW = {*(f"unet, {row}" for row in ROWS[::2]), *(f"ncsnpp, {row}" for row in ROWS[1::2])}
SLOW |= {"celeba-small", "cifar10-small", "palette-celeba", "palette-mnist", "mnist-classes", "deepest"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]
)
def saved(request, tmp_path_factory):
    """A network and the folder into which it was saved."""
    net, folder = NETWORKS[request.param]().eval(), tmp_path_factory.mktemp("saved") / "a" / "b"
    net.sampler_settings = SamplerSettings(levels=3, steps_per_level=2, step_size=1e-5, exact_noise=True)
    net.save_pretrained(folder)
    return net, folder


def test_save_then_load_is_equal(saved, rng):
    net, folder = saved
    state = torch.get_rng_state()
    loaded = ScoreNet.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert loaded.config == net.config and json.loads(json.dumps(loaded.config)) == loaded.config
    assert loaded.schedule == net.schedule and loaded.sample_shape == net.sample_shape
    assert loaded.sampler_settings == net.sampler_settings and loaded.conditioning == net.conditioning
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in net.parameters()]
    found, expected = loaded.state_dict(), net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    channels, *size = (2, 8, 8) if net.sample_shape is None else net.sample_shape
    condition = None
    if net.conditioning.classes is not None:
        condition = torch.tensor([1, 0])
    elif net.conditioning.channels:
        condition = torch.rand(2, net.conditioning.channels, *size, generator=rng)
    x, sigma = torch.rand(2, channels, *size, generator=rng), net.schedule[len(net.schedule) // 2]
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma, condition), net(x, sigma, condition))


def test_a_network_that_diffusers_can_run_is_saved_in_its_layout(saved):
    net, folder = saved
    config = json.loads((folder / "config.json").read_text())
    fourier = config.get("time_embedding_type") == "fourier"
    rows = ("ncsnpp",) if fourier else ("ddpm", "ddpm_v", "ddpm_x0")
    own = config.get("patch", 1) > 1 or config.get("null_class", False)
    if net.family.name == "unet" and net.precondition in rows and not own:
        pipeline = not fourier and net.conditioning == Condition()
        assert _files(folder).keys() == {"config.json", "schedule.json", DIFFUSERS_WEIGHTS, *(PIPELINE * pipeline)}
        assert config["_class_name"] == "UNet2DModel" and config["schedule"] == "schedule.json"
        assert config["sample_size"] == net.sample_shape[-1]
        assert len(json.dumps(config)) < 1500  # diffusers prints all unknown keys
    else:
        assert _files(folder).keys() == {"config.json", WEIGHTS}
        assert "_class_name" not in config


@pytest.mark.parametrize("precondition", ["ddpm", "karras"])
def test_weights_are_loaded_from_the_file_of_either_layout(precondition, tmp_path):
    net = _unet(precondition=precondition)
    net.save_pretrained(tmp_path)
    own, other = (DIFFUSERS_WEIGHTS, WEIGHTS) if precondition == "ddpm" else (WEIGHTS, DIFFUSERS_WEIGHTS)
    (tmp_path / own).rename(tmp_path / other)
    loaded = ScoreNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))
    (tmp_path / other).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {own}; it holds "):
        ScoreNet.from_pretrained(tmp_path)


def test_saved_files_are_json_and_safetensors_with_the_published_names(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1 and config["family"] == "ncsnv2"
    weights = load_file(folder / WEIGHTS)
    # Weights have the published names; the noise levels are in the configuration.
    assert "begin_conv.weight" in weights and "sigmas" not in weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_loaded_as_float32(dtype, tmp_path):
    net = _net().to(dtype)
    net.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["begin_conv.weight"].dtype == dtype
    loaded = ScoreNet.from_pretrained(tmp_path)
    for stored, tensor in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored.float())


@pytest.mark.slow
def test_weights_are_not_rounded_to_the_default_dtype(tmp_path):
    net, own = _net(), ScoreNet(_Own(), NoiseSchedule.geometric(1, 0.01, 5))
    net.save_pretrained(tmp_path / "net")
    own.save_pretrained(tmp_path / "own")
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = ScoreNet.from_pretrained(tmp_path / "net")
        loaded_own = ScoreNet.from_pretrained(tmp_path / "own", backbone=_Own())
    finally:
        torch.set_default_dtype(torch.float32)
    for found, expected in ((loaded, net), (loaded_own, own)):
        assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


class _Own(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, width, padding=width // 2)
        self.tied = self.conv  # shared weights are saved under both names
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x, c_noise):
        return self.conv(x) + c_noise.view(-1, 1, 1, 1)


def test_changes_of_the_configuration_do_not_change_the_network():
    net = ScoreNet.ncsnpp(1, 8, widths=(4, 8), layers_per_block=1, precondition_options={"sigma_data": 0.25})
    expected = json.loads(json.dumps(net.config))
    net.config["block_out_channels"].append(16)
    net.config["precondition_options"]["sigma_data"] = 1.0
    assert net.config == expected


def test_a_network_built_with_numbers_of_numpy_can_be_saved(tmp_path):
    labels, sizes = np.array([0, 2, 1]), np.array([8, 16])
    net = ScoreNet.unet(
        np.int64(3),
        sizes,
        widths=4 * np.array([1, 2]),
        attention=np.array([False, True]),
        classes=labels.max() + 1,
        dropout=np.float32(0.5),
        precondition="karras",
    )
    net.save_pretrained(tmp_path)
    assert ScoreNet.from_pretrained(tmp_path).config == net.config
    assert net.sample_shape == (3, 8, 16) and net.config["num_class_embeds"] == 3
    own = ScoreNet(
        nn.Conv2d(3, 3, 1),
        NoiseSchedule.geometric(1, 0.01, 5),
        sample_shape=(3, *sizes),
        value_range=np.array([-1.0, 1.0]),
        precondition_options={"sigma_data": np.float32(0.25)},
    )
    own.save_pretrained(tmp_path / "own")
    assert ScoreNet.from_pretrained(tmp_path / "own", backbone=nn.Conv2d(3, 3, 1)).config == own.config


def test_a_network_with_a_user_defined_backbone(tmp_path):
    net = ScoreNet(_Own(), NoiseSchedule([1.0, 0.1]), sample_shape=(1, 5, 5), value_range=None)
    net.save_pretrained(tmp_path)
    backbone = _Own()
    weight = backbone.conv.weight
    loaded = ScoreNet.from_pretrained(tmp_path, backbone=backbone)
    assert loaded.backbone is backbone and backbone.conv.weight is weight  # filled in place
    x = torch.rand(2, 1, 5, 5)
    assert torch.equal(loaded(x, 0.3), net(x, 0.3))
    assert loaded.value_range is None and loaded.backbone.steps == 7
    assert loaded.config == net.config
    with pytest.raises(ValueError, match=r"a network of your own class.* In Python, pass an instance of the class as "):
        ScoreNet.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"backbone must be a torch\.nn\.Module, an instance of your class, got <class"):
        ScoreNet.from_pretrained(tmp_path, backbone=_Own)
    with pytest.raises(ValueError, match=r"other sizes: conv.weight \(1, 1, 3, 3\) instead of \(1, 1, 5, 5\)"):
        ScoreNet.from_pretrained(tmp_path, backbone=_Own(5))


def test_a_backbone_that_stores_other_values_than_tensors_is_not_saved(tmp_path):
    class Own(_Own):
        def get_extra_state(self):
            return {"step": 1}

    net = ScoreNet(Own(), NoiseSchedule.geometric(1, 0.01, 5))
    with pytest.raises(ValueError, match="stores '_extra_state' in its state_dict, which is not a tensor"):
        net.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_of_a_loaded_network_do_not_change_with_the_file(folder):
    net = ScoreNet.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:  # overwrites the file in place
        file.seek(size // 2)
        file.write(b"\0" * (size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.slow
def test_loading_does_not_import_torchs_compiler(tmp_path):
    """torch would import it for random numbers on the meta device, which takes seconds."""
    networks = {"classes": _unet(classes=3), "levels": _small(FAMILIES["ncsn"], "ncsn"), "fourier": _skip()}
    for name, net in networks.items():
        net.save_pretrained(tmp_path / name)
    code = "import sys\nfrom scorematch import ScoreNet\nfor name in sys.argv[1:]: ScoreNet.from_pretrained(name)\n"
    python("-c", code + "assert 'torch._dynamo' not in sys.modules", *(tmp_path / name for name in networks))


def test_channels_last_weights_are_saved_and_loaded(tmp_path):
    net = _net().to(memory_format=torch.channels_last)
    net.save_pretrained(tmp_path)
    loaded = ScoreNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))


def test_a_copied_folder_can_be_loaded(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert ScoreNet.from_pretrained(str(tmp_path / "copy")).config == ScoreNet.from_pretrained(folder).config


# -- Cards


def test_shipped_networks_are_loaded_by_name_and_match_their_cards():
    shipped = [card for card in cards.CARDS if card.repository is None]
    known = ["mnist", "mnist-classes", "cifar10-small", "celeba-small", "palette-mnist", "palette-celeba"]
    assert [card.name for card in shipped] == known
    color = dict.fromkeys(["cifar10-small", "celeba-small", "palette-celeba"], 16_000_000)
    sizes = {"palette-mnist": 3_000_000, **color}
    for card in shipped:
        net = ScoreNet.from_pretrained(card.name)
        assert (len(net.schedule), net.sample_shape) == (card.levels, card.shape)
        assert card.parameters == sum(p.numel() for p in net.parameters())
        assert (round(net.schedule.sigma_max, 1), net.schedule.sigma_min) == card.sigmas
        folder = names.locate(card.name).folder
        assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", WEIGHTS}
        assert (folder / WEIGHTS).stat().st_size <= sizes.get(card.name, 6_000_000)
        assert net.sampler_settings is not None and card.settings is None  # they are in the folder
        assert load(names.locate(folder)).config == net.config


@pytest.mark.parametrize("card", [card for card in cards.CARDS if card.repository is None], ids=lambda card: card.name)
def test_the_cards_of_shipped_networks_have_metadata_for_the_hub(card):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    text = (cards.SHIPPED / card.name / "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data
    assert data.library_name == "scorematch" and {"score-matching", "langevin-dynamics"} == set(data.tags)
    takes_image = card.name.startswith("palette")
    assert data.pipeline_tag == ("image-to-image" if takes_image else "unconditional-image-generation")
    assert data.license == ("mit" if card.license == "MIT" else "other")
    assert data.license != "other" or (data.license_name and data.license_link)
    (dataset,) = data.datasets
    assert dataset.split("/")[1].casefold() in card.data.replace("-", "").casefold()
    assert len(data.metrics) == 1
    assert f"\n---\n\n# {card.name}\n" in text


def test_cards_have_distinct_names_and_name_the_source_of_their_settings():
    names = [name for card in cards.CARDS for name in (card.name, card.repository) if name is not None]
    assert len(set(names)) == len(names)
    assert all(card.settings_source and card.quality and card.license for card in cards.CARDS)
    assert all(card.name is None or "/" not in card.name for card in cards.CARDS)
    assert all(f"{card.parameters:,} parameters" in cards.table() for card in cards.CARDS)


def test_the_file_of_published_networks_fits_its_schema():
    published = json.loads(Path(cards.__file__).with_name("published.json").read_text(encoding="utf-8"))
    text, optional = Field(str, required=True), Field(str)
    shape = Field(list, required=True, low=3, high=3, each=Field(int, low=1))
    facts = {"license": text, "data": text, "quality": text, "shape": shape}
    network = {
        **{"name": optional, "repository": optional, "revision": optional, "settings_source": text},
        **{"levels": Field(int, required=True, low=2), "parameters": Field(int, required=True, low=1)},
        "sigmas": Field(list, required=True, low=2, high=2, each=Field(float, above=0)),
        "settings": Field(dict),
        "correction": Field(bool),
    }
    for entry in published["networks"]:
        check(entry, {**facts, **network}, str(entry), closed=True)
    for entry in published["checkpoints"]:
        check(entry, {**facts, "name": text, "address": text, "config": optional}, str(entry), closed=True)
    assert set(published) == {"networks", "checkpoints", "configurations"}
    for project in published["configurations"]:
        for name, options in cards.configurations(project).items():
            assert options and "like" not in options, name


def test_the_settings_on_a_card_replace_those_in_the_folder(folder, monkeypatch):
    card = cards.Card(
        name="here",
        license="MIT",
        shape=(1, 8, 12),
        data="",
        sigmas=(50, 0.01),
        levels=232,
        parameters=1,
        settings=SamplerSettings("ode"),
        settings_source="",
        quality="",
    )
    monkeypatch.setattr(cards, "CARDS", (card,))
    monkeypatch.setattr(cards, "SHIPPED", folder.parent)
    folder.rename(folder.parent / "here")
    assert ScoreNet.from_pretrained("here").sampler_settings == SamplerSettings("ode")


@pytest.mark.parametrize(
    ("value_range", "shape", "units", "condition"),
    [
        ((0, 1), (3, 8, 8), "images in [0, 1] with", "  # your conditioning images, in [0, 1]"),
        ((-1, 1), (3, 8, 8), "images in [-1, 1] with", "  # your conditioning images, in [-1, 1]"),
        (None, (3, 8, 8), "images with", "  # your conditioning images\n"),
        (None, (8,), "data with", "  # your conditioning images\n"),
    ],
)
def test_a_model_card_states_the_range_of_the_data(value_range, shape, units, condition):
    net = ScoreNet(nn.Conv2d(1, 1, 1), NoiseSchedule([1.0, 0.5]), sample_shape=shape, value_range=value_range)
    given = {"conditioning": Condition(channels=1), "license": None, "datasets": None}
    text = model_card("me/net", net.config, 1, **given)
    assert "pypi.org" not in text
    assert f"is the score of\n{units} noise of level sigma." in text and condition in text


def test_a_model_card_counts_parameters_only(monkeypatch):
    monkeypatch.setattr(score, "upload", lambda save, repo_id, card, **options: card)
    net = ScoreNet(nn.BatchNorm2d(3), NoiseSchedule([1.0, 0.5]))  # with 7 values in buffers
    assert "| parameters | 6 |" in net.push_to_hub("me/net")


# -- Names


@pytest.fixture
def here(folder, monkeypatch):
    """Changes to the folder that contains the folder of the network."""
    monkeypatch.chdir(folder.parent)
    return folder.parent


@pytest.mark.slow
def test_a_path_or_a_string_with_a_slash_is_a_folder(here):
    (here / "a").mkdir()
    shutil.copytree("network", "a/b")
    for name in ("./network", str(here / "network"), "a/b", Path("network"), Path("a/b"), "a/../network"):
        assert ScoreNet.from_pretrained(name).config["width"] == 4
    os.chdir("network")
    assert ScoreNet.from_pretrained(".").config["width"] == 4
    os.chdir("../a")
    assert ScoreNet.from_pretrained("..").config["width"] == 4  # like a run, it has a folder "network"
    with pytest.raises(FileNotFoundError, match=r"\. has no config\.json"):
        ScoreNet.from_pretrained(".")


@pytest.mark.slow
def test_a_short_name_is_preferred_to_a_folder_with_a_warning(here):
    shutil.copytree("network", "mnist")
    with pytest.warns(
        UserWarning, match=r"'mnist' loads the network with this name, not the folder; write './mnist' for the folder"
    ) as caught:
        net = ScoreNet.from_pretrained("mnist")
    assert net.sample_shape == (1, 28, 28) and len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ScoreNet.from_pretrained("./mnist").config["width"] == 4
        assert ScoreNet.from_pretrained(Path("mnist")).config["width"] == 4
        Path("palette-mnist").write_text("a file of that name is not a network")
        assert ScoreNet.from_pretrained("palette-mnist").sample_shape == (3, 28, 28)


@pytest.mark.parametrize("name", ["mnist", "./network", Path("network")], ids=str)
def test_a_revision_is_for_repositories(here, name):
    with pytest.raises(ValueError, match=r"revision is for repositories of the Hub, got 'v1' for .*Leave it out"):
        ScoreNet.from_pretrained(name, revision="v1")


def test_a_folder_name_without_a_slash_raises(here):
    with pytest.raises(FileNotFoundError, match=r"'network' is not .*Write './network' for the folder with this name"):
        ScoreNet.from_pretrained("network")


def test_an_unknown_name_gives_an_error_with_the_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = (
        "'mnist', 'mnist-classes', 'cifar10-small', 'celeba-small', 'palette-mnist', 'palette-celeba', 'cifar10', "
        "'celebahq'"
    )
    with pytest.raises(
        FileNotFoundError, match=rf"'imagenet' is not the short name of a network; the short names are {known}\. Write"
    ):
        ScoreNet.from_pretrained("imagenet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./someone/ddpm", r"no folder './someone/ddpm'\. For a repository of the Hub write owner/name"),
        ("/someone/ddpm", r"no folder '/someone/ddpm'"),
        ("a/b/c", r"no folder 'a/b/c'"),
        (Path("someone/ddpm"), r"there is no folder someone/ddpm\."),
    ],
)
def test_folders_that_do_not_exist_raise(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        ScoreNet.from_pretrained(name)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_path_of_a_file_gives_an_error_that_says_what_to_do(kind, here):
    torch.save({}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth is a file, .* If it is a checkpoint, convert it with "):
        ScoreNet.from_pretrained(kind("w.pth"))
    with pytest.raises(ValueError, match=r"is one file of a network\. Pass the folder that holds it, 'network'"):
        ScoreNet.from_pretrained(kind("network/config.json"))
    for name in ("digits.PNG", "digits.npz", "fields.npy", "fields.H5", "fields.nc"):
        Path(name).touch()
        with pytest.raises(ValueError, match=rf"{name} is not a network\. Pass the name of a network, such as 'mnist'"):
            ScoreNet.from_pretrained(kind(name))


@pytest.mark.parametrize("name", [None, 3, b"mnist"])
def test_names_of_another_type_raise(name):
    with pytest.raises(TypeError, match="the name of a network must be a string or a path, got"):
        ScoreNet.from_pretrained(name)


# -- Interrupted saves


class Interruption(BaseException):
    pass


def test_an_interruption_during_the_writing_of_weights_leaves_the_old_network(folder, monkeypatch):
    before = _files(folder)
    monkeypatch.setattr(saving, "save_file", lambda *a, **k: (_ for _ in ()).throw(Interruption))
    with pytest.raises(Interruption):
        _net(seed=1, width=6).save_pretrained(folder)
    assert _files(folder) == before


def test_a_full_disk_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        _net().save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


# -- Saving


def test_weights_files_have_the_usual_permissions(folder):
    assert (folder / WEIGHTS).stat().st_mode == (folder / "config.json").stat().st_mode


def test_a_save_replaces_a_network_and_keeps_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    _net(seed=1, width=6).save_pretrained(folder)
    assert ScoreNet.from_pretrained(folder).config["width"] == 6
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_never_holds_two_networks(tmp_path):
    """Saving removes the files of the old network: those of the other layout, and all weights of diffusers."""
    _unet(precondition="ddpm").save_pretrained(tmp_path)
    assert _files(tmp_path).keys() == {"config.json", "schedule.json", DIFFUSERS_WEIGHTS, *PIPELINE}
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    _unet(seed=1).save_pretrained(tmp_path)
    assert _files(tmp_path).keys() == {"config.json", WEIGHTS}
    _unet(precondition="ddpm").save_pretrained(tmp_path)
    assert _files(tmp_path).keys() == {"config.json", "schedule.json", DIFFUSERS_WEIGHTS, *PIPELINE}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds another network in unet/\. Save into another folder"):
        _net().save_pretrained(tmp_path)


def test_a_network_is_not_saved_into_the_folder_of_a_run(tmp_path):
    """It would replace the configuration of the run."""
    (tmp_path / "config.json").write_text("{}")
    _net().save_pretrained(tmp_path / "network")
    with pytest.raises(FileExistsError, match=r"folder of a training run, whose network is in network/\. Save into"):
        _net().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_a_compiled_network_is_saved_and_a_wrapped_one_is_not(tmp_path):
    """A network that cannot be loaded does not replace another one."""
    net = _net()
    whole = net.backbone
    net.backbone = torch.compile(whole, backend="eager")
    net.save_pretrained(tmp_path)
    expected = _files(tmp_path)
    found = ScoreNet.from_pretrained(tmp_path).backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
    net.backbone = nn.DataParallel(whole)
    with pytest.raises(ValueError, match=r"do not fit its configuration, for example .* without wrappers and"):
        net.save_pretrained(tmp_path)
    net.backbone = whole
    torch.nn.utils.parametrizations.weight_norm(next(m for m in whole.modules() if isinstance(m, nn.Conv2d)))
    with pytest.raises(ValueError, match=r"do not fit its configuration, for example .*original0'. Set net"):
        net.save_pretrained(tmp_path)
    assert _files(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("patch", [1, 2])  # the layout of diffusers, and the package's own
def test_the_names_of_classes_are_saved(patch, tmp_path):
    net = ScoreNet.unet(1, 8, widths=(4, 8), classes=3, null_class=True, patch=patch)
    net.save_pretrained(tmp_path / "numbers")
    assert ScoreNet.from_pretrained(tmp_path / "numbers").class_names is None
    unnamed = net.definition()[0]
    net.class_names = ["cat", "d|o\n", "d|o\n"]
    assert net.definition()[0] == unnamed and net.inference_copy() is not net
    net.save_pretrained(tmp_path / "names")
    loaded = ScoreNet.from_pretrained(tmp_path / "names")
    assert loaded.class_names == classifier_free(loaded, 2).class_names == ("cat", "d|o\n", "d|o\n")
    assert loaded.config == net.config
    card = model_card("me/net", net.config, 1, conditioning=net.conditioning, license="mit", datasets=None)
    assert "\n| condition | 3 classes: 0 cat, 1 d&#124;o , 2 d&#124;o |\n" in card
    net.class_names = None
    assert net.config == ScoreNet.from_pretrained(tmp_path / "numbers").config


def test_names_of_classes_that_do_not_fit():
    net = ScoreNet.unet(1, 8, widths=(4, 8), classes=3)
    for wrong, error, message in (
        (["cat", "dog"], ValueError, "class_names must have 3 names, one per class, got 2"),
        ("cat", TypeError, "class_names must be a sequence of strings or None, got 'cat'"),
        ([0, 1, 2], TypeError, r"class_names must be a sequence of strings or None, got \[0, 1, 2\]"),
    ):
        with pytest.raises(error, match=message):
            net.class_names = wrong
    assert net.class_names is None


def test_describe_classes():
    assert describe_classes(["cat"]) == "1 class: 0 cat" and describe_classes(["0", "1"]) == "2 classes"
    assert describe_classes(["cat", "cow", "dog"], 2) == "3 classes: 0 cat, 1 cow, ..."


def test_one_data_set_on_a_model_card():
    net = _net()
    cards = [
        model_card("me/net", net.config, 1, conditioning=net.conditioning, license="mit", datasets=datasets)
        for datasets in ("cifar10", ["cifar10"])
    ]
    assert cards[0] == cards[1] and "- cifar10" in cards[0]


def test_saving_to_the_path_of_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="saved into a folder"):
        _net().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("notes", torch.zeros(1), TypeError, "the configuration must hold only numbers, strings, lists and dicts"),
        ("width", torch.tensor(4), ValueError, "the configuration: width must be an integer of at least 2"),
        ("sampler_settings", {"sampler": "ode", "sped": 1}, ValueError, "sampler_settings: sped is not an option of"),
        ("value_range", [1, 0], ValueError, r"value_range must be \[low, high\] with low < high, got \[1, 0\]"),
    ],
)
def test_an_invalid_configuration_raises_before_anything_is_written(key, value, error, message, tmp_path):
    net = _net()
    with pytest.raises(error, match=message):
        saving.save(tmp_path / "new", {**net.config, key: value}, net.backbone.state_dict())
    assert not (tmp_path / "new").exists()


# -- Bad input


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_gives_an_error_with_the_existing_files(name, folder):
    (folder / name).unlink()
    (folder / "notes.txt").write_text("")
    with pytest.raises(
        FileNotFoundError, match=f"has no {name}; it holds .*notes.txt.*A network is a folder with config"
    ):
        ScoreNet.from_pretrained(folder)


def test_a_missing_schedule_raises(tmp_path):
    _unet(precondition="ddpm").save_pretrained(tmp_path)
    (tmp_path / "schedule.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no schedule\.json"):
        ScoreNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 6, 500, -10])
def test_truncated_weights_raise(keep, folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors \(\d+ bytes\) is not a complete safetensors file"):
        ScoreNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "config.json: format_version is 99, but this version of scorematch reads 1"),
        ({"format_version": "1"}, "config.json: format_version must be an integer, got '1'"),
        ({"format_version": ...}, "no format_version, so it was not written by save_pretrained"),
        ({"family": "transformer"}, "family must be one of 'ncsn', .* 'ncsnpp', .*'custom', got 'transformer'"),
        ({"family": ["ncsn"]}, r"family must be one of .*, got \['ncsn'\]"),
        ({"width": ...}, "config.json lacks width"),
        ({"schedule": ...}, "config.json lacks schedule"),
        ({"predicts_variance": ...}, "config.json lacks predicts_variance"),
        ({"predicts_variance": 1}, "predicts_variance must be true or false, got 1"),
        ({"width": "4"}, "config.json: width must be an integer of at least 2 and at most 65,536, got '4'"),
        ({"width": True}, "width must be an integer of at least 2 and at most 65,536, got True"),
        ({"width": 1}, "width must be an integer of at least 2 and at most 65,536, got 1"),
        ({"width": 10**40}, "width must be an integer of at least 2 and at most 65,536, got 1000000"),
        ({"depth": "abyss"}, "depth must be one of"),
        ({"precondition": "none"}, "precondition must be one of 'ncsnv2', 'karras', got 'none'"),
        ({"precondition": "ncsn"}, "precondition must be one of 'ncsnv2', 'karras', got 'ncsn'"),
        ({"sample_shape": [1, 0, 3]}, r"sample_shape must be a list .* got \[1, 0, 3\]"),
        ({"sample_shape": 8}, "sample_shape must be a list"),
        ({"value_range": [0.0]}, r"value_range must be a list with exactly 2 entries.* got \[0\.0\]"),
        ({"value_range": [1.0, 0.0]}, r"value_range must be \[low, high\] with low < high"),
        ({"value_range": [0.0, 10**400]}, "value_range must be a list"),
        ({"schedule": {"sigmas": [0.1, 1.0]}}, "config.json: .*desc"),
        ({"schedule": {"sigmas": []}}, "config.json: schedule: sigmas must be a list with at least 1"),
        ({"schedule": {"sigmas": ["1"]}}, "schedule: sigmas must be a list"),
        ({"schedule": {"sigmas": [10**400]}}, "schedule: sigmas must be a list"),
        ({"schedule": {"sigmas": [1.0], "more": 1}}, "schedule has an unknown key, 'more'; the known keys are sigmas"),
        ({"schedule": "elsewhere.json"}, "schedule must be an object, got 'elsewhere.json'"),
        ({"sampler_settings": {"levels": 3}}, "config.json: sampler_settings lacks sampler"),
        ({"sampler_settings": {"sampler": "ode", "levels": 1}}, "sampler_settings: levels must be an integer"),
        ({"sampler_settings": {"sampler": "ode", "snr": 0.1}}, "snr is not an option of the sampler 'ode'"),
        ({"sampler_settings": [3]}, r"sampler_settings must be an object or null, got \[3\]"),
        ({"class_names": "cat"}, "class_names must be a list with at least 1 entries, each a string, or null"),
        ({"class_names": ["cat"]}, "class_names is for class-conditional networks, and this network is not one"),
        ({"width": 5}, r"other sizes: begin_conv.weight \(4, 1, 3, 3\) instead of \(5, 1, 3, 3\), .*\.\.\.$"),
        ({"width": 60_000}, r"other sizes: begin_conv.weight"),
        ({"depth": "deeper"}, r"lacks 46 tensor\(s\) that the network needs: refine5"),
        (
            {"family": "ncsn", "precondition": "ncsn"},
            r"lacks \d+ tensor\(s\) that the network needs: normalizer.embed.weight",
        ),
    ],
)
def test_invalid_configurations_raise(changes, message, folder):
    _edit(folder, **changes)
    with pytest.raises(ValueError, match=message.removesuffix("$")) as caught:
        ScoreNet.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 3}, r"config\.json: .* norm_num_groups, must divide its 8 channels, got 3"),
        ({"down_block_types": ["DownBlock2D"]}, "must have one entry per scale, got 2, 1 and 2"),
        ({"num_class_embeds": 10**30}, "num_class_embeds must be an integer of at least 1 and at most 10,000,000"),
        ({"num_class_embeds": 10**7}, r"lacks 1 tensor\(s\) that the network needs: class_embedding.weight"),
        ({"block_out_channels": [65536] * 2, "norm_num_groups": 32}, "other sizes: conv_in.weight"),
        ({"act_fn": "tanh"}, "config.json: act_fn must be one of 'silu', .*got 'tanh'"),
    ],
)
def test_invalid_unet_configurations_raise(changes, message, tmp_path):
    """Sizes are compared with those of the weights before memory is allocated."""
    _unet().save_pretrained(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        ScoreNet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_schedule_with_another_number_of_levels_than_the_weights_raises(tmp_path):
    ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule.geometric(1, 0.01, 10)).save_pretrained(tmp_path)
    _edit(tmp_path, schedule=NoiseSchedule.geometric(1, 0.01, 12).to_dict())
    with pytest.raises(ValueError, match=r"embed.weight \(10, 6\) instead of \(12, 6\)"):
        ScoreNet.from_pretrained(tmp_path)


def test_unknown_weights_raise(folder):
    path = folder / WEIGHTS
    save_file({**load_file(path), "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"network holds 1 tensor\(s\) that the network lacks: extra"):
        ScoreNet.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_raise(value, folder):
    weights = load_file(folder / WEIGHTS)
    weights["end_conv.weight"][0, 1, 2, 0] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"^the weights in {folder} hold NaN or infinity: end_conv.weight.$"):
        ScoreNet.from_pretrained(folder)
    weights["end_conv.weight"].fill_(3e38)  # finite, although their sum is not
    save_file(weights, folder / WEIGHTS)
    assert ScoreNet.from_pretrained(folder).backbone.end_conv.weight.min() == 3e38


def test_integer_weights_raise(folder):
    path = folder / WEIGHTS
    weights = load_file(path)
    save_file({**weights, "begin_conv.bias": weights["begin_conv.bias"].long()}, path)
    with pytest.raises(
        ValueError, match=r"have the wrong dtype: begin_conv\.bias torch\.int64 instead of torch\.float32"
    ):
        ScoreNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON .*Save or download it again"),
        ("[]", r"must hold a JSON object, got \[\]"),
        ("3", "must hold a JSON object, got 3"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"format_version": 1, "family": ' + "[" * 900 + "]" * 900 + "}", "family must be one of|nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "schedule.json"])
def test_invalid_json_raises(text, message, name, tmp_path):
    _unet(precondition="ddpm").save_pretrained(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    if name == "schedule.json":
        message = message.replace("family must be one of", "schedule lacks sigmas|schedule has an unknown key")
    with pytest.raises(ValueError, match=message) as caught:
        ScoreNet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_backbone_for_a_network_of_a_family_raises(folder):
    with pytest.raises(ValueError, match="holds a network of the family 'ncsnv2': leave out backbone="):
        ScoreNet.from_pretrained(folder, backbone=nn.Identity())
