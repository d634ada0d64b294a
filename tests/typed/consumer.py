"""Code of a user that has every public name of the package, for a type checker in strict mode; it is never run."""

# pyright: strict

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import scorematch
from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.charts import Curve, chart, table
from scorematch.core.precision import autocast, exact_float32, native_dtype
from scorematch.core.processes import Process, find_device, local_device, this_process
from scorematch.core.schema import Field
from scorematch.core.scores import Denoiser, NetworkScore, Score, Tweedie
from scorematch.data import (
    ENDINGS,
    REFERENCES,
    ArrayData,
    Batch,
    ImageData,
    grid,
    list_pictures,
    open_arrays,
    open_images,
    read_image,
    read_mask,
    read_samples,
    save_animation,
    save_grid,
    save_image,
    save_plot,
    stored_samples,
    stored_settings,
    to_uint8,
)
from scorematch.evaluation import (
    EXTRACTORS,
    METRICS,
    DataLikelihood,
    Estimate,
    Evaluation,
    Evaluator,
    Extractor,
    Memorization,
    Metric,
    Statistics,
    Tuning,
    class_shares,
    classifier_two_sample_test,
    data_likelihood,
    density_coverage,
    dinov2,
    efficientnet_lite0,
    energy_distance,
    evaluate,
    evaluate_restoration,
    exact,
    frechet_distance,
    gaussian_images,
    image_figures,
    inception,
    inception_score,
    kernel_distance,
    level_losses,
    maximum_mean_discrepancy,
    memorization_of,
    pixels,
    posterior_calibration,
    power_spectrum,
    precision_recall,
    sampler_distances,
    score_error,
    settings_learned,
    settings_of_paths,
    settings_table,
    settings_with_few_calls,
    sliced_wasserstein_distance,
    spectrum_error,
    statistics_of,
    tune,
    values,
    values_distance,
)
from scorematch.evaluation.calibration import Calibration
from scorematch.evaluation.diagnostics import LevelLoss, ScoreError
from scorematch.evaluation.estimate import Report
from scorematch.evaluation.features import Extracted
from scorematch.evaluation.levy import Increments, Laplace, LevyProcess, Student
from scorematch.evaluation.memorization import Neighbors
from scorematch.evaluation.sampler_distance import SamplerDistance, sampler_variants
from scorematch.evaluation.tune import MeasuredSampler
from scorematch.guidance import GuidedScore, Tiled, autoguidance, classifier, classifier_free
from scorematch.likelihood import bits_per_dimension, log_likelihood
from scorematch.loss import loss_and_norm, sliced_score_matching_loss
from scorematch.nets import FAMILIES, MLP, NCSNPP, Condition, Family, InferenceScore, RefineNet, UNet, family_of
from scorematch.nets.precondition import ROWS, Coefficients, Preconditioning, Units
from scorematch.nets.precondition import Row as PreconditioningRow
from scorematch.pretrained import CARDS, CHECKPOINTS, Card, CheckpointCard, Place, Stored, find, load, locate
from scorematch.restoration import (
    JPEG,
    OPERATORS,
    AveragePool,
    Blur,
    Clip,
    Fourier,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Half,
    Hole,
    Linear,
    Magnitude,
    Mask,
    Matrix,
    MotionBlur,
    Observation,
    Operator,
    Photograph,
    Physics,
    Quantize,
    Resize,
    Summary,
    Uncrop,
    as_operator,
    conjugate_gradients,
    summary,
)
from scorematch.restoration.method import Restoration
from scorematch.restoration.methods import METHODS, Method, Restore
from scorematch.restoration.palette import (
    TASKS,
    Colorization,
    Inpainting,
    JPEGRestoration,
    MultiTask,
    Task,
    Uncropping,
    condition_of,
)
from scorematch.sampling import (
    SAMPLERS,
    AncestralSampler,
    Chain,
    DecoupledSampler,
    ODESampler,
    ParticleSampler,
    Population,
    PredictorCorrectorSampler,
    Sampler,
    SamplerSettings,
    bulk_samples,
    data_moments,
    learned_settings,
    recommended_sampler,
    sample_to,
    schedules_of_paths,
)
from scorematch.sampling.ancestral import Variance
from scorematch.training import (
    RECIPES,
    LevelMixture,
    Levels,
    LogNormal,
    LogUniform,
    Recipe,
    Settings,
    Stage,
    Step,
    TrainingState,
    UniformTime,
    network_for,
    reconstruct,
    train,
    train_from_observations,
    train_steps,
)
from scorematch.training.levels import levels_for, weighting_for


