"""U-Nets of diffusers, from folders and from memory: configurations, schedules, old names, damaged files."""

import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.core.conditions import Condition
from scorematch.nets import FAMILIES
from scorematch.pretrained.diffusers import current_names
from scorematch.sampling import SamplerSettings, recommended_sampler
from tests.conftest import FIXTURES
from tests.networks import built

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        CogVideoXDDIMScheduler,
        DDIMScheduler,
        DDPMPipeline,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        ScoreSdeVePipeline,
        ScoreSdeVeScheduler,
        UNet2DModel,
    )

DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
}
VE = {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 348, "num_train_timesteps": 2000}
WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHER_BETAS = ("scaled_linear", "sigmoid")


def _theirs(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**config, **changes}).eval()


def _save(net, folder, scheduler, *, pipeline=False):
    home = folder / "unet" if pipeline else folder
    net.save_pretrained(home)
    beside = folder / "scheduler" if pipeline else folder
    beside.mkdir(exist_ok=True)
    (beside / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def _relative(found, expected):
    return (found - expected).norm() / expected.norm()


def _noise(out, x_t, a, prediction):
    """The noise that follows from an output of a kind of prediction."""
    return {
        "epsilon": out,
        "v_prediction": a.sqrt() * out + (1 - a).sqrt() * x_t,
        "sample": (x_t - a.sqrt() * out) / (1 - a).sqrt(),
    }[prediction]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a network, which no test changes."""
    return _save(_theirs(), tmp_path_factory.mktemp("original") / "ddpm", DDPM)


@pytest.fixture
def ddpm(original, tmp_path):
    """A copy of the folder, which tests may change."""
    return shutil.copytree(original, tmp_path / "ddpm")


# -- Scores from networks of diffusers


@pytest.mark.parametrize(
    ("prediction", "pipeline"), [("epsilon", True), ("epsilon", False), ("v_prediction", False), ("sample", False)]
)
def test_a_ddpm_is_a_score_of_images_in_0_1(prediction, pipeline, tmp_path, rng):
    theirs = _theirs()
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path, {**DDPM, "prediction_type": prediction}, pipeline=pipeline))
    assert net.sample_shape == (3, 8, 8) and net.value_range == (0, 1) and not net.training
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    for t in (0, 10, 412, 999):
        a = alpha_bar[t]
        sigma = 0.5 * (1 / a - 1).sqrt()
        x = torch.rand(2, 3, 8, 8, generator=rng, dtype=torch.float64) + sigma * torch.randn(2, 3, 8, 8, generator=rng)
        x_t = a.sqrt() * (2 * x - 1)
        with torch.no_grad():
            out = theirs(x_t.float(), t).sample.double()
            found = net(x.float(), float(sigma))
        assert _relative(found, -_noise(out, x_t, a, prediction) / sigma) < 1e-4


@pytest.mark.parametrize("name", ["ddpm-cifar10-tiny", "ddpm-pipeline-tiny"])
def test_a_ddpm_gives_the_recorded_outputs(name):
    """Recorded with diffusers 0.42.1 for images in [-1, 1], where sigma is twice as large and the score half."""
    net = ScoreNet.from_pretrained(FIXTURES / "hub" / name)
    reference = torch.load(FIXTURES / "hub" / name / "reference.pt", weights_only=True)
    with torch.no_grad():
        score = net((reference["x_ve"] + 1) / 2, reference["sigmas"] / 2)
    assert _relative(score, 2 * reference["score_ve"]) < 1e-5


def test_an_ncsn_of_diffusers_gives_the_recorded_outputs():
    """Recorded with UNet2DModelForNCSN of diffusers-ncsn, whose time step is the index of the noise level."""
    folder = FIXTURES / "hub" / "ncsn-mnist-tiny"
    net = ScoreNet.from_pretrained(folder)
    reference = torch.load(folder / "reference.pt", weights_only=True)
    torch.testing.assert_close(net.schedule.sigmas[reference["timesteps"]].float(), reference["sigmas"])
    with torch.no_grad():
        score = net(reference["x"], reference["sigmas"])
    assert _relative(score, reference["out"]) < 1e-5


@pytest.mark.parametrize(("changes", "steps", "size"), [({}, 100, 1e-5), ({"sampling_eps": 2e-5}, 100, 2e-5)])
def test_the_sampler_of_an_ncsn_of_diffusers_is_that_of_its_scheduler(changes, steps, size, tmp_path):
    folder = shutil.copytree(FIXTURES / "hub" / "ncsn-mnist-tiny", tmp_path / "ncsn")
    path = next(folder.rglob("scheduler_config.json"))
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    net = ScoreNet.from_pretrained(folder)
    published = {"steps_per_level": steps, "step_size": size, "exact_noise": False, "denoise": False}
    assert net.sampler_settings == SamplerSettings(levels=10, **published)
    sampler = recommended_sampler(net)
    assert sampler.schedule == net.schedule and len(sampler) == 1000


def test_a_step_size_at_which_an_ncsn_of_diffusers_diverges_is_not_recommended(tmp_path):
    folder = shutil.copytree(FIXTURES / "hub" / "ncsn-mnist-tiny", tmp_path / "ncsn")
    path = next(folder.rglob("scheduler_config.json"))
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), "sampling_eps": 5e-5}))
    assert ScoreNet.from_pretrained(folder).sampler_settings is None


def test_between_two_levels_a_ddpm_is_called_with_a_fractional_time_step(ddpm, rng):
    theirs, net = _theirs(), ScoreNet.from_pretrained(ddpm)
    levels = net.schedule.sigmas.flip(0)  # in the order of the time steps
    sigma = (levels[10] ** 0.7 * levels[11] ** 0.3).item()
    x = torch.rand(1, 3, 8, 8, generator=rng)
    with torch.no_grad():
        noise = theirs((2 * x - 1) / (1 + 4 * sigma**2) ** 0.5, torch.tensor([10.3])).sample
        torch.testing.assert_close(net(x, sigma), -noise / sigma, rtol=1e-3, atol=1e-3)


def test_the_output_of_a_variance_exploding_network_is_the_score(tmp_path, rng):
    theirs = _theirs(
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
    )
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path, VE))
    assert net.schedule == NoiseSchedule.geometric(348, 0.01, 2000)
    x, sigma = torch.rand(3, 3, 8, 8, generator=rng), torch.tensor([0.02, 1.5, 300.0])
    with torch.no_grad():
        expected = theirs(x, sigma).sample
        found = net(x, sigma)
    assert ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max() < 1e-5


def test_the_noise_levels_of_a_karras_ve_scheduler_are_those_of_images_in_minus_1_1(tmp_path):
    theirs = _theirs(time_embedding_type="fourier", **BLOCKS)
    scheduler = {"_class_name": "KarrasVeScheduler", "sigma_min": 0.02, "sigma_max": 100, "s_churn": 80}
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path, scheduler))
    assert net.schedule == NoiseSchedule.geometric(50, 0.01, 2000)


def test_the_score_of_a_network_that_predicts_a_variance_is_the_first_half(tmp_path, rng):
    theirs = _theirs(out_channels=6)
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path, DDPM))
    assert net.predicts_variance and net.config["predicts_variance"] is True
    x = torch.rand(2, 3, 8, 8, generator=rng)
    sigma = net.schedule[500]
    with torch.no_grad():
        noise = theirs((2 * x - 1) / (1 + 4 * sigma**2) ** 0.5, 499).sample[:, :3]
        torch.testing.assert_close(net(x, sigma), -noise / sigma, rtol=1e-4, atol=1e-4)


def test_a_network_with_a_conditioning_image_may_predict_a_variance(rng, tmp_path):
    """It has as many output channels as input channels, and the scheduler tells that half of them are a variance."""
    theirs = _theirs(in_channels=6, out_channels=6)
    net = ScoreNet.from_diffusers(theirs, DDPMScheduler(variance_type="learned_range"))
    assert net.predicts_variance and net.sample_shape == (3, 8, 8) and net.conditioning.channels == 3
    x, image = torch.rand(2, 2, 3, 8, 8, generator=rng)
    sigma = net.schedule[500]
    with torch.no_grad():
        noise = theirs(torch.cat([(2 * x - 1) / (1 + 4 * sigma**2) ** 0.5, 2 * image - 1], 1), 499).sample[:, :3]
        torch.testing.assert_close(net(x, sigma, image), -noise / sigma, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"can run this network: it takes a condition or predicts a variance"):
        net.save_pretrained(tmp_path, diffusers=True)
    plain = ScoreNet.from_diffusers(theirs, DDPMScheduler())
    assert not plain.predicts_variance and plain.sample_shape == (6, 8, 8) and plain.conditioning.channels == 0


def test_a_configuration_and_its_hash_have_only_what_differs_of_later_options(tmp_path):
    """A folder of samples of a network that was loaded before there were these options is continued."""
    folder = _save(_theirs(), tmp_path, DDPM)
    later = {"class_embed_type": None, "mid_block_type": "UNetMidBlock2D"}
    assert later.items() <= json.loads((folder / "config.json").read_text()).items()
    assert not later.keys() & ScoreNet.from_pretrained(folder).config.keys()


@pytest.mark.parametrize("fourier", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "vector"),
    [
        ({"class_embed_type": "timestep"}, 1),
        ({"class_embed_type": "identity"}, 32),
        ({"mid_block_type": None}, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({"class_embed_type": "timestep", "num_class_embeds": 5}, 1),  # diffusers does not use the number
                ({"add_attention": False}, 0),
            )
        ),
    ],
    ids=["timestep", "identity", "no middle", "timestep and a number", "no middle attention"],
)
@torch.no_grad()
def test_vectors_as_conditions_and_networks_without_a_middle_block(options, vector, fourier, tmp_path, rng):
    scheduler, more = (VE, {"time_embedding_type": "fourier"}) if fourier else (DDPM, {})
    theirs = _theirs(**options, **more)
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path / "theirs", scheduler))
    net.save_pretrained(tmp_path / "ours")
    assert net.conditioning == Condition(vector=vector)
    given = torch.rand(2, vector, generator=rng) + 0.5 if vector else None
    labels = given[:, 0] if vector == 1 else given
    x, sigma = torch.rand(2, 3, 8, 8, generator=rng), torch.tensor([0.5, 2.0])
    if fourier:  # diffusers divides by the level, and takes its logarithm
        expected = theirs(x, sigma, labels).sample
    else:
        scaled, step = (2 * x - 1) / (1 + 4 * sigma.view(2, 1, 1, 1) ** 2).sqrt(), 999 - net.schedule.position(sigma)
        expected = -theirs(scaled, step, labels).sample / sigma.view(2, 1, 1, 1)
    for score in (net, net.inference_copy(), ScoreNet.from_pretrained(tmp_path / "ours"), UNet2DModel):
        if score is UNet2DModel:
            again = UNet2DModel.from_pretrained(tmp_path / "ours")
            assert again.state_dict().keys() == theirs.state_dict().keys()
        else:
            tolerance = 1e-4 if isinstance(score, ScoreNet) else 2.5e-2  # the copy may be in bfloat16
            assert _relative(score(x, sigma, given), expected) < tolerance
    if vector:
        with pytest.raises(
            ValueError, match=rf"takes a vector as its condition, float \(N, {vector}\): pass condition="
        ):
            net(x, sigma)
        with pytest.raises(
            ValueError, match=rf"takes a vector as its condition, float \(N, {vector}\), got shape \(2, 7\)"
        ):
            net(x, sigma, torch.zeros(2, 7))
        with pytest.raises(TypeError, match=r"takes a vector as its condition.*, got 3"):
            net(x, sigma, 3)
        assert AnnealedLangevinSampler(net, levels=3).sample(condition=given, progress=False).shape == x.shape


def test_class_conditional_networks(tmp_path, rng):
    theirs = _theirs(num_class_embeds=4)
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path, DDPM))
    x, label, sigma = torch.rand(2, 3, 8, 8, generator=rng), torch.tensor([3, 1]), net.schedule[700]
    with torch.no_grad():
        noise = theirs((2 * x - 1) / (1 + 4 * sigma**2) ** 0.5, 299, class_labels=label).sample
        torch.testing.assert_close(net(x, sigma, label), -noise / sigma, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["linear", "squaredcos_cap_v2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHER_BETAS)]
)
def test_noise_levels_equal_those_of_diffusers(kind, tmp_path):
    scheduler = {**DDPM, "beta_schedule": kind, "num_train_timesteps": 500}
    net = ScoreNet.from_pretrained(_save(_theirs(), tmp_path, scheduler))
    alpha_bar = DDPMScheduler(num_train_timesteps=500, beta_schedule=kind).alphas_cumprod.double()
    expected = 0.5 * (1 / alpha_bar - 1).sqrt().flip(0)
    torch.testing.assert_close(net.schedule.sigmas, expected, rtol=1e-9, atol=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = ScoreNet.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.schedule.sigmas, net.schedule.sigmas)
    with torch.device("meta"):
        assert torch.equal(ScoreNet.from_pretrained(tmp_path).schedule.sigmas, net.schedule.sigmas)


def test_noise_levels_of_trained_betas(tmp_path):
    scheduler = {"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2, 0.3]}
    net = ScoreNet.from_pretrained(_save(_theirs(), tmp_path, scheduler))
    expected = NoiseSchedule.from_betas([0.1, 0.2, 0.3]).sigmas
    torch.testing.assert_close(net.schedule.sigmas, expected, rtol=1e-6, atol=0)


# -- Names and files of weights


def _load(folder):
    return {name: p.detach().clone() for name, p in ScoreNet.from_pretrained(folder).backbone.named_parameters()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _old(weights, *, convolutions=False):
    old = {}
    for name, tensor in weights.items():
        renamed = name
        for new, former in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            renamed = renamed.replace(f".attentions.0.{new}.", f".attentions.0.{former}.")
        convolution = convolutions and renamed != name and tensor.ndim == 2
        old[renamed] = tensor[..., None, None].contiguous() if convolution else tensor
    assert old.keys() != weights.keys()
    return old


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_old_names_of_attention_weights(kind, convolutions, ddpm):
    expected = _load(ddpm)
    old = _old(load_file(ddpm / WEIGHTS), convolutions=convolutions)
    (ddpm / WEIGHTS).unlink()
    if kind == "bin":
        torch.save(old, ddpm / "diffusion_pytorch_model.bin")
    else:
        save_file(old, ddpm / WEIGHTS)
    assert _same(_load(ddpm), expected)


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_float16_are_used_if_there_are_no_others(safe, ddpm):
    full = _load(ddpm)
    half = {name: tensor.half() for name, tensor in load_file(ddpm / WEIGHTS).items()}
    if safe:
        save_file(half, ddpm / "diffusion_pytorch_model.fp16.safetensors")
    else:
        torch.save(half, ddpm / "diffusion_pytorch_model.fp16.bin")
    assert _same(_load(ddpm), full)
    (ddpm / WEIGHTS).unlink()
    found = _load(ddpm)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert _same(found, {name: tensor.half().float() for name, tensor in full.items()}) and not _same(found, full)


def test_duplicate_weights_are_dropped(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    _save(_theirs(time_embedding_type="fourier", **blocks), tmp_path, VE)
    expected = _load(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights["time_proj.W"] = weights["time_proj.weight"].clone()
    weights["down_blocks.0.downsamplers.0.op.weight"] = weights["down_blocks.0.downsamplers.0.conv.weight"].clone()
    save_file(weights, tmp_path / WEIGHTS)
    assert _same(_load(tmp_path), expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_are_split_into_several_files(kind, ddpm):
    expected = _load(ddpm)
    weights = load_file(ddpm / WEIGHTS)
    (ddpm / WEIGHTS).unlink()
    parts = {f"part-{i}.{kind}": dict(list(weights.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        (save_file if kind == "safetensors" else torch.save)(part, ddpm / name)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (ddpm / f"diffusion_pytorch_model.{kind}.index.json").write_text(json.dumps(index))
    assert _same(_load(ddpm), expected)
    (ddpm / f"part-1.{kind}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no part-1\.{kind}"):
        _load(ddpm)


def test_safetensors_are_preferred_to_a_pickle(ddpm):
    expected = _load(ddpm)
    torch.save({"nonsense": torch.zeros(1)}, ddpm / "diffusion_pytorch_model.bin")
    assert _same(_load(ddpm), expected)


@pytest.mark.parametrize(("predict_epsilon", "row"), [(True, "ddpm"), (False, "ddpm_x0")])
def test_predict_epsilon_of_schedulers_of_2022(predict_epsilon, row, tmp_path):
    scheduler = {key: value for key, value in DDPM.items() if key != "prediction_type"}
    _save(_theirs(), tmp_path, {**scheduler, "predict_epsilon": predict_epsilon})
    assert ScoreNet.from_pretrained(tmp_path).precondition == row


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 3), (3, 6)])
def test_channels_for_a_condition_or_a_variance(inputs, outputs, tmp_path):
    """Additional input channels are those of a condition, additional output channels those of a variance."""
    net = ScoreNet.from_pretrained(_save(_theirs(in_channels=inputs, out_channels=outputs), tmp_path, DDPM))
    assert net.sample_shape == (3, 8, 8) and net.predicts_variance == (outputs == 6)
    condition = torch.rand(2, 3, 8, 8) if inputs == 6 else None
    sampler = AnnealedLangevinSampler(net, net.schedule.respaced(2), steps_per_level=1)
    assert sampler.sample(2, condition=condition, progress=False).shape == (2, 3, 8, 8)


def test_channels_for_neither_a_condition_nor_a_variance_raise(tmp_path):
    _save(_theirs(in_channels=3, out_channels=4), tmp_path, DDPM)
    with pytest.raises(ValueError, match=r"out_channels must be at most in_channels, 3, or twice as many .* got 4"):
        ScoreNet.from_pretrained(tmp_path)


def test_noise_levels_in_the_weights_are_used(tmp_path):
    """diffusers-ncsn stores the levels as a buffer. If its configuration has other levels, there is one warning."""
    theirs = _theirs()
    scheduler = {"_class_name": "AnnealedLangevinDynamicsScheduler", "sigma_max": 10, "sigma_min": 0.005}
    _save(theirs, tmp_path, {**scheduler, "num_train_timesteps": 10}, pipeline=True)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    config["_class_name"] = "UNet2DModelForNCSN"
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    levels = NoiseSchedule.geometric(10, 0.005, 10)
    save_file({**weights, "sigmas": levels.sigmas.float()}, tmp_path / "unet" / WEIGHTS)
    net = ScoreNet.from_pretrained(tmp_path)
    assert net.schedule == levels
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():  # the output is the score, the time step the index of the level
        torch.testing.assert_close(net(x, levels[7]), theirs(x, 7).sample, rtol=1e-4, atol=1e-5)
    for other in (NoiseSchedule.geometric(20, 0.005, 10), NoiseSchedule.geometric(10, 0.005, 12)):
        save_file({**weights, "sigmas": other.sigmas.float()}, tmp_path / "unet" / WEIGHTS)
        with pytest.warns(UserWarning, match=r"scheduler_config\.json has .*; the levels in the weights are") as record:
            net = ScoreNet.from_pretrained(tmp_path)
        assert len(record) == 1
        torch.testing.assert_close(net.schedule.sigmas, other.sigmas, rtol=1e-6, atol=0)
    save_file({**weights, "sigmas": torch.ones(10)}, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match=r"the weights beside .*config\.json do not hold valid noise levels"):
        ScoreNet.from_pretrained(tmp_path)


# -- Saved networks in diffusers


BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def _back(folder):
    """Loads a folder with diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return UNet2DModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("fourier", [False, True])
def test_a_saved_unet_loads_in_both_packages(fourier, tmp_path, rng, capfd):
    theirs = _theirs(**({"time_embedding_type": "fourier", **BLOCKS} if fourier else {}))
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path / "a", VE if fourier else DDPM))
    net.save_pretrained(tmp_path / "b")
    again = ScoreNet.from_pretrained(tmp_path / "b")
    assert again.config == net.config and again.schedule == net.schedule
    assert _same(dict(again.backbone.named_parameters()), dict(net.backbone.named_parameters()))
    capfd.readouterr()
    back = _back(tmp_path / "b")
    assert len(capfd.readouterr().err) < 1000  # diffusers prints unknown keys, but not 1,000 levels
    x, t = torch.rand(2, 3, 8, 8, generator=rng), torch.tensor([1.5, 300.0])
    with torch.no_grad():
        assert torch.equal(back(x, t).sample, theirs(x, t).sample)


