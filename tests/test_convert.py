"""Conversion of the authors' checkpoints, in the file formats that their programs write."""

import pickle
import sys

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.sampling import SamplerSettings, recommended_sampler
from tests.helpers import convert

OPTIMIZER = {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}


def _wrapped(weights):
    """The weights with the names of a DataParallel network."""
    return {f"module.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture
def files(published, tmp_path):
    """A function that writes a published network in its authors' format; returns fixture, checkpoint and config.yml."""

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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "legacy"), [("ncsn_mnist", True), ("ncsnv2", False), ("ncsnv2deeper", False)])
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


@pytest.mark.slow
@pytest.mark.parametrize("rescaled", [False, True])
def test_ncsn_gets_the_sampler_of_its_authors_program(rescaled, files, tmp_path):
    """100 steps at each of the 10 levels with the step size 2e-5, and no final denoising."""
    edit = {"edit": lambda text: text.replace("  channels: 1", "  channels: 1\n  rescaled: true")} if rescaled else {}
    _, checkpoint, config = files("ncsn_mnist", **edit)
    net = ScoreNet.from_pretrained(convert(checkpoint, tmp_path / "out", config=config) and tmp_path / "out")
    size = 5e-6 if rescaled else 2e-5
    published = {"steps_per_level": 100, "step_size": size, "exact_noise": False, "denoise": False}
    assert net.sampler_settings == SamplerSettings(levels=10, **published)
    for sampler in (recommended_sampler(net), AnnealedLangevinSampler(net), recommended_sampler(net.inference_copy())):
        assert sampler.schedule == net.schedule and len(sampler) == 1000
        assert {name: getattr(sampler, name) for name in published} == published
        assert not sampler.consistent
    assert len(recommended_sampler(net, denoise=True)) == 1001


def test_the_step_size_of_ncsn_is_not_stored_for_levels_at_which_it_diverges(files, tmp_path):
    _, checkpoint, config = files("ncsn_mnist")
    config.write_text("model:\n  sigma_begin: 1\n  sigma_end: 0.001\n  num_classes: 10\n")
    assert convert(checkpoint, tmp_path / "out", config=config).sampler_settings is None


def test_whether_ncsnv2_denoises_is_read(files, tmp_path):
    def edit(text):
        return text.replace("step_lr: 6.2e-06", "step_lr: 6.2e-06\n  denoise: false")

    _, checkpoint, config = files("ncsnv2", edit=edit)
    net = convert(checkpoint, tmp_path / "out", config=config)
    assert net.sampler_settings.options["denoise"] is False and len(recommended_sampler(net)) == 1160


@pytest.mark.slow
def test_the_averaged_weights_are_converted_unless_raw(files, tmp_path):
    fixture, checkpoint, config = files("ncsnv2")
    raw = convert(checkpoint, tmp_path / "raw", config=config, raw=True)
    name = "begin_conv.weight"
    assert torch.equal(raw.backbone.state_dict()[name], fixture["weights"][name] + 0.1)
    fixture, checkpoint, config = files("ncsnv2", average=False)
    _agrees(convert(checkpoint, tmp_path / "none", config=config), fixture)


@pytest.mark.slow
def test_conversion_without_a_configuration(files, tmp_path):
    fixture, checkpoint, _ = files("ncsnv2")
    net = convert(checkpoint, tmp_path / "v2")
    published = SamplerSettings(levels=232, steps_per_level=5, step_size=6.2e-6, exact_noise=False)
    assert net.sample_shape is None and net.sampler_settings == published
    _agrees(net, fixture)
    fixture, checkpoint, _ = files("ncsn_mnist")
    net = convert(checkpoint, tmp_path / "v1")
    assert net.schedule == NoiseSchedule.geometric(1, 0.01, 10)
    _agrees(net, fixture)