class Backbone(nn.Module):
    """A network of one's own."""

    conditioning = Condition(classes=10)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor) -> Tensor:
        return x * c_noise.view(-1, 1, 1, 1) * condition.view(-1, 1, 1, 1)


class Euler(Sampler):
    """A sampler of one's own."""

    def __len__(self) -> int:
        return len(self.schedule) - 1 + self.denoise

    def settings(self) -> list[str]:
        return [f"{len(self.schedule)} levels"]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        for sigma in self.schedule:
            x, score, z = chain(x, sigma)
            yield x + sigma * score + z, sigma


class Negative(Operator):
    """An operator of one's own."""

    gain = 1.0

    def measure(self, x: Tensor) -> Tensor:
        return 1 - x

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return 1 - y


def networks(folder: Path, x: Tensor, sigma: Tensor) -> ScoreNet:
    schedule = NoiseSchedule.geometric(10, 0.01, levels=50)
    for other in (NoiseSchedule.karras(10, 0.01, 18), NoiseSchedule.from_betas(np.ones(3)), NoiseSchedule.from_data(x)):
        assert_type(other.sigma_max, float)
    assert_type(schedule.sigmas, Tensor)
    assert_type(schedule[0], float)
    assert_type(list(schedule), list[float])
    assert_type(schedule.sample(3, generator=0), Tensor)
    assert_type(schedule.respaced(10).between(5, 0.1).to_dict(), dict[str, list[float]])
    net = ScoreNet(Backbone(), schedule, precondition="ddpm", sample_shape=(3, 8, 8), value_range=(0, 1))
    assert_type(ScoreNet.ncsn(3, 32), ScoreNet)
    assert_type(ScoreNet.ncsnv2(3, (32, 48), depth="deeper"), ScoreNet)
    assert_type(ScoreNet.unet(3, 32, widths=(8, 16), classes=10), ScoreNet)
    assert_type(ScoreNet.ncsnpp(3, 32, widths=[8, 16]), ScoreNet)
    assert_type(net.forward(x, 0.1), Tensor)
    assert_type(net.denoise(x, sigma, 3), Tensor)
    assert_type(net.score_and_variance(x, sigma), tuple[Tensor, Tensor])
    assert_type(net.as_denoiser(), Denoiser)
    assert_type(net.inference_copy(compile=True), InferenceScore | ScoreNet)
    assert_type(net.sampler_settings, SamplerSettings | None)
    net.sampler_settings = SamplerSettings(levels=100, consistent=True)
    assert_type(net.config, dict[str, Any])
    assert_type(net.conditioning, Condition | None)
    net.save_pretrained(folder, diffusers=False)
    assert_type(net.push_to_hub("owner/name", license="mit"), str)
    assert_type(ScoreNet.from_diffusers(nn.Identity(), object()), ScoreNet)
    assert_type(scorematch.__version__, str)
    return ScoreNet.from_pretrained("mnist", local_files_only=True)


def plain_score(x: Tensor, sigma: Tensor) -> Tensor:
    return -x


def parts(net: ScoreNet, x: Tensor, sigma: Tensor) -> None:
    scores: Sequence[NetworkScore | Tweedie] = [net]
    assert_type(scores[0].denoise(x, 0.1), Tensor)
    functions: list[Score] = [net, plain_score]
    families: Mapping[str, Family[Any]] = FAMILIES
    assert_type(family_of(net.backbone), Family[Any] | None)
    assert_type(Field(int, low=1).fits(3), bool)
    assert_type(families["unet"].condition(net.backbone, predicts_variance=False), Condition)
    backbones: Sequence[nn.Module] = [RefineNet(3, 8), UNet(), NCSNPP(), MLP(2)]
    rows: Mapping[str, PreconditioningRow] = ROWS
    print(functions)
    row = Preconditioning("karras", net.schedule, (0, 1))
    found: Coefficients = row.coefficients(sigma)
    assert_type(net.units, Units | None)
    net.fit_units(x)
    assert_type(found.c_noise, Tensor)
    assert_type(row.outputs(backbones[0], x, found, None), tuple[Tensor, ...])
    assert_type(rows["karras"].centered, bool)


