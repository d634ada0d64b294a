"""The authors' checkpoints, in the containers that their programs write."""

import pickle

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.__main__ import main
from scorematch.convert import convert
from scorematch.sampling import SamplerSettings
from tests.helpers import python

OPTIMIZER = {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}


def _wrapped(weights):
    """As a DataParallel network names them."""
    return {f"module.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture
def files(published, tmp_path):
    """Writes a published network as its authors' program does; returns the fixture, the checkpoint and config.yml."""

    def write(name, *, average=True, legacy=False, buffer=True, edit=lambda text: text):
        fixture = published(name)
        weights = fixture["weights"]
        if name == "ncsn_mnist":
            content = [_wrapped(weights), OPTIMIZER]
        else:
            other = {key: tensor + 0.1 for key, tensor in weights.items()}
            stored = {"sigmas": fixture["sigmas"], **(other if average else weights)}
            if not buffer:
                del stored["sigmas"]
            content = [_wrapped(stored), OPTIMIZER, 5, 300000, weights if average else None]
        path = tmp_path / "checkpoint.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        (tmp_path / "config.yml").write_text(edit(fixture["config_yaml"]))
        return fixture, path, tmp_path / "config.yml"

    return write


def _agrees(net, fixture):
    for case in fixture["cases"]:
        with torch.no_grad():
            found = net(case["x"], fixture["sigmas"][case["labels"]])
        limit = 2e-5 * case["out"].abs().amax((1, 2, 3))
        assert ((found - case["out"]).abs().amax((1, 2, 3)) <= limit).all()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["ncsn_mnist", "ncsnv2", "ncsnv2deeper"])
def test_a_converted_network_gives_the_published_outputs(name, legacy, files, tmp_path):
    fixture, checkpoint, config = files(name, legacy=legacy)
    made = convert(checkpoint, tmp_path / "out", config=config)
    net = ScoreNet.from_pretrained(tmp_path / "out")
    assert net.config == made.config and not made.training
    assert torch.allclose(net.schedule.sigmas.float(), fixture["sigmas"])
    _agrees(net, fixture)


def test_the_configuration_gives_the_size_and_the_published_settings(files, tmp_path):
    _, checkpoint, config = files("ncsnv2")
    net = convert(checkpoint, tmp_path / "out", config=config)
    assert net.sample_shape == (3, 32, 32)
    assert net.sampler_settings == SamplerSettings(levels=232, steps_per_level=5, step_size=6.2e-6, exact_noise=False)
    sampler = AnnealedLangevinSampler(net)
    assert (len(sampler.schedule), sampler.steps_per_level, sampler.step_size) == (232, 5, 6.2e-6)
    assert not sampler.exact_noise


def test_the_average_counts_unless_raw(files, tmp_path):
    fixture, checkpoint, config = files("ncsnv2")
    raw = convert(checkpoint, tmp_path / "raw", config=config, raw=True)
    name = "begin_conv.weight"
    assert torch.equal(raw.backbone.state_dict()[name], fixture["weights"][name] + 0.1)
    fixture, checkpoint, config = files("ncsnv2", average=False)
    _agrees(convert(checkpoint, tmp_path / "none", config=config), fixture)


def test_without_a_configuration(files, tmp_path):
    fixture, checkpoint, _ = files("ncsnv2")
    net = convert(checkpoint, tmp_path / "v2")
    assert net.sample_shape is None and net.sampler_settings is None
    _agrees(net, fixture)
    fixture, checkpoint, _ = files("ncsn_mnist")
    net = convert(checkpoint, tmp_path / "v1")
    assert net.schedule == NoiseSchedule.geometric(1, 0.01, 10)
    _agrees(net, fixture)


@pytest.mark.parametrize("consistent", ["true", "false"])
def test_the_settings_of_adversarial_consistent_score_matching(consistent, files, tmp_path):
    """In consistent sampling nsigma multiplies the number of levels; otherwise it is the number of steps per level."""

    def edit(text):
        text = text.replace("n_steps_each: 5", f"consistent: {consistent}\n  nsigma: 5")
        return text.replace("step_lr: 6.2e-06", "step_lr: 0.0000011")

    _, checkpoint, config = files("ncsnv2", buffer=False, edit=edit)
    sampler = AnnealedLangevinSampler(convert(checkpoint, tmp_path / "out", config=config))
    assert sampler.consistent == (consistent == "true") and sampler.step_size == 1.1e-6
    assert (len(sampler.schedule), sampler.steps_per_level) == ((1156, 1) if sampler.consistent else (232, 5))