@pytest.mark.parametrize(
    ("row", "fourier"), [(row, fourier) for row in FAMILIES["unet"].preconditions for fourier in (False, True)]
)
def test_diffusers_loads_a_saved_unet_only_if_it_computes_the_same(row, fourier, tmp_path, rng):
    torch.manual_seed(0)
    embedding = "fourier" if fourier else "positional"
    blocks = {key: list(value) for key, value in BLOCKS.items()}
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    architecture = {"family": "unet", **sizes, **blocks}
    net = built(
        {**architecture, "time_embedding_type": embedding}, NoiseSchedule.geometric(20, 0.01, 50), row, (3, 8, 8)
    ).eval()
    net.save_pretrained(tmp_path)
    if row not in (("ncsnpp",) if fourier else ("ddpm", "ddpm_v", "ddpm_x0")):
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            _back(tmp_path)
        return
    back = _back(tmp_path)
    x, level = torch.rand(2, 3, 8, 8, generator=rng), 30
    sigma = net.schedule[level]
    with torch.no_grad():
        if fourier:
            expected = back(x, torch.tensor([sigma] * 2)).sample
        else:
            a = 1 / (1 + 4 * sigma**2)  # alpha_bar
            x_t = a**0.5 * (2 * x - 1)
            out = back(x_t, len(net.schedule) - 1 - level).sample
            noise = {
                "ddpm": out,
                "ddpm_v": a**0.5 * out + (1 - a) ** 0.5 * x_t,
                "ddpm_x0": (x_t - a**0.5 * out) / (1 - a) ** 0.5,
            }[row]
            expected = -noise / sigma
        torch.testing.assert_close(net(x, sigma), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_that_diffusers_saves_again_loads_with_its_scheduler(tmp_path, rng):
    """diffusers keeps the keys of this package in config.json, but not the file of the noise levels."""
    net = ScoreNet.from_diffusers(_theirs(), DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction"))
    net.save_pretrained(tmp_path / "a", diffusers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DDPMPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert "format_version" in json.loads((tmp_path / "b" / "unet" / "config.json").read_text())
    again = ScoreNet.from_pretrained(tmp_path / "b")
    assert again.precondition == "ddpm_v"
    torch.testing.assert_close(again.schedule.sigmas, net.schedule.sigmas, rtol=1e-4, atol=0)
    x = torch.rand(2, 3, 8, 8, generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(again(x, 0.3), net(x, 0.3), rtol=1e-3, atol=1e-3)


def _pipeline(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("scheduler", "in_memory"),
    [
        (DDPMScheduler(num_train_timesteps=5), False),  # variance_type fixed_small
        (DDPMScheduler(num_train_timesteps=5, variance_type="fixed_large", clip_sample=False), True),
        pytest.param(
            DDPMScheduler(num_train_timesteps=5, thresholding=True, sample_max_value=0.5, timestep_spacing="trailing"),
            False,
            marks=pytest.mark.slow,
        ),
        (DDIMScheduler(num_train_timesteps=5, clip_sample_range=0.5, prediction_type="v_prediction"), True),
    ],
    ids=["fixed small", "fixed large", "thresholding", "DDIM"],
)
def test_a_pipeline_that_is_read_and_saved_draws_the_same_samples(scheduler, in_memory, tmp_path):
    theirs = _theirs()
    DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "a")
    net = ScoreNet.from_diffusers(theirs, scheduler) if in_memory else ScoreNet.from_pretrained(tmp_path / "a")
    net.save_pretrained(tmp_path / "b", diffusers=True)
    ScoreNet.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c", diffusers=True)
    images = []
    for name in "ac":
        pipeline = _pipeline(tmp_path / name)
        assert type(pipeline.scheduler) is type(scheduler)
        configs = pipeline.scheduler.config, scheduler.config
        kept, before = ({key: each[key] for key in each if not key.startswith("_")} for each in configs)
        assert kept == before
        options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5, "output_type": "np"}
        images.append(pipeline(batch_size=2, **options).images)
    assert (images[0] == images[1]).all()


@pytest.mark.slow
def test_the_scheduler_of_a_network_that_diffusers_cannot_sample_is_kept(tmp_path):
    fourier = _theirs(time_embedding_type="fourier", **BLOCKS)
    scheduler = {**VE, "snr": 0.123, "correct_steps": 3, "other": {"nested": [1, "a", None]}}
    net = ScoreNet.from_pretrained(_save(fourier, tmp_path / "a", scheduler))
    net.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "scheduler_config.json").read_text())
    assert written == {key: value for key, value in scheduler.items() if key != "_diffusers_version"}
    assert ScoreNet.from_pretrained(tmp_path / "b").config == net.config
    (tmp_path / "b" / "scheduler_config.json").unlink()  # nothing of this package needs it
    assert ScoreNet.from_pretrained(tmp_path / "b").schedule == net.schedule


