"""Seeds and random numbers: the same seed gives the same numbers on every machine and in every version."""

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.core.randomness import as_generator, seed_of, single_generator, standard_normal, uniform
from scorematch.evaluation.exact import Empirical, Gaussian, GaussianMixture
from scorematch.restoration.palette import Inpainting, JPEGRestoration, Uncropping
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler
from scorematch.training.levels import uniforms
from scorematch.training.steps import Order
from tests.helpers import seed

CPU = torch.device("cpu")
LEVELS = NoiseSchedule.geometric(1, 0.1, 3)
WORLD = Gaussian([0.0, 0.0], torch.eye(2))

# -- Seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0,), 2631537505891389924),
        (("0",), 9180095682402304423),
        ((0, "image", 17), 7152645166646223052),
        ((2**40, "order", 3), 677199006057160225),
        ((-1, "levels"), 7179996536865434561),
    ],
    ids=str,
)
def test_a_seed_is_the_same_everywhere(parts, expected):
    assert seed_of(*parts) == expected


def test_a_seed_depends_on_every_part():
    seeds = {seed_of(*parts) for parts in [(0, "image", 1), (0, "image", 2), (1, "image", 1), (0, "order", 1), (0, 1)]}
    assert len(seeds) == 5
    assert seed_of("1") != seed_of(1) and seed_of("ab", "c") != seed_of("a", "bc")


def test_seeds_use_all_63_bits():
    seeds = [seed_of(i) for i in range(100)]
    assert all(0 <= number < 2**63 for number in seeds) and max(seeds) >= 2**62


def test_parts_of_a_seed_that_are_neither_integers_nor_strings_raise():
    with pytest.raises(TypeError, match="must be integers or strings"):
        seed_of(0, 1.5)


# -- Generators -------------------------------------------------------------------------------------------------------


def test_a_seed_becomes_a_new_generator_and_a_generator_stays():
    generator = seed(3)
    assert single_generator(generator) is generator and single_generator(None) is as_generator(None) is None
    assert single_generator(3).initial_seed() == 3 and single_generator(3) is not single_generator(3)
    made = as_generator([generator, 4])
    assert isinstance(made, tuple) and made[0] is generator and made[1].initial_seed() == 4


@pytest.mark.parametrize("wrong", [1.0, True, "0", [0.5], [None]], ids=repr)
def test_other_generators_raise(wrong):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or a seed"):
        as_generator(wrong)


# -- Draws ------------------------------------------------------------------------------------------------------------


NORMAL = [-0.14679509401, 0.78614127636, 0.94682163000, -1.11434400082]


def _close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype).view(found.shape), rtol=1e-5, atol=1e-6)


def test_normal_and_uniform_numbers_of_a_seed():
    _close(standard_normal((2, 2), seed(7), CPU), NORMAL)
    _close(uniform((4,), seed(7), CPU), [0.53492254, 0.19880319, 0.65921170, 0.65689027])
    double = standard_normal((3,), seed(7), CPU, torch.float64)
    assert double.dtype == torch.float64
    _close(double, NORMAL[:3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        _close(standard_normal((4,), None, CPU), NORMAL)


def test_each_sample_has_its_own_generator():
    drawn = standard_normal((2, 2), (seed(7), seed(8)), CPU)
    _close(drawn, [-0.14679509, 0.78614128, 0.27127650, -1.27291834])
    assert torch.equal(drawn[1:], standard_normal((1, 2), (seed(8),), CPU))
    with pytest.raises(ValueError, match="one entry for each of the 3 samples, got 2"):
        uniform((3, 2), (seed(7), seed(8)), CPU)


def test_levels_of_a_seed():
    schedule = NoiseSchedule.geometric(1, 0.1, 10)
    assert torch.equal(schedule.sample(8, generator=7), torch.tensor(schedule)[[5, 2, 1, 6, 3, 7, 7, 9]])
    _close(uniforms(7, 0, 4), [0.8093824271185791, 0.427416415868474, 0.04545040461836891, 0.6634843933682636])


def test_the_order_of_images_of_a_seed():
    assert Order(5, 7)(0, 10).tolist() == [0, 4, 1, 3, 2, 1, 2, 4, 3, 0]


@pytest.mark.parametrize(
    ("task", "counts", "total"),
    [(Inpainting(), [8, 26], 52.941387), (Uncropping(), [34, 32], 103.005379), (JPEGRestoration(), [64, 64], 0.0)],
    ids=["inpainting", "uncropping", "jpeg"],
)
def test_conditions_of_a_seed(task, counts, total):
    condition, mask = task(torch.zeros(2, 3, 8, 8), seed(7))
    assert mask.expand(2, 1, 8, 8).sum((1, 2, 3)).tolist() == counts
    assert condition.sum().item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (WORLD, [0.94682163, -1.11434400, 1.69079018, -0.89482790]),
        (
            GaussianMixture([0.5, 0.5], [[0.0, 0.0], [5.0, 5.0]], 1.0),
            [0.94682163, -1.11434400, 1.69079018, -0.89482790],
        ),
        (Empirical(torch.arange(10.0).view(5, 2)), [0, 1, 4, 5]),
    ],
    ids=["gaussian", "mixture", "empirical"],
)
def test_exact_samples_of_a_seed(distribution, expected):
    _close(distribution.sample(2, generator=7), expected)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (AnnealedLangevinSampler(WORLD, LEVELS, steps_per_level=1), [1.72844994, -1.16628683]),
        (AncestralSampler(WORLD, LEVELS), [1.01342309, -0.57435143]),
        (PredictorCorrectorSampler(WORLD, LEVELS), [0.83323282, -0.40087911]),
        (ODESampler(WORLD, LEVELS), [-0.10652722, 0.57049203]),
        (ODESampler(WORLD, LEVELS, churn=1.0), [0.86424494, -0.35246208]),
    ],
    ids=["langevin", "ancestral", "predictor-corrector", "ode", "ode with noise"],
)
def test_samples_of_a_seed(sampler, expected):
    _close(sampler.sample(1, shape=(2,), generator=7, progress=False)[0], expected)


def test_noise_is_copied_to_cuda_without_waiting_for_it(monkeypatch):
    """The host draws the noise of a step while the device computes the step before."""
    copies = []

    def to(self, device, non_blocking=False):
        copies.append((device.type, non_blocking))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: copies.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for generator in (seed(0), [seed(0), seed(1)]):
        standard_normal((2, 3), generator, torch.device("cuda"))
        assert copies[-2:] == ["pinned", ("cuda", True)]
