"""Every sampler, guidance, every operator with every method, and Palette on the simulated device."""

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, guidance
from scorematch.data.samples import read_samples
from scorematch.restoration import (
    JPEG,
    AveragePool,
    Fourier,
    GaussianBlur,
    Grayscale,
    Mask,
    Observation,
    Resize,
    Uncrop,
    palette,
)
from scorematch.restoration.methods import METHODS
from scorematch.sampling import (
    SAMPLERS,
    AncestralSampler,
    DecoupledSampler,
    ODESampler,
    ParticleSampler,
    PredictorCorrectorSampler,
    bulk_samples,
    data_moments,
    learned_settings,
    sample_to,
)
from tests.devices.nets import LEVELS, SIZE, colors, rand
from tests.devices.simulated import KIND
from tests.helpers import run
from tests.networks import shared

VARIANTS = {
    "langevin": (AnnealedLangevinSampler, {"steps_per_level": 1}),
    "exact noise": (AnnealedLangevinSampler, {"exact_noise": True, "steps_per_level": 1}),
    "consistent": (AnnealedLangevinSampler, {}),
    "heun": (ODESampler, {}),
    "churn": (ODESampler, {"churn": 3}),
    "dpm-solver++": (ODESampler, {"method": "dpm-solver++"}),
    "stochastic": (ODESampler, {"method": "unipc", "eta": 0.5}),
    "normal": (ODESampler, {"method": "unipc", **data_moments(rand(9, 3, SIZE, SIZE))}),
    "ancestral": (AncestralSampler, {}),
    "small, clamped": (AncestralSampler, {"variance": "small", "clamp_denoised": True}),
    "predictor-corrector": (PredictorCorrectorSampler, {}),
    "particles": (ParticleSampler, {"particles": 3}),
    "decoupled": (DecoupledSampler, {}),
    "published": (PredictorCorrectorSampler, {"predictor": "reverse-diffusion", "published": True}),
}
FLOAT32 = {"levels": 3, "precision": "float32"}
# On MPS each sampler once.
variants = pytest.mark.parametrize(
    "name",
    VARIANTS if KIND == "cuda" else ["langevin", "consistent", "heun", "normal", "ancestral", "published", "particles"],
)


def _sampler(name, net, **options):
    kind, own = VARIANTS[name]
    return kind(net, **{**own, **options})


def test_every_sampler_is_tested_here():
    assert {kind for kind, _ in VARIANTS.values()} == set(SAMPLERS.values())


@variants
def test_a_step_waits_for_no_copy_and_rarely_for_a_value(compare, name):
    """On MPS the noise of each step is copied with a wait. The moments of the data are copied before the first step."""
    moments = 14 if name == "normal" else 0
    sampler = _sampler(name, colors(), levels=9)
    compare(
        lambda to: run(_sampler(name, to(colors()), levels=9), 2, generator=0 if name == "heun" else [0, 1]),
        within=0.2,
        reads=6,
        copies=moments + (4 if KIND == "cuda" else 4 + 2 * len(sampler)),
    )


@variants
def test_samples(compare, name):
    def samples(to):
        sampler, device = _sampler(name, to(colors()), **FLOAT32), to(torch.zeros(1)).device
        return [
            run(sampler, 2, generator=torch.Generator(device).manual_seed(5)),
            *(x for x, _ in sampler.iterate(init=10 * rand(2, 3, SIZE, SIZE), generator=0, progress=False)),
        ]

    compare(samples, within=2e-2)


def test_learned_variance(compare):
    def samples(to):
        net = to(shared("DDPM++, variance"))
        return run(AncestralSampler(net, variance="learned", **FLOAT32), 2, generator=0)

    compare(samples, within=1e-2)


@pytest.mark.skipif(KIND == "cuda", reason="torch turns autocast off without a CUDA device")
def test_learned_settings(compare):
    def learned(to):
        net, options = to(colors()), {"n": 2, "iterations": 2, "progress": False}
        (found,) = learned_settings(net, [3], NoiseSchedule.karras(5, 0.1, 6), **options)
        return [torch.tensor([*found.options["sigmas"], *found.options["coefficients"]])]

    compare(learned, within=1e-3)


def test_a_plain_function(compare):
    sampler = AnnealedLangevinSampler(lambda x, sigma: -x / (1 + sigma**2), LEVELS)
    compare(lambda to: run(sampler, init=to(rand(2, 3)), generator=0), within=1e-3)


GUIDANCE = {
    "classifier-free": lambda to: guidance.classifier_free(to(colors(classes=3, null_class=True)), 2.0),
    "interval": lambda to: guidance.classifier_free(
        to(colors(classes=3, null_class=True)), 2.0, interval=(0.1, 5), rescale=0.7
    ),
    "classifier": lambda to: guidance.classifier(to(colors()), to(Classifier()), 2.0, interval=(0.1, 5)),
}


class Classifier(torch.nn.Module):
    def forward(self, x, sigma):
        return x.flatten(1)[:, :3] / (1 + sigma[:, None])


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance(compare, name):
    def samples(to):
        guided = GUIDANCE[name](to)
        given = [run(ODESampler(guided, **FLOAT32), 2, condition=c, generator=0) for c in (1, torch.tensor([0, 2]))]
        return [*given, guided(to(rand(2, 3, SIZE, SIZE)), to(torch.tensor([0.3, 8.0])), to(torch.tensor([0, 2])))]

    compare(samples, within=2e-2)