def files() -> None:
    place: Place = locate("mnist", local_files_only=True)
    stored: Stored = load(place, weights=True)
    assert_type(stored.weights, dict[str, Tensor])
    assert_type(ScoreNet.from_stored(stored), ScoreNet)
    assert_type(ScoreNet.from_checkpoint("a.pth", config="a.yml"), ScoreNet)
    cards: Sequence[Card] = CARDS
    checkpoints: Sequence[CheckpointCard] = CHECKPOINTS
    assert_type(find(cards[0].license + checkpoints[0].license), Card | None)


def score(x: Tensor, sigma: float | Tensor) -> Tensor:
    return -x / (1 + sigma**2)


def losses(net: ScoreNet, x: Tensor) -> Tensor:
    loss = dsm_loss(net, x, condition=3, weighting=torch.square, reduction="none", generator=0)
    assert_type(sliced_score_matching_loss(score, x, net.schedule, sigma=0.1), Tensor)
    assert_type(loss_and_norm(net, x, sigma=0.1, condition=3), tuple[Tensor, Tensor])
    with autocast("cpu"), exact_float32():
        assert_type(native_dtype("cpu"), torch.dtype)
    assert_type(find_device(), torch.device)
    assert_type(local_device("cpu"), torch.device)
    assert_type(this_process(), Process)
    return loss


def samplers(net: ScoreNet, folder: Path, x: Tensor) -> None:
    variance: Variance = "small"
    all_samplers: list[Sampler] = [
        AnnealedLangevinSampler(net, step_size=1e-5, precision="float32"),
        AncestralSampler(net, variance=variance),
        ODESampler(net, levels=18, method="dpm-solver++"),
        ODESampler(net, levels=3, method="unipc", order=3, eta=[0.5, 1.0]),
        ODESampler(net, schedules_of_paths(net, [4], n=8, condition=3, generator=0)[0], method="ipndm"),
        recommended_sampler(net, calls=8),
        recommended_sampler(net, restore="auto", calls=20),
        ODESampler(net, sigmas=[4.0, 0.1], method="unipc", **data_moments(x)),
        *(recommended_sampler(net, each) for each in learned_settings(net, [4, 6], n=8, condition=3)),
        PredictorCorrectorSampler(net, predictor="reverse-diffusion"),
        ParticleSampler(net, particles=8, restore="guide"),
        DecoupledSampler(net, levels=40, proposals=3),
        Euler(net, levels=10),
        recommended_sampler(net),
        recommended_sampler(score, SamplerSettings(sampler="ode", levels=18)),
    ]
    kinds: Mapping[str, type[Sampler]] = SAMPLERS
    observation = Observation(Mask(x > 0), x, sigma=0.1)
    assert_type(ParticleSampler(net).population(observation, 4, generator=0), Population)
    population: Population = ParticleSampler(net).population(observation)
    assert_type(population.log_evidence, Tensor)
    for sampler in all_samplers:
        assert_type(sampler.sample(4, condition=3, generator=[0, 1, 2, 3], progress=False), Tensor)
        for state, sigma in sampler.iterate(init=x, generator=torch.Generator()):
            assert_type(state, Tensor)
            assert_type(sigma, float)
    guided: list[GuidedScore] = [
        classifier_free(net, 2, interval=(0.1, 1)),
        autoguidance(net, net, 2),
        classifier(net, score, 2),
    ]
    assert_type(guided[0].forward(x, 0.1, 3), Tensor)
    assert_type(Tiled(net, 64, overlap=16).inference_copy(), Tiled)
    assert_type(sample_to(ODESampler(net), folder, 1000, seed=1), Path)
    for batch in (*bulk_samples(ODESampler(net), 100), *stored_samples(folder)):
        assert_type(batch, Batch)
        assert_type(batch.images, Tensor)
    assert_type(read_samples(folder, 10), Tensor)
    assert_type(stored_settings(folder), dict[str, Any])
    print(kinds.keys())