@pytest.mark.parametrize("consistent", ["true", "false"])
def test_settings_of_adversarial_consistent_score_matching(consistent, files, tmp_path):
    """In consistent sampling nsigma multiplies the number of levels; otherwise it is the number of steps per level."""

    def edit(text):
        text = text.replace("n_steps_each: 5", f"consistent: {consistent}\n  nsigma: 5")
        return text.replace("step_lr: 6.2e-06", "step_lr: 0.0000011")

    _, checkpoint, config = files("ncsnv2", buffer=False, edit=edit)
    sampler = AnnealedLangevinSampler(convert(checkpoint, tmp_path / "out", config=config))
    assert sampler.consistent == (consistent == "true") and sampler.step_size == 1.1e-6
    assert (len(sampler.schedule), sampler.steps_per_level) == ((1156, 1) if sampler.consistent else (232, 5))


@pytest.mark.parametrize("kind", ["linear", "uniform", "cosine"])
def test_linear_schedules_are_converted_and_unknown_ones_raise(kind, files, tmp_path):
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


def test_noise_levels_come_from_the_configuration_if_weights_have_none(files, tmp_path):
    fixture, checkpoint, config = files("ncsnv2", buffer=False)
    _agrees(convert(checkpoint, tmp_path / "out", config=config), fixture)
    with pytest.raises(ValueError, match=r"does not hold its noise levels\. Pass the config\.yml"):
        convert(checkpoint, tmp_path / "other")


def test_a_network_without_dilation_raises(files, tmp_path):
    """It pools instead of dilating, and its convolutions have other names."""
    _, checkpoint, config = files("ncsnv2", buffer=False)
    content = torch.load(checkpoint, weights_only=True)
    for weights in (content[0], content[-1]):
        for name in [name for name in weights if "res3.0.conv2." in name]:
            weights[name.replace("conv2.", "conv2.conv.")] = weights.pop(name)
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"lacks 2 tensor\(s\) that the network needs: res3\.0\.conv2\.bias"):
        convert(checkpoint, tmp_path / "out", config=config)


def test_levels_that_differ_from_the_configuration_give_one_warning(files, tmp_path):
    fixture, checkpoint, config = files("ncsnv2", edit=lambda text: text.replace("sigma_begin: 50", "sigma_begin: 60"))
    with pytest.warns(UserWarning, match="50 -> 0.01.*60 -> 0.01.*the levels in the checkpoint are used") as record:
        net = ScoreNet.from_checkpoint(checkpoint, config=config)
    assert len(record) == 1 and record[0].filename == __file__
    _agrees(net, fixture)


def test_uniform_levels_are_evenly_spaced(files, tmp_path):
    _, checkpoint, config = files(
        "ncsnv2", buffer=False, edit=lambda text: text.replace("sigma_dist: geometric", "sigma_dist: uniform")
    )
    schedule = convert(checkpoint, tmp_path / "out", config=config).schedule
    steps = schedule.sigmas.diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert (schedule.sigma_max, schedule.sigma_min) == (50, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsn_mnist", "ncsnv2"])
def test_rescaled_networks_are_scores_of_images_in_0_1(name, files, tmp_path, rng):
    """Trained on y = 2x - 1 without centering, the score of x at sigma is twice the score of y at 2 sigma."""
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
        # The authors' network without centering gives for y what this backbone with centering gives for x.
        raw = plain.backbone(x, torch.tensor([level, level]))
        score_y = raw if name == "ncsn_mnist" else raw / sigma_y
        found = net(x, net.schedule[level])
    assert (found - 2 * score_y).abs().max() <= 1e-4 * found.abs().max()


# -- The command line


def test_paths_may_begin_with_a_tilde(files, tmp_path, monkeypatch):
    fixture, checkpoint, config = files("ncsnv2")
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(checkpoint.parent))
    _agrees(convert(f"~/{checkpoint.name}", "~/out", config=f"~/{config.name}"), fixture)
    assert (checkpoint.parent / "out" / "config.json").is_file()


def test_the_command_convert_writes_a_network(files, tmp_path, capsys):
    fixture, checkpoint, config = files("ncsnv2")
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--config", str(config)]) == 0
    assert "117,323 parameters, NoiseSchedule(232 levels, 50 -> 0.01)" in capsys.readouterr().out
    _agrees(ScoreNet.from_pretrained(tmp_path / "out"), fixture)
    assert main(["convert", str(tmp_path / "nothing.pth"), str(tmp_path / "other")]) != 0
    error = capsys.readouterr().err
    assert "nothing.pth" in error and error.count("\n") == 1