@pytest.mark.parametrize("kind", ["linear", "uniform", "cosine"])
def test_schedules_that_are_not_geometric(kind, files, tmp_path):
    edit = {"edit": lambda text: text.replace("sigma_dist: geometric", f"sigma_dist: {kind}")}
    _, checkpoint, config = files("ncsnv2", buffer=False, **edit)
    if kind == "cosine":
        with pytest.raises(
            ValueError, match=r"config\.yml, section model: sigma_dist must be one of 'geometric', .* got 'cosine'"
        ):
            convert(checkpoint, tmp_path / "out", config=config)
    else:
        schedule = convert(checkpoint, tmp_path / "out", config=config).schedule
        torch.testing.assert_close(schedule.sigmas, torch.linspace(50, 0.01, 232, dtype=torch.float64))


def test_adversarial_consistent_score_matching_keeps_its_levels_in_the_configuration(files, tmp_path):
    fixture, checkpoint, config = files("ncsnv2", buffer=False)
    _agrees(convert(checkpoint, tmp_path / "out", config=config), fixture)
    with pytest.raises(ValueError, match=r"does not hold its noise levels\. Pass the config\.yml"):
        convert(checkpoint, tmp_path / "other")


def test_a_network_without_dilation_is_refused(files, tmp_path):
    """Where it does not dilate it pools, in convolutions of other names."""
    _, checkpoint, config = files("ncsnv2", buffer=False)
    content = torch.load(checkpoint, weights_only=True)
    for weights in (content[0], content[-1]):
        for name in [name for name in weights if "res3.0.conv2." in name]:
            weights[name.replace("conv2.", "conv2.conv.")] = weights.pop(name)
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"lacks 2 tensor\(s\) that the network needs: res3\.0\.conv2\.bias"):
        convert(checkpoint, tmp_path / "out", config=config)


def test_levels_that_disagree_get_one_warning(files, tmp_path):
    fixture, checkpoint, config = files("ncsnv2", edit=lambda text: text.replace("sigma_begin: 50", "sigma_begin: 60"))
    with pytest.warns(UserWarning, match="50 -> 0.01.*60 -> 0.01.*those of the checkpoint are used") as record:
        net = convert(checkpoint, tmp_path / "out", config=config)
    assert len(record) == 1 and record[0].filename == __file__
    _agrees(net, fixture)


def test_uniform_levels(files, tmp_path):
    _, checkpoint, config = files(
        "ncsnv2", buffer=False, edit=lambda text: text.replace("sigma_dist: geometric", "sigma_dist: uniform")
    )
    schedule = convert(checkpoint, tmp_path / "out", config=config).schedule
    steps = schedule.sigmas.diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert (schedule.sigma_max, schedule.sigma_min) == (50, 0.01)


@pytest.mark.parametrize("name", ["ncsn_mnist", "ncsnv2"])
def test_rescaled_networks_are_scores_in_image_units(name, files, tmp_path, rng):
    """Trained on y = 2x - 1 without centering: the score of x at sigma is twice that of y at 2 sigma."""
    _, checkpoint, config = files(name)
    plain = convert(checkpoint, tmp_path / "plain", config=config)
    text = config.read_text()
    text = (
        text.replace("rescaled: false", "rescaled: true")
        if "rescaled" in text
        else text.replace("random_flip", "rescaled: true\n  random_flip", 1)
    )
    config.write_text(text)
    net = convert(checkpoint, tmp_path / "rescaled", config=config)
    x, level = torch.rand(2, *net.sample_shape, generator=rng), 3
    sigma_y = plain.schedule[level]
    assert net.schedule[level] == pytest.approx(sigma_y / 2)
    with torch.no_grad():
        # The authors' network without its centering, fed y, is this one with it, fed x.
        raw = plain.backbone(x, torch.tensor([level, level]))
        score_y = raw if name == "ncsn_mnist" else raw / sigma_y
        found = net(x, net.schedule[level])
    assert (found - 2 * score_y).abs().max() <= 1e-4 * found.abs().max()