def restoration(net: ScoreNet, x: Tensor, mask: Tensor) -> None:
    found: Summary = summary(x, levels=(0.1, 0.9))
    assert_type(conjugate_gradients(lambda w: 2 * w, x, iterations=5), Tensor)
    assert_type(found.errors(x[0], x[0] > 0), tuple[float, float])
    assert_type(found.mean + found.deviation + found.quantiles[0], Tensor)
    operators: list[Operator] = [Mask(mask), Uncrop(left=3), Grayscale(), AveragePool(2), JPEG(10), Negative()]
    operators += [AveragePool(2) @ Grayscale(), as_operator("pool:2 @ gray"), Hole().drawn(x, range(len(x))), Half()]
    operators += [Linear(torch.Tensor.double), Matrix(torch.eye(3)), Resize(2), FourierLines(4), Fourier(mask)]
    operators += [Blur(torch.ones(3, 3) / 9, "reflect"), GaussianBlur(2.0, boundary="zeros"), MotionBlur(9, 45)]
    photo = Photograph(Mask(mask), x, (3, 64, 64), crop="center", feather=2)
    assert_type(photo.restored(x), Tensor)
    assert_type(photo.observation, Observation)
    operators += [Clip(0.1, 0.9), Quantize(4), Magnitude(2), Physics(object())]
    assert_type(Observation.from_counts(operators[0], x, 100.0), Observation)
    methods: Mapping[Restore, Method] = METHODS
    kinds: Mapping[str, type[Operator]] = OPERATORS
    for operator in operators:
        y = operator.measure(x)
        assert_type(ODESampler(net, restore="guide").sample(2, observation=Observation(operator, y, sigma=0.1)), Tensor)
        assert_type(condition_of(operator, y, generator=0), Tensor)
        assert_type(METHODS["guide"].make(Observation(operator, y), 0.1), Restoration)
    tasks: list[Task] = [Inpainting(), Uncropping(), Colorization(), JPEGRestoration(5, 30)]
    task_kinds: Mapping[str, type[Task]] = TASKS
    tasks.append(MultiTask([Inpainting(), Colorization()], weights=[1, 2]))
    print(kinds.keys(), methods.keys(), task_kinds.keys(), tasks)


def likelihood(net: ScoreNet, x: Tensor) -> Tensor:
    assert_type(bits_per_dimension(net, x, probes=None), Tensor)
    return log_likelihood(net, x, net.schedule, progress=False)


def pictures(folder: Path) -> None:
    images = torch.stack([read_image(path, 3) for path in list_pictures(folder)])
    save_grid(images, folder / "grid.png", columns=8)
    save_plot(images, folder / "plot.png")
    save_image(grid(images), folder / "one.png")
    save_animation([images, images], folder / "chain.gif")
    assert_type(read_mask(folder / "mask.png"), Tensor)
    assert_type(to_uint8(images), Tensor)
    assert_type(chart("title", "x", [Curve("y", [1, 2], [3, 4])], log_x=True), str)
    assert_type(table(["a"], [["1"]]), str)


def training(net: ScoreNet, folder: Path) -> ScoreNet:
    data: ImageData = open_images(folder, image_size=64, labels=True)
    images, labels = data.read([0, 1])
    assert_type(images, Tensor)
    assert_type(labels, Tensor | None)
    levels: Levels = LevelMixture((LogNormal(-1, 1), LogUniform(0.01, 50), UniformTime(), net.schedule))
    u = torch.rand(3, dtype=torch.float64)
    assert_type(levels_for(net, levels).quantile(u), Tensor)
    weighting: Callable[[Tensor], Tensor] | None = weighting_for(net, "backbone", p=2)
    step: Step | None = None
    state: TrainingState | None = None
    for step in train_steps(net, data, Settings(images=1000, levels=levels, weighting=weighting)):
        assert_type(step.loss, Tensor)
        state = step.state
    if step is not None and state is not None:
        assert_type(state.average(0.1), ScoreNet)
    recipe: Recipe = RECIPES["small-64"]
    assert_type(recipe.build(3, 64), ScoreNet)
    assert_type(reconstruct(folder, 0.08), ScoreNet)
    fields: ArrayData = open_arrays(torch.rand(10, 2, 16))
    signals = train(network_for((2, 16)), fields, folder, images=1000)
    gaps = Observation(Grayscale(), torch.rand(10, 1, 8, 8), sigma=0.1)
    assert_type(train_from_observations(signals, gaps, folder, stages=2, images=1000), ScoreNet)
    stages = [Stage(0.5, {"pixel_layers": 2}, {"lr": 7e-4})]
    assert_type(train(net, data, folder, hours=8, growth=stages), ScoreNet)
    return train(net, data, folder, images=1000, condition=Colorization(), progress=False)


