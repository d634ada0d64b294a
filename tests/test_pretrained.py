import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scorematch import NoiseSchedule, ScoreNet, cards, pretrained


def _net(seed=0, **arguments):
    torch.manual_seed(seed)
    return ScoreNet.ncsnv2(**{"channels": 1, "image_size": (8, 12), "width": 4, **arguments})


@pytest.fixture
def folder(tmp_path):
    _net().save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def _edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# -- Laws


@pytest.mark.parametrize(
    "make",
    [
        lambda: _net(schedule=NoiseSchedule([3.0, 1 / 3, 0.01])),
        lambda: _net(depth="deepest", image_size=16, precondition="karras"),
        lambda: ScoreNet.ncsn(2, 8, width=4, schedule=NoiseSchedule.geometric(1, 0.01, 7)),
        lambda: ScoreNet.ncsn(3, 8, width=4, depth="deeper"),
    ],
)
def test_save_then_load_is_equal(make, tmp_path, rng):
    torch.manual_seed(0)
    net = make()
    net.sampler_settings = {"levels": 3, "steps_per_level": 2, "step_size": 1e-5, "exact_noise": True}
    net.save_pretrained(tmp_path / "a" / "b")
    loaded = ScoreNet.from_pretrained(tmp_path / "a" / "b")
    assert loaded.config == net.config
    assert loaded.schedule == net.schedule and loaded.sample_shape == net.sample_shape
    assert not loaded.training
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in net.state_dict().items())
    x = torch.rand(2, *net.sample_shape, generator=rng)
    assert torch.equal(loaded(x, 0.1), net(x, 0.1))
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_the_files_are_plain(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1 and config["family"] == "ncsnv2"
    weights = load_file(folder / "model.safetensors")
    assert (
        "begin_conv.weight" in weights and "sigmas" not in weights
    )  # the published names; the ladder is configuration


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_stored_precision_is_loaded_as_float32(dtype, tmp_path):
    net = _net().to(dtype)
    net.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["begin_conv.weight"].dtype == dtype
    loaded = ScoreNet.from_pretrained(tmp_path)
    for stored, tensor in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored.float())


def test_a_network_of_the_users_own(tmp_path):
    def make():
        return nn.Conv2d(1, 1, 3, padding=1)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = make()
            self.tied = self.conv  # shared weights are written once each and stay equal
            self.register_buffer("steps", torch.tensor(7))

        def forward(self, x, c_noise):
            return self.conv(x) + c_noise.view(-1, 1, 1, 1)

    net = ScoreNet(Own(), NoiseSchedule([1.0, 0.1]), sample_shape=(1, 5, 5), value_range=None)
    net.save_pretrained(tmp_path)
    loaded = ScoreNet.from_pretrained(tmp_path, backbone=Own())
    x = torch.rand(2, 1, 5, 5)
    assert torch.equal(loaded(x, 0.3), net(x, 0.3))
    assert loaded.value_range is None and loaded.backbone.steps == 7
    with pytest.raises(ValueError, match="pass its module as backbone="):
        ScoreNet.from_pretrained(tmp_path)


def test_channels_last_weights_are_saved_like_any(tmp_path):
    net = _net().to(memory_format=torch.channels_last)
    net.save_pretrained(tmp_path)
    loaded = ScoreNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))


def test_shipped_networks_load_by_name_and_are_small():
    shipped = [card for card in cards.CARDS if card.repository is None]
    assert [card.name for card in shipped] == ["mnist", "palette-mnist"]
    for card in shipped:
        net = ScoreNet.from_pretrained(card.name)
        assert (len(net.schedule), net.sample_shape) == (card.levels, card.shape)
        assert card.parameters == sum(p.numel() for p in net.parameters())
        assert (round(net.schedule.sigma_max, 1), net.schedule.sigma_min) == card.sigmas
        folder = pretrained.locate(card.name)[0]
        (weights,) = folder.glob("*.safetensors")
        assert weights.stat().st_size <= (3_000_000 if card.name == "palette-mnist" else 6_000_000)
        assert net.sampler_settings is not None
        assert (folder / "README.md").is_file()  # the card