def test_a_scheduler_follows_the_noise_levels_of_its_network(tmp_path):
    """A network whose noise levels were changed keeps the other options of its scheduler."""
    net = ScoreNet.from_diffusers(_theirs(), DDPMScheduler(num_train_timesteps=20, clip_sample_range=0.7))
    net.schedule = net.schedule.respaced(7)
    net.save_pretrained(tmp_path, diffusers=True)
    config = _pipeline(tmp_path).scheduler.config
    assert (config.num_train_timesteps, len(config.trained_betas)) == (7, 7)
    assert (config.variance_type, config.clip_sample_range) == ("fixed_small", 0.7)


# -- Objects in memory


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("classes", [None, 4])
def test_from_diffusers_equals_loading_the_saved_objects(prediction, classes, tmp_path, rng):
    theirs, scheduler = _theirs(num_class_embeds=classes), DDPMScheduler(prediction_type=prediction)
    state = torch.get_rng_state()
    net = ScoreNet.from_diffusers(theirs, scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    theirs.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    saved = ScoreNet.from_pretrained(tmp_path)
    assert net.config == saved.config and not net.training
    assert _same(dict(net.backbone.named_parameters()), dict(saved.backbone.named_parameters()))
    x, t = torch.rand(2, 3, 8, 8, generator=rng), 412
    condition = None if classes is None else torch.tensor([3, 1])
    a = scheduler.alphas_cumprod[t].double()
    sigma = 0.5 * (1 / a - 1).sqrt()
    x_t = (a.sqrt() * (2 * x - 1)).float()
    with torch.no_grad():
        out = theirs(x_t, t, class_labels=condition).sample
        found = net(x, float(sigma), condition)
        assert _relative(found, -_noise(out, x_t, a, prediction) / sigma) < 1e-5


def test_from_diffusers_copies_the_weights(rng):
    theirs = _theirs().half().train()
    net = ScoreNet.from_diffusers(theirs, DDPMScheduler())
    before = net.backbone.conv_in.weight.clone()
    theirs.conv_in.weight.data.zero_()
    assert torch.equal(net.backbone.conv_in.weight, before) and before.dtype == torch.float32
    assert theirs.training and not net.training


@pytest.mark.slow
def test_from_diffusers_takes_a_compiled_network_and_numbers_of_numpy(rng):
    theirs, betas = _theirs(), np.linspace(1e-4, 0.02, 50, dtype=np.float32)
    net = ScoreNet.from_diffusers(torch.compile(theirs, backend="eager"), DDPMScheduler(trained_betas=list(betas)))
    expected = ScoreNet.from_diffusers(theirs, DDPMScheduler(trained_betas=betas))
    x = torch.rand(1, 3, 8, 8, generator=rng)
    assert net.config == expected.config and torch.equal(net(x, 0.1), expected(x, 0.1))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_from_diffusers_with_trained_betas(kind):
    net = ScoreNet.from_diffusers(_theirs(), DDPMScheduler(trained_betas=kind([0.1, 0.2, 0.3])))
    torch.testing.assert_close(net.schedule.sigmas, NoiseSchedule.from_betas([0.1, 0.2, 0.3]).sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "betas"), [(DDPMScheduler, "linear"), (EulerDiscreteScheduler, "squaredcos_cap_v2")])