def evaluation(net: ScoreNet, folder: Path) -> None:
    result: Evaluation = evaluate(net, folder, n=1000, features="pixels", metrics=["fid"])
    assert_type(result.table(), str)
    restored: Evaluation = evaluate_restoration(net, folder, Grayscale(), n=100)
    restored.save(folder)
    tuned: Tuning = tune(net, folder, settings=[*settings_table(net), *settings_of_paths(net, [4, 6])])
    assert_type(settings_learned(net, [4], out=folder), list[SamplerSettings])
    assert_type(settings_with_few_calls(net, [4]), list[SamplerSettings])
    best: MeasuredSampler = tuned.best
    assert_type(best.seconds, float)
    assert_type(tuned.table(), str)
    evaluator = Evaluator(folder, features=["pixels"], device="cpu")
    assert_type(values(evaluator.measure([torch.rand(4, 1, 8, 8)])), dict[str, float])
    data = open_images(folder)
    for images in gaussian_images(data, 10):
        figures: dict[str, Estimate] = image_figures([images])
        assert_type(figures["mean"].error, float | None)
    print(ENDINGS, REFERENCES, METRICS, EXTRACTORS.keys())


def mean_distance(features: Tensor, reference: Statistics) -> Estimate:
    return Estimate(float((features.mean(0) - reference.mean).square().sum().sqrt()))


def features(folder: Path, images: Tensor) -> None:
    extractors: list[Extractor] = [inception(), dinov2(size="b"), efficientnet_lite0(), pixels()]
    a = extractors[0](images)
    extracted: Extracted = extractors[0].extract(images)
    logits = extracted.class_logits
    statistics: Statistics = statistics_of(folder, extractors[0], keep_features=True)
    statistics.save(folder / "statistics.npz")
    assert_type(Statistics.of(a, extractors[0]).mean, Tensor)
    METRICS["means"] = Metric(mean_distance, {"means": "distance of means"})
    estimates: list[Estimate] = [
        frechet_distance(a, statistics),
        kernel_distance(a, statistics),
        inception_score(logits),
        *class_shares(logits),
        *precision_recall(a, statistics),
        *density_coverage(a, statistics),
        sliced_wasserstein_distance(a, statistics, directions=10),
        energy_distance(a, statistics),
        maximum_mean_discrepancy(a, statistics),
        classifier_two_sample_test(a, a, folds=3),
        *spectrum_error(images, images),
        values_distance(images, images),
    ]
    assert_type(power_spectrum(images), Tensor)
    assert_type(estimates[0].error, float | None)
    memorization: Memorization = memorization_of(images, folder)
    neighbors: Neighbors = memorization.samples
    assert_type(neighbors.ratios, Tensor)


def diagnostics(net: ScoreNet, x: Tensor) -> None:
    mixture = exact.GaussianMixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 0.25)
    worlds: list[exact.Distribution] = [mixture, exact.Gaussian([0.0], 1.0), exact.Empirical(x, 0.1)]
    assert_type(worlds[0].sample(3, generator=0), Tensor)
    assert_type(worlds[0].log_density(x), Tensor)
    assert_type(exact.operator_matrix(Grayscale(), (3, 8, 8)), Tensor)
    bits: DataLikelihood = data_likelihood(net, x)
    assert_type(bits.nats.value, float)
    level: Report[LevelLoss] = level_losses(net, x)
    error: Report[ScoreError] = score_error(mixture, mixture)
    assert_type(level.table() + error.table(), str)
    distances: Report[SamplerDistance] = sampler_distances(mixture, sampler_variants(net))
    assert_type(distances[-1].energy, Estimate)
    calibration: Report[Calibration] = posterior_calibration(mixture, Mask(x > 0))
    assert_type(calibration.table() + calibration[0].name, str)
    laws: list[Increments] = [Laplace(), Student(3.0)]
    evaluate_restoration(net, x, "gray", draws=19, truth="network")
    signals = [LevyProcess(law, 64) for law in laws]
    seen = Observation(Mask(x[0] > 0), x)
    assert_type(signals[0].posterior_samples(seen, 3, generator=0), Tensor)
    posterior_calibration(signals[1], Mask(x > 0), sigma=torch.ones(64))
    posterior_calibration(signals[1], Mask(x > 0), sigma=lambda v: 2 * v)