# -- A save that is interrupted leaves the old folder


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("at", ["weights", "first move", "second move"])
def test_an_interrupted_save_leaves_the_old_network(at, folder, monkeypatch):
    old = ScoreNet.from_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    moves = []
    move = os.replace

    def interrupted(*arguments, **keywords):
        raise Interruption

    def replace(source, target):
        moves.append(target)
        if len(moves) == (1 if at == "first move" else 2):
            raise Interruption
        move(source, target)

    if at == "weights":
        monkeypatch.setattr(pretrained, "save_file", interrupted)
    else:
        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Interruption):
        _net(seed=1, width=6).save_pretrained(folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert ScoreNet.from_pretrained(folder).config == old.config


def test_a_first_save_interrupted_between_its_files_leaves_none(tmp_path, monkeypatch):
    move = os.replace

    def replace(source, target):
        if str(target).endswith("config.json"):
            raise Interruption
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Interruption):
        _net().save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_saving_where_there_are_no_hard_links(folder, monkeypatch):
    def link(source, target):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", link)
    _net(seed=1, width=6).save_pretrained(folder)
    assert ScoreNet.from_pretrained(folder).config["width"] == 6


def test_saved_files_can_be_read_by_whom_the_folder_allows(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_an_interrupted_first_save_leaves_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        _net().save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_save_replaces_a_network_and_keeps_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    _net(seed=1, width=6).save_pretrained(folder)
    assert ScoreNet.from_pretrained(folder).config["width"] == 6
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="saved into a folder"):
        _net().save_pretrained(tmp_path / "file")


def test_settings_that_are_not_plain_are_refused_before_anything_is_written(tmp_path):
    net = _net()
    net.sampler_settings = {"step_size": torch.tensor(1.0)}
    with pytest.raises(TypeError, match="plain numbers, strings"):
        net.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- Bad input


def test_unknown_names_list_the_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = r"\('mnist', 'palette-mnist', 'cifar10', 'celebahq'\)"
    with pytest.raises(FileNotFoundError, match=rf"'imagenet' is neither .*{names}, nor a folder, nor"):
        ScoreNet.from_pretrained("imagenet")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named_with_those_that_are_there(name, folder):
    (folder / name).unlink()
    (folder / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=f"has no {name}; it holds .*notes.txt"):
        ScoreNet.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 6, 500, -10])
def test_truncated_weights(keep, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors \(\d+ bytes\) is not a complete safetensors file"):
        ScoreNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format_version 99, this version of scorematch reads 1"),
        ({"format_version": ...}, "no format_version"),
        ({"family": "transformer"}, "the family 'transformer'; known are 'ncsn', 'ncsnv2', 'unet', 'custom'"),
        ({"width": ...}, "lacks width"),
        ({"schedule": ...}, "lacks schedule"),
        ({"width": "4"}, "width must be int, got '4'"),
        ({"depth": "abyss"}, "depth must be one of"),
        ({"precondition": "none"}, "precondition must be one of"),
        ({"schedule": {"sigmas": [0.1, 1.0]}}, "descend strictly"),
        ({"width": 5}, r"other sizes: begin_conv.weight \(4, 1, 3, 3\) instead of \(5, 1, 3, 3\), .*\.\.\.$"),
        ({"depth": "deeper"}, r"lacks 46 tensor\(s\) that the network needs: refine5"),
        (
            {"family": "ncsn", "precondition": "ncsn"},
            r"lacks \d+ tensor\(s\) that the network needs: normalizer.embed.weight",
        ),
    ],
)
def test_configurations_that_are_none(changes, message, folder):
    _edit(folder, **changes)
    with pytest.raises(ValueError, match=message.removesuffix("$")):
        ScoreNet.from_pretrained(folder)


def test_a_table_of_other_rows_than_the_ladder(tmp_path):
    ScoreNet.ncsn(1, 8, width=2, schedule=NoiseSchedule.geometric(1, 0.01, 10)).save_pretrained(tmp_path)
    _edit(tmp_path, schedule=NoiseSchedule.geometric(1, 0.01, 12).to_dict())
    with pytest.raises(ValueError, match=r"embed.weight \(10, 6\) instead of \(12, 6\)"):
        ScoreNet.from_pretrained(tmp_path)


def test_weights_with_more_than_the_network(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds 1 tensor\(s\) that the network lacks: extra"):
        ScoreNet.from_pretrained(folder)


def test_broken_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ScoreNet.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no format_version"):
        ScoreNet.from_pretrained(folder)


def test_a_backbone_for_a_family_that_needs_none(folder):
    with pytest.raises(ValueError, match="needs no backbone="):
        ScoreNet.from_pretrained(folder, backbone=nn.Identity())


def test_a_copied_folder_is_a_network(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert ScoreNet.from_pretrained(str(tmp_path / "copy")).config == ScoreNet.from_pretrained(folder).config