def test_the_infinite_level_of_a_schedule_that_ends_without_signal_is_left_out(kind, betas, tmp_path, rng):
    theirs = _theirs()
    scheduler = kind(beta_schedule=betas, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    net = ScoreNet.from_pretrained(_save(theirs, tmp_path, {"_class_name": kind.__name__, **scheduler.config}))
    assert net.config == ScoreNet.from_diffusers(theirs, scheduler).config
    assert len(net.schedule) == 999
    for t in (0, 10, 412, 998):
        a = scheduler.alphas_cumprod[t].double()
        sigma = 0.5 * (1 / a - 1).sqrt()
        torch.testing.assert_close(net.schedule.sigmas[998 - t], sigma, rtol=1e-5, atol=0)
        x = torch.rand(2, 3, 8, 8, generator=rng, dtype=torch.float64) + sigma * torch.randn(2, 3, 8, 8, generator=rng)
        x_t = a.sqrt() * (2 * x - 1)
        with torch.no_grad():
            out = theirs(x_t.float(), t).sample.double()
            found = net(x.float(), float(sigma))
        assert _relative(found, -_noise(out, x_t, a, "v_prediction") / sigma) < 1e-4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: (nn.Conv2d(3, 3, 1), DDPMScheduler()),
            TypeError,
            "unet must be an object of diffusers with a config, such as a UNet2DModel, got Conv2d",
        ),
        (lambda: (UNet2DModel, DDPMScheduler()), TypeError, "unet must be an object of diffusers .* got <class"),
        (
            lambda: (_theirs(), DDPM),
            TypeError,
            "scheduler must be an object of diffusers with a config, such as a DDPMScheduler, got dict",
        ),
        (
            lambda: (DDPMPipeline(_theirs(), DDPMScheduler()), DDPMScheduler()),
            ValueError,
            "unet must be one of UNet2DModel and UNet2DModelForNCSN, .* got DDPMPipeline",
        ),
        (
            lambda: (_theirs(), EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")),
            ValueError,
            "the config of the EulerDiscreteScheduler: timestep_type 'continuous' is not supported",
        ),
        (
            lambda: (_theirs(), CogVideoXDDIMScheduler()),
            ValueError,
            "the config of the CogVideoXDDIMScheduler: snr_shift_scale 3.0 is not supported",
        ),
        (
            lambda: (_theirs(), DPMSolverMultistepScheduler(use_flow_sigmas=True)),
            ValueError,
            "the config of the DPMSolverMultistepScheduler: use_flow_sigmas True is not supported",
        ),
        (
            lambda: (_theirs(), LCMScheduler()),
            ValueError,
            "the config of the LCMScheduler: timestep_scaling 10.0 is not supported",
        ),
        (
            lambda: (_theirs(out_channels=6), DDPMScheduler(variance_type="learned")),
            ValueError,
            "the config of the DDPMScheduler: variance_type 'learned' is not supported; .* have 'learned_range'",
        ),
    ],
)
def test_from_diffusers_raises_for_unsupported_objects(make, error, message):
    with pytest.raises(error, match=message):
        ScoreNet.from_diffusers(*make())