def test_autoguidance(compare):
    def samples(to):
        guided = guidance.autoguidance(to(colors()), to(colors(dropout=0.1)), 1.5, rescale=0.5)
        return run(AnnealedLangevinSampler(guided, **FLOAT32), 2, generator=0)

    compare(samples, within=2e-2)


# -- Restoration ------------------------------------------------------------------------------------------------------


HALF, EACH = torch.arange(SIZE) < SIZE // 2, rand(2, 1, SIZE, SIZE) > 0.5
OPERATORS = {
    "mask": Mask(HALF),
    "mask for each image": Mask(EACH),
    "uncrop": Uncrop(left=2, top=1),
    "gray": Grayscale(),
    "pool": AveragePool(2),
    "jpeg": JPEG(20),
    "resize": Resize(2),
    "blur": GaussianBlur(1, boundary="reflect"),
    "fourier of gray": Fourier(rand(SIZE, SIZE) > 0.5, rand(2, SIZE, SIZE, seed=1)) @ Grayscale(),
    "gray of pool": Grayscale() @ AveragePool(2),
    "pool of mask": AveragePool(2) @ Mask(HALF[:, None] & HALF),
    "gray of mask": Grayscale() @ Mask(EACH),
}
CLEAN = rand(2, 3, SIZE, SIZE, seed=7)


RESTORED = {"replace": OPERATORS}
if KIND == "cuda":
    RESTORED |= {
        "guide": ["mask", "jpeg"],
        "guide-jacobian": ["mask for each image", "jpeg", "blur"],
        "moment-matching": ["mask for each image", "jpeg", "fourier of gray"],
        "shift": ["mask for each image", "fourier of gray", "blur"],
    }


def test_every_method_is_tested_here():
    assert KIND != "cuda" or {"auto", *RESTORED} == METHODS.keys()


@pytest.mark.parametrize(("restore", "operator"), [(name, each) for name, few in RESTORED.items() for each in few])
def test_restoration(compare, restore, operator):
    def restored(to):
        found = []
        for sigma, place in ((0.0, to), (0.2, lambda value: value)):  # y on the device, and on the CPU
            seen = place(Observation(OPERATORS[operator], OPERATORS[operator].measure(CLEAN), sigma))
            sampler = AnnealedLangevinSampler(to(colors()), restore=restore, clamp=False, **FLOAT32)
            found.append(run(sampler, 2, observation=seen, generator=0, batch_size=1))
        return found

    compare(restored, within=2e-2)


@pytest.mark.parametrize("name", VARIANTS if KIND == "cuda" else ["heun", "particles"])
def test_samplers_restore(compare, name):
    seen = Observation(OPERATORS["mask"], CLEAN, 0.1)
    compare(lambda to: run(_sampler(name, to(colors()), **FLOAT32), 2, observation=seen, generator=0), within=2e-2)


TASKS = [palette.Colorization(), palette.Inpainting(), palette.Uncropping(), palette.JPEGRestoration()]


@pytest.mark.parametrize("task", [*TASKS, palette.MultiTask(TASKS, [1, 2, 3, 4])], ids=lambda task: type(task).__name__)
def test_palette_tasks(compare, task):
    def made(to):
        device = to(torch.zeros(1)).device
        x = to(rand(4, 3, SIZE, SIZE))
        return [task(x, torch.Generator().manual_seed(0)), task(x, torch.Generator(device).manual_seed(0)), task(x, 3)]

    compare(made)


@pytest.mark.parametrize("operator", ["mask", "gray", "jpeg"])
def test_palette_networks(compare, operator):
    operator = OPERATORS[operator]

    def restored(to):
        y = operator.measure(CLEAN)
        given = palette.condition_of(operator, to(y), 0)
        sampler = AncestralSampler(to(colors(condition_channels=3)), **FLOAT32)
        return run(sampler, condition=given, observation=Observation(operator, y), generator=0)

    compare(restored, within=2e-2)


# -- Many samples, the second device, the default device --------------------------------------------------------------


def test_many_samples(compare, tmp_path):
    def drawn(to):
        sampler = ODESampler(to(colors(classes=3)), **FLOAT32)
        out = tmp_path / to(torch.zeros(1)).device.type
        sample_to(sampler, out, 5, batch_size=2, classes="cycle", format="npz", progress=False)
        return [read_samples(out, 5), *(batch.images for batch in bulk_samples(sampler, 5, batch_size=2, classes=0))]

    compare(drawn, within=1e-2)


def test_the_second_device(compare):
    def samples(to):
        seen = Observation(OPERATORS["mask for each image"], CLEAN, 0.1)
        guided = guidance.classifier_free(to(colors(classes=3, null_class=True)), 2.0, interval=(0.1, 5))
        return [
            run(AnnealedLangevinSampler(to(colors()), **FLOAT32), 2, generator=0, observation=seen),
            run(ODESampler(guided, **FLOAT32), 2, condition=1, generator=[0, 1]),
        ]

    compare(samples, within=2e-2, index=1)