# -- The command line


def test_command(files, tmp_path, capsys):
    fixture, checkpoint, config = files("ncsnv2")
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--config", str(config)]) == 0
    assert "117,323 parameters, NoiseSchedule(232 levels, 50 -> 0.01)" in capsys.readouterr().out
    _agrees(ScoreNet.from_pretrained(tmp_path / "out"), fixture)
    assert main(["convert", str(tmp_path / "nothing.pth"), str(tmp_path / "out")]) != 0
    error = capsys.readouterr().err
    assert "nothing.pth" in error and error.count("\n") == 1


# -- Bad input


class _Trap:
    def __reduce__(self):
        return print, ("this code ran",)


def test_a_pickle_with_code_is_not_opened(tmp_path, capsys):
    with (tmp_path / "trap.pth").open("wb") as file:
        pickle.dump([{"module.begin_conv.weight": _Trap()}], file, protocol=2)
    with pytest.raises(ValueError, match=r"holds more than tensors \(print\), or is damaged, and was not opened"):
        convert(tmp_path / "trap.pth", tmp_path / "out")
    assert "this code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_configuration_with_other_tags_is_not_read(files, tmp_path, capsys):
    _, checkpoint, config = files("ncsnv2")
    config.write_text("model: !!python/object/apply:builtins.print ['this code ran']\n")
    with pytest.raises(ValueError, match="can be read safely"):
        convert(checkpoint, tmp_path / "out", config=config)
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("logit_transform: false", "logit_transform: true", "logit_transform is not supported.*logits of the pixels"),
        (
            "normalization: InstanceNorm++",
            "normalization: BatchNorm",
            r"section model: normalization must be one of 'InstanceNorm\+\+', got 'BatchNorm'",
        ),
        (
            "nonlinearity: elu",
            "nonlinearity: relu",
            "section model: nonlinearity must be one of 'elu', got 'relu'",
        ),
        ("model:", "network:", "it has no section model"),
        ("sigma_begin: 50", "sigma_begin: many", "section model: sigma_begin must be a number .* got 'many'"),
        ("sigma_begin: 50", "sigma_begin: 0.001", "sigma_begin, sigma_end and num_classes give no noise levels"),
        ("num_classes: 232", "num_classes: 2.5", "section model: num_classes must be an integer .* got 2.5"),
        ("image_size: 32", "image_size: [32]", r"section data: image_size must be an integer .* got \[32\]"),
        ("rescaled: false", "rescaled: maybe", "section data: rescaled must be true or false, got"),
        ("step_lr: 6.2e-06", "step_lr: .inf", "section sampling: step_lr must be a number"),
    ],
)
def test_options_that_are_not_supported(old, new, message, files, tmp_path):
    _, checkpoint, config = files("ncsnv2", edit=lambda text: text.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        convert(checkpoint, tmp_path / "out", config=config)
    assert str(config) in str(caught.value) and not (tmp_path / "out").exists()


def test_numbers_that_yaml_reads_as_strings(files, tmp_path):
    """1e-6, without a point, is a string in YAML 1.1."""
    _, checkpoint, config = files("ncsnv2", edit=lambda text: text.replace("step_lr: 6.2e-06", "step_lr: 1e-6"))
    assert convert(checkpoint, tmp_path / "out", config=config).sampler_settings.step_size == 1e-6


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(1)},
        [torch.zeros(1)],
        [],
        3,
        {1: torch.zeros(1)},
        {"net.begin_conv.weight": torch.zeros(1)},
    ],
)
def test_files_that_are_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"is not a checkpoint of NCSN or NCSNv2: expected a mapping that holds begin_conv\.weight"
    ):
        convert(tmp_path / "other.pth", tmp_path / "out")


def test_damaged_files(files, tmp_path):
    _, checkpoint, config = files("ncsnv2")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"is not a complete pth file|is damaged"):
        convert(checkpoint, tmp_path / "out", config=config)
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nothing.pth", tmp_path / "out")