# -- Bad input


class _Trap:
    def __reduce__(self):
        return print, ("this code ran",)


def test_a_pickle_with_code_is_not_loaded(tmp_path, capsys):
    with (tmp_path / "trap.pth").open("wb") as file:
        pickle.dump([{"module.begin_conv.weight": _Trap()}], file, protocol=2)
    with pytest.raises(
        ValueError, match=r"refers to '__builtin__\.print', which weights do not need; it was not loaded"
    ):
        convert(tmp_path / "trap.pth", tmp_path / "out")
    assert "this code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_configuration_with_unknown_yaml_tags_raises(files, tmp_path, capsys):
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
        ("nonlinearity: elu", "nonlinearity: relu", "section model: nonlinearity must be one of 'elu', got 'relu'"),
        ("model:", "network:", "it has no section model"),
        ("sigma_begin: 50", "sigma_begin: many", "section model: sigma_begin must be a number .* got 'many'"),
        (
            "sigma_begin: 50",
            "sigma_begin: 0.001",
            "sigma_begin, sigma_end and num_classes do not define valid noise levels",
        ),
        ("num_classes: 232", "num_classes: 2.5", "section model: num_classes must be an integer .* got 2.5"),
        ("image_size: 32", "image_size: [32]", r"section data: image_size must be an integer .* got \[32\]"),
        ("rescaled: false", "rescaled: maybe", "section data: rescaled must be true or false, got"),
        ("step_lr: 6.2e-06", "step_lr: .inf", "section sampling: step_lr must be a number"),
    ],
)
def test_unsupported_options_raise(old, new, message, files, tmp_path):
    _, checkpoint, config = files("ncsnv2", edit=lambda text: text.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        convert(checkpoint, tmp_path / "out", config=config)
    assert str(config) in str(caught.value) and not (tmp_path / "out").exists()


def test_numbers_that_yaml_reads_as_strings_are_converted(files, tmp_path):
    """1e-6, without a decimal point, is a string in YAML 1.1."""
    _, checkpoint, config = files("ncsnv2", edit=lambda text: text.replace("step_lr: 6.2e-06", "step_lr: 1e-6"))
    assert convert(checkpoint, tmp_path / "out", config=config).sampler_settings.options["step_size"] == 1e-6


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"weight": torch.zeros(1)}, r"a mapping with the keys \['weight'\]"),
        ([torch.zeros(1)], "a list"),
        ([], "a list"),
        (
            [{"conv.weight": torch.zeros(1), "bias": 1}, {}],
            r"a list whose first item has the keys \['conv.weight', 'bi",
        ),
        (({"a": torch.zeros(1)},), r"a tuple whose first item has the keys \['a'\]"),
        (3, "a number"),
        ({1: torch.zeros(1)}, r"a mapping with the keys \[1\]"),
        ({"net.begin_conv.weight": torch.zeros(1)}, r"a mapping with the keys \['net\.begin_conv\.weight'\]"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.5.0"}, "a PyTorch Lightning checkpoint"),
        ({"state_dict": {}, "epoch": 3}, r"a mapping with the keys \['state_dict', 'epoch'\]"),
        (
            {"conv_norm_out.weight": torch.zeros(1)},
            r"the weights of a U-Net of diffusers \(load their folder with Score",
        ),
        # The names of Ho et al.'s network in other projects.
        ({"temb.dense.0.bias": torch.zeros(1), "conv_in.weight": torch.zeros(1)}, r"a mapping with the keys \['temb"),
        ({"G_ema": {}, "G": {}}, "a StyleGAN pickle"),
    ],
)
def test_files_that_are_not_checkpoints_raise(content, kind, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    known = "NCSN, NCSNv2, .*, improved-diffusion or guided-diffusion"
    with pytest.raises(ValueError, match=rf"other.pth is {kind}.*, not a checkpoint of {known}\.$"):
        convert(tmp_path / "other.pth", tmp_path / "out")


def test_damaged_files_raise(files, tmp_path):
    _, checkpoint, config = files("ncsnv2")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"is not a complete pth file|is damaged"):
        convert(checkpoint, tmp_path / "out", config=config)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        convert(tmp_path / "nothing.pth", tmp_path / "out")