def test_from_diffusers_raises_for_unknown_weights():
    theirs = _theirs()
    theirs.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the UNet2DModel holds 2 tensor\(s\) that the network lacks: extra\.bias"):
        ScoreNet.from_diffusers(theirs, DDPMScheduler())


# -- New networks


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"condition_channels": 2, "classes": None, "widths": (12, 20)},
        {"classes": 3, "attention": (True, False), "widths": (8, 8)},
    ],
)
def test_a_new_unet_starts_at_the_prior_trains_and_can_be_saved(arguments, tmp_path, rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, **{"widths": (8, 16), "layers_per_block": 1, **arguments})
    x = torch.rand(2, 1, 8, 8, generator=rng)
    condition = None
    if arguments.get("classes"):
        condition = torch.tensor([0, 2])
    elif "condition_channels" in arguments:
        condition = torch.rand(2, 2, 8, 8, generator=rng)
    # The last convolution is zero, so the score is the exact score of N(1/2, 1/16).
    nn.init.zeros_(net.backbone.conv_out.bias)
    torch.testing.assert_close(net(x, 0.3, condition), -(x - 0.5) / (1 / 16 + 0.09))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    from scorematch import dsm_loss

    losses = []
    for _ in range(30):
        loss = dsm_loss(net, x, sigma=0.3, condition=condition, generator=rng)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    net.eval().save_pretrained(tmp_path)
    again = ScoreNet.from_pretrained(tmp_path)
    assert torch.equal(again(x, 0.3, condition), net(x, 0.3, condition))
    images = AnnealedLangevinSampler(again, again.schedule.respaced(4), steps_per_level=1).sample(
        2, condition=condition, progress=False
    )
    assert images.shape == (2, 1, 8, 8)