@pytest.mark.parametrize("value", [3, torch.zeros(1), torch.zeros(2, 2, 3, 3).to_sparse()])
def test_a_checkpoint_that_holds_no_weights(value, tmp_path):
    torch.save({"begin_conv.weight": value}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of a network"):
        convert(tmp_path / "other.pth", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer.embed.weight": torch.zeros(())}, "does not hold the weights of a network"),
        ({"sigmas": torch.zeros(3)}, r"odd\.pth: the weight sigmas holds no noise levels"),
        ({"sigmas": torch.zeros(3, 3)}, r"odd\.pth: the weight sigmas holds no noise levels"),
        ({"begin_conv.weight": torch.zeros(1, 3, 3, 3)}, r"odd\.pth: width must be an integer of at least 2"),
        ({"begin_conv.weight": torch.zeros(8, 0, 3, 3)}, r"odd\.pth: channels must be an integer of at least 1"),
    ],
)
def test_weights_from_which_no_network_follows(changes, message, published, tmp_path):
    weights = {**published("ncsnv2")["weights"], "sigmas": published("ncsnv2")["sigmas"], **changes}
    torch.save([weights], tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "odd.pth", tmp_path / "out")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_one_sentence(zipped, published, tmp_path):
    """Damage shows as an error of another kind at every place."""
    torch.save([published("ncsnv2")["weights"]], tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in [*range(1, 6000, 97), len(whole) // 2]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a complete pth file|is damaged") as caught:
            convert(tmp_path / "cut.pth", tmp_path / "out")
        assert "weights_only" not in str(caught.value)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the weights"):
        convert(tmp_path / "a.pth", tmp_path / "out")


def test_weights_of_another_width_are_named(published, tmp_path):
    weights = {**published("ncsnv2")["weights"], "sigmas": published("ncsnv2")["sigmas"]}
    weights["end_conv.bias"] = torch.zeros(7)
    torch.save([weights], tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"belong to a network of other sizes: end_conv\.bias \(7,\) instead of"):
        convert(tmp_path / "odd.pth", tmp_path / "out")


def test_weights_that_were_wrapped_twice(published, tmp_path):
    weights = published("ncsnv2")["weights"]
    wrapped = {f"module.module.{name}": tensor for name, tensor in weights.items()}
    torch.save([{**wrapped, "module.module.sigmas": published("ncsnv2")["sigmas"]}], tmp_path / "twice.pth")
    net = convert(tmp_path / "twice.pth", tmp_path / "out")
    assert torch.equal(net.backbone.state_dict()["end_conv.bias"], weights["end_conv.bias"])


def test_a_configuration_in_another_encoding(files, tmp_path):
    _, checkpoint, config = files("ncsnv2")
    config.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ValueError, match="can be read safely"):
        convert(checkpoint, tmp_path / "out", config=config)


def test_weights_of_another_kind_are_named(files, published, tmp_path):
    weights = published("ncsnv2")["weights"]
    sigmas = published("ncsnv2")["sigmas"]
    torch.save([{**weights, "sigmas": sigmas, "res1.0.conv1.weight_u": torch.zeros(8)}], tmp_path / "spectral.pth")
    with pytest.raises(ValueError, match=r"holds 1 tensor\(s\) that the network lacks: res1\.0\.conv1\.weight_u"):
        convert(tmp_path / "spectral.pth", tmp_path / "out")


def test_tables_of_other_levels_than_the_configuration(files, tmp_path):
    _, checkpoint, config = files("ncsn_mnist", edit=lambda text: text.replace("num_classes: 10", "num_classes: 12"))
    with pytest.raises(ValueError, match=r"have 10 noise levels, but .*config\.yml has 12\. Pass"):
        convert(checkpoint, tmp_path / "out", config=config)


def test_without_pyyaml_the_error_names_the_extra(files, tmp_path):
    _, checkpoint, config = files("ncsnv2")
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from scorematch.convert import convert\n"
        f"convert({str(checkpoint)!r}, {str(tmp_path / 'out')!r}, config={str(config)!r})"
    )
    done = python("-c", code, check=False)
    assert 'pip install "scorematch[convert]"' in done.stderr