@pytest.mark.parametrize("value", [3, torch.zeros(1)])
def test_a_checkpoint_without_weights_raises(value, tmp_path):
    torch.save({"begin_conv.weight": value}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of a network"):
        convert(tmp_path / "other.pth", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer.embed.weight": torch.zeros(())}, "does not hold the weights of a network"),
        ({"sigmas": torch.zeros(3)}, r"odd\.pth: the weight sigmas does not hold valid noise levels"),
        ({"sigmas": torch.zeros(3, 3)}, r"odd\.pth: the weight sigmas does not hold valid noise levels"),
        ({"begin_conv.weight": torch.zeros(1, 3, 3, 3)}, r"odd\.pth: width must be an integer of at least 2"),
        ({"begin_conv.weight": torch.zeros(8, 0, 3, 3)}, r"odd\.pth: channels must be an integer of at least 1"),
    ],
)
def test_weights_that_do_not_describe_a_network_raise(changes, message, published, tmp_path):
    weights = {**published("ncsnv2")["weights"], "sigmas": published("ncsnv2")["sigmas"], **changes}
    torch.save([weights], tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "odd.pth", tmp_path / "out")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_truncated_at_any_place_gives_one_clear_error(zipped, published, tmp_path):
    """Damage shows as an error of another kind at every place."""
    torch.save([published("ncsnv2")["weights"]], tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in [*range(1, 6000, 97), len(whole) // 2]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a complete pth file|is damaged") as caught:
            convert(tmp_path / "cut.pth", tmp_path / "out")
        assert "weights_only" not in str(caught.value)


def test_a_git_lfs_pointer_gives_a_clear_error(tmp_path):
    (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the weights"):
        convert(tmp_path / "a.pth", tmp_path / "out")


def test_weights_of_another_size_raise(published, tmp_path):
    weights = {**published("ncsnv2")["weights"], "sigmas": published("ncsnv2")["sigmas"]}
    weights["end_conv.bias"] = torch.zeros(7)
    torch.save([weights], tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"belong to a network of other sizes: end_conv\.bias \(7,\) instead of"):
        convert(tmp_path / "odd.pth", tmp_path / "out")


def test_weights_of_a_network_that_was_wrapped_twice(published, tmp_path):
    weights = published("ncsnv2")["weights"]
    wrapped = {f"module.module.{name}": tensor for name, tensor in weights.items()}
    torch.save([{**wrapped, "module.module.sigmas": published("ncsnv2")["sigmas"]}], tmp_path / "twice.pth")
    net = convert(tmp_path / "twice.pth", tmp_path / "out")
    assert torch.equal(net.backbone.state_dict()["end_conv.bias"], weights["end_conv.bias"])


def test_a_configuration_that_is_not_utf_8_raises(files, tmp_path):
    _, checkpoint, config = files("ncsnv2")
    config.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ValueError, match="can be read safely"):
        convert(checkpoint, tmp_path / "out", config=config)


def test_unknown_weights_raise(files, published, tmp_path):
    weights = published("ncsnv2")["weights"]
    sigmas = published("ncsnv2")["sigmas"]
    torch.save([{**weights, "sigmas": sigmas, "res1.0.conv1.weight_u": torch.zeros(8)}], tmp_path / "spectral.pth")
    with pytest.raises(ValueError, match=r"holds 1 tensor\(s\) that the network lacks: res1\.0\.conv1\.weight_u"):
        convert(tmp_path / "spectral.pth", tmp_path / "out")


def test_another_number_of_levels_than_in_the_configuration_raises(files, tmp_path):
    _, checkpoint, config = files("ncsn_mnist", edit=lambda text: text.replace("num_classes: 10", "num_classes: 12"))
    with pytest.raises(ValueError, match=r"have 10 noise levels, but .*config\.yml has 12\. Pass"):
        convert(checkpoint, tmp_path / "out", config=config)


def test_without_pyyaml_the_error_names_the_extra(files, tmp_path, monkeypatch):
    _, checkpoint, config = files("ncsnv2")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'pip install "scorematch\[convert\]"'):
        convert(checkpoint, tmp_path / "out", config=config)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, and a checkpoint is one file"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