# -- Bad input


class _Trap:
    def __reduce__(self):
        return print, ("this code ran",)


def test_a_pickle_with_code_is_not_loaded(ddpm, capsys):
    (ddpm / WEIGHTS).unlink()
    with (ddpm / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": _Trap()}, file, protocol=2)
    with pytest.raises(
        ValueError, match=r"refers to '__builtin__\.print', which weights do not need; it was not loaded"
    ):
        ScoreNet.from_pretrained(ddpm)
    assert "this code ran" not in capsys.readouterr().out


def test_a_git_lfs_pointer_gives_a_clear_error(ddpm):
    (ddpm / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, not the weights\. Run git lfs pull"):
        ScoreNet.from_pretrained(ddpm)


def test_truncated_files_raise(ddpm):
    whole = (ddpm / WEIGHTS).read_bytes()
    (ddpm / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        ScoreNet.from_pretrained(ddpm)
    (ddpm / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1000)}, ddpm / "diffusion_pytorch_model.bin")
    part = (ddpm / "diffusion_pytorch_model.bin").read_bytes()
    (ddpm / "diffusion_pytorch_model.bin").write_bytes(part[: len(part) // 2])
    with pytest.raises(ValueError, match=r"is not a complete bin file|is damaged"):
        ScoreNet.from_pretrained(ddpm)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "does not hold the weights of a network, a mapping of names to tensors"),
        ({"a": 1}, "does not hold the weights of a network, a mapping of names to tensors"),
        (3, "does not hold the weights of a network, a mapping of names to tensors"),
        ({"a": torch.zeros(2).to_sparse()}, r"refers to 'torch\._utils\._rebuild_sparse_tensor', which weights do not"),
        ({"a": torch.zeros(2, device="meta")}, r"refers to 'torch\._utils\._rebuild_meta_tensor_no_storage', which"),
    ],
)
def test_a_pickle_without_weights_raises(content, message, ddpm):
    (ddpm / WEIGHTS).unlink()
    torch.save(content, ddpm / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        ScoreNet.from_pretrained(ddpm)


@pytest.mark.parametrize(
    "text", ['{"weight_map": null}', "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "/"}}']
)
def test_an_invalid_index_raises(text, ddpm):
    (ddpm / WEIGHTS).unlink()
    (ddpm / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map must be an object that names the file of each tensor"
    ):
        ScoreNet.from_pretrained(ddpm)


@pytest.mark.parametrize("part", ["vae", "vqvae"])
@pytest.mark.parametrize("sign", ["index", "folder"])
def test_a_latent_pipeline_raises(part, sign, tmp_path):
    _save(_theirs(), tmp_path / "pipeline", DDPM, pipeline=True)
    if sign == "folder":
        (tmp_path / "pipeline" / part).mkdir()
    else:
        index = {"_class_name": "LDMPipeline", part: ["diffusers", "VQModel"]}
        (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        with pytest.raises(ValueError, match=f"is a latent pipeline, .*{part}/: its U-Net is a score of latents"):
            ScoreNet.from_pretrained(folder)


def test_a_pipeline_without_its_optional_latent_part_is_loaded(tmp_path):
    """AudioDiffusionPipeline draws spectrograms, or latents of them."""
    _save(_theirs(), tmp_path, DDPM, pipeline=True)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioDiffusionPipeline", "vqvae": [null, null]}')
    assert ScoreNet.from_pretrained(tmp_path).sample_shape == (3, 8, 8)


def test_a_folder_with_two_networks_raises(ddpm, tmp_path):
    _save(_theirs(), tmp_path / "two", DDPM, pipeline=True)
    shutil.copy(ddpm / "config.json", tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds two networks, .*\. Move one into a folder of its own"):
        ScoreNet.from_pretrained(tmp_path / "two")
    assert ScoreNet.from_pretrained(tmp_path / "two" / "unet").sample_shape == (3, 8, 8)


def test_options_of_a_training_program_beside_a_pipeline_are_ignored(tmp_path):
    _save(_theirs(), tmp_path, DDPM, pipeline=True)
    (tmp_path / "config.json").write_text('{"batch": 128, "learning_rate": 2e-4}')
    assert ScoreNet.from_pretrained(tmp_path).sample_shape == (3, 8, 8)


def test_a_missing_scheduler_raises(ddpm):
    (ddpm / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no scheduler_config\.json, which says .*Download it"):
        ScoreNet.from_pretrained(ddpm)


@pytest.mark.parametrize(
    ("config", "scheduler", "message"),
    [
        (
            {"down_block_types": ["DownBlock2D", "KDownBlock2D"]},
            {},
            r"down_block_types must be a list .* each one of 'DownBlock2D', .*got \['DownBlock2D', 'KDownBlock2D'\]",
        ),
        ({"block_out_channels": [12, 16]}, {}, r"other sizes: conv_in\.weight"),
        ({"mid_block_type": "Other"}, {}, "mid_block_type must be one of 'UNetMidBlock2D' or null, got 'Other'"),
        ({"class_embed_type": "simple"}, {}, "class_embed_type must be one of 'timestep', 'identity' or null, got"),
        (
            {"time_embedding_dim": 16},
            {},
            r"other sizes: time_embedding\.linear_1\.weight \(32, 8\) instead of \(16, 8\)",
        ),
        ({"time_embedding_type": "learned"}, {}, "time_embedding_type must be one of 'positional', 'fourier', got"),
        ({"_class_name": "UNet2DConditionModel"}, {}, "must be UNet2DModel or .*, got 'UNet2DConditionModel'"),
        ({"_class_name": ["UNet2DModel"]}, {}, r"_class_name must be UNet2DModel or .*, got \['UNet2DModel'\]"),
        (
            {"time_embedding_type": "fourier"},
            {"sigma_max": 10, "sigma_min": 0.1},
            r"is the configuration of a DDPM \(_class_name 'DDPMScheduler'\), and the network is a variance-exploding",
        ),
        ({"time_embedding_type": "fourier"}, {"beta_start": ...}, r"scheduler_config\.json lacks sigma_max, sigma_min"),
        (
            {"time_embedding_type": "fourier"},
            {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80, "sigma_data": 0.5},
            r"scheduler_config\.json: sigma_data 0\.5 is not supported",
        ),
        ({"sample_size": "8"}, {}, r"sample_size must be a list with exactly 2 entries, .*got '8'"),
        ({"in_channels": 0}, {}, "in_channels must be an integer of at least 1"),
        ({"norm_eps": "x"}, {}, r"/config\.json: norm_eps must be a number of at least 0 and at most 1, got 'x'"),
        (
            {"time_embedding_type": "fourier"},
            {"sigma_min": 3, "sigma_max": 1, "beta_start": ...},
            r"scheduler_config\.json: expected sigma_max > sigma_min > 0",
        ),
        (
            {},
            {"prediction_type": "flow"},
            r"scheduler_config\.json: prediction_type must be one of 'epsilon'.*got 'flow'",
        ),
        ({}, {"beta_schedule": "cubic"}, "beta_schedule must be one of 'linear', .*got 'cubic'"),
        ({}, {"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "the betas do not define valid noise levels"),
        ({}, {"beta_start": None}, "beta_start must be a number of at least 0 and at most 1, got None"),
        (
            {},
            {"num_train_timesteps": 10**12},
            "num_train_timesteps must be an integer of at least 1 and .*got 1000000000000",
        ),
        ({}, {"trained_betas": [0.1, 1.0]}, "the betas do not define valid noise levels"),
        ({}, {"trained_betas": []}, "trained_betas must be a list with at least 1"),
        ({}, {"beta_start": 0, "beta_end": 0}, "the betas do not define valid noise levels"),
        (
            {},
            {"_class_name": "EulerDiscreteScheduler", "beta_start": ...},
            "is not the configuration of a DDPM: it has no beta_start and no trained_betas .*'EulerDiscreteScheduler'",
        ),
    ],
)
def test_invalid_configurations_raise(config, scheduler, message, ddpm):
    for name, changes in [("config.json", config), ("scheduler_config.json", scheduler)]:
        content = {**json.loads((ddpm / name).read_text()), **changes}
        (ddpm / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=message) as caught:
        ScoreNet.from_pretrained(ddpm)
    assert str(ddpm) in str(caught.value)


def test_names_outside_of_attention_are_kept():
    tensor = torch.zeros(2)
    names = ["conv_in.weight", "up_blocks.0.resnets.0.key.weight", "mid_block.attentions.0.group_norm.weight"]
    assert list(current_names(dict.fromkeys(names, tensor))) == names


def test_a_wrong_number_of_entries_of_attention_raises():
    with pytest.raises(ValueError, match="one entry per scale, 3, got 1"):
        ScoreNet.unet(attention=[True])


# -- The published samplers


def _replayed(net, init, generator):
    """The images of the recommended sampler, (N, H, W, C), with noise in the order of a pipeline."""
    sampler = recommended_sampler(net)
    sampler.precision = "float32"
    noise = {"noise_source": lambda x: torch.randn(x.shape, generator=generator)}
    return sampler.sample(init=init, **noise, progress=False).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({}, {"variance": "small", "clamp_denoised": True}),
        pytest.param(
            {"variance_type": "fixed_small_log"}, {"variance": "small", "clamp_denoised": True}, marks=pytest.mark.slow
        ),
        ({"variance_type": "fixed_large", "clip_sample": False}, {"variance": "large", "clamp_denoised": False}),
        ({"prediction_type": "v_prediction"}, {"variance": "small", "clamp_denoised": True}),
        ({"variance_type": "learned_range"}, {"variance": "learned", "clamp_denoised": True}),
    ],
    ids=str,
)
def test_the_recommended_sampler_of_a_ddpm_draws_the_images_of_its_pipeline(options, sampler, tmp_path):
    theirs = _theirs(out_channels=6 if sampler["variance"] == "learned" else 3)
    DDPMPipeline(theirs, DDPMScheduler(num_train_timesteps=12, beta_end=0.6, **options)).save_pretrained(tmp_path)
    net = ScoreNet.from_pretrained(tmp_path)
    assert net.sampler_settings == SamplerSettings("ancestral", levels=12, **sampler)
    generator = torch.Generator().manual_seed(0)
    expected = _pipeline(tmp_path)(2, generator, num_inference_steps=12, output_type="np").images
    shape, generator = (2, 3, 8, 8), torch.Generator().manual_seed(0)
    signal = 1 / (1 + 4 * net.schedule.sigma_max**2) ** 0.5
    init = 0.5 + torch.randn(shape, generator=generator) / (2 * signal)
    found = _replayed(net, init, generator)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_the_recommended_sampler_of_ncsnpp_draws_the_images_of_its_pipeline(steps, tmp_path):
    theirs = _theirs(time_embedding_type="fourier", **BLOCKS)
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=15, sigma_max=30.0, snr=0.1, correct_steps=steps)
    pipeline = ScoreSdeVePipeline(theirs, scheduler)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    net = ScoreNet.from_pretrained(tmp_path)
    published = {"predictor": "reverse-diffusion", "corrector_steps": steps, "snr": 0.1, "published": True}
    assert net.sampler_settings == SamplerSettings("predictor-corrector", levels=15, **published)
    shape, generator = (2, 3, 8, 8), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(15)
    expected = pipeline(2, 15, generator, output_type="np").images
    generator.manual_seed(0)
    init = 30 * torch.randn(shape, generator=generator)
    found = _replayed(net, init, generator)
    assert np.abs(found - expected).max() < 1e-3


def test_a_signal_to_noise_ratio_out_of_range_raises(tmp_path):
    folder = _save(_theirs(time_embedding_type="fourier", **BLOCKS), tmp_path, {**VE, "snr": 1.5})
    with pytest.raises(ValueError, match=r"scheduler_config\.json: snr must be"):
        ScoreNet.from_pretrained(folder)


class _Normal:
    """The exact score of N(1/2, 1/4^2), with the schedule and the settings of a network."""

    value_range = None

    def __init__(self, net):
        self.schedule, self.sampler_settings = net.schedule, net.sampler_settings

    def __call__(self, x, sigma):
        return (0.5 - x) / (0.25**2 + sigma**2)


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        pytest.param(DDPM, 250, marks=pytest.mark.slow),
        ({**DDPM, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000}, 250),
        ({**DDPM, "beta_schedule": "scaled_linear", "num_train_timesteps": 100, "beta_end": 0.2}, 100),
        pytest.param(VE, 250, marks=pytest.mark.slow),
    ],
)
def test_recommended_settings_sample_an_exact_score_accurately(scheduler, calls, tmp_path):
    """The number of calls is the recommended one, and the samples have the right mean and, to 5 %, deviation."""
    fourier = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    theirs = _theirs(**({"time_embedding_type": "fourier", **fourier} if scheduler is VE else {}))
    sampler = AnnealedLangevinSampler(_Normal(ScoreNet.from_pretrained(_save(theirs, tmp_path, scheduler))))
    assert len(sampler) == calls and sampler.consistent
    x = sampler.sample(4000, shape=(4,), generator=torch.Generator().manual_seed(0), progress=False)
    assert abs(x.mean() - 0.5) < 0.01 and abs(x.std() / 0.25 - 1) < 0.05
