"""Guidance: against closed forms, and with networks, their inference copies, and samplers."""

import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.core.conditions import Condition
from scorematch.core.provenance import identity
from scorematch.core.scores import Denoiser
from scorematch.evaluation.exact import Gaussian, GaussianMixture
from scorematch.guidance import Tiled, autoguidance, classifier, classifier_free
from scorematch.likelihood import log_likelihood
from scorematch.nets.inference import InferenceScore
from scorematch.restoration import Mask, Observation
from scorematch.sampling import AncestralSampler, ODESampler, SamplerSettings, bulk_samples, recommended_sampler
from tests.helpers import NoFloat64, run, seed

LEVELS = NoiseSchedule.geometric(5, 0.1, 12)
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)  # of the two classes


class Labeled:
    """A mixture with two classes, and without a class: the exact score, its log-density, and an exact classifier."""

    conditioning = Condition(classes=2, null_class=True)

    def __init__(self, means=((1.5, 1.5), (-1.5, -1.0), (2.0, -1.0)), std=0.5):
        one, other = SHARES
        self.parts = [  # the classes, and all together
            GaussianMixture([0.5, 0.5], means[:2], std**2),
            GaussianMixture([1.0], means[2:], std**2),
            GaussianMixture([one / 2, one / 2, other], means, std**2),
        ]
        self.batches = []

    def __call__(self, x, sigma, condition=None):
        self.batches.append(len(x))
        condition = torch.full((len(x),), 2) if condition is None else condition
        scores = torch.stack([part(x, sigma) for part in self.parts], 1)
        return scores[torch.arange(len(x)), condition]

    def log_density(self, x, sigma, k):
        return self.parts[k].log_density(x, sigma)

    def logits(self, x, sigma):
        """Up to a constant log p(c | x, sigma), by Bayes' rule."""
        self.batches.append(-len(x))
        rows = zip(x, sigma, strict=True)
        logs = [torch.stack([self.log_density(row[None], float(s), k)[0] for k in range(2)]) for row, s in rows]
        return torch.stack(logs) + SHARES.log() + 3.0


def _unconditional(labeled):
    """The score without a class."""
    return lambda x, sigma: labeled(x, sigma)


def _points(n=6):
    return 2 * torch.randn(n, 2, generator=seed(3), dtype=torch.float64)


def _gradient(log_density, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(x).sum(), x)[0]


LABELS = torch.tensor([0, 1, 1, 0, 0, 1])
WEIGHTS = [-1.0, 0.0, 0.5, 1.0, 1.7, 4.0]


def _power(log_0, log_1, weight):
    """The logarithm of p_0^(1-w) p_1^w."""
    return lambda x: (1 - weight) * log_0(x) + weight * log_1(x)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_classifier_free_guidance_is_the_score_of_a_product_of_powers(weight):
    labeled, x = Labeled(), _points()
    guided = classifier_free(labeled, weight)
    for sigma in (0.2, torch.tensor(1.3), torch.tensor([0.1, 0.4, 0.4, 1.0, 3.0, 7.0])):
        found = guided(x, sigma, LABELS)
        for i, k in enumerate(LABELS):
            s = float(sigma if not isinstance(sigma, torch.Tensor) or sigma.ndim == 0 else sigma[i])
            logs = (lambda x, c=c, s=s: labeled.log_density(x, s, c) for c in (2, k))
            torch.testing.assert_close(found[i], _gradient(_power(*logs, weight), x[i][None])[0], rtol=1e-6, atol=1e-6)
    for k in range(2):  # one class for all
        torch.testing.assert_close(guided(x, 0.3, k), guided(x, 0.3, torch.full((6,), k)), rtol=0, atol=0)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_autoguidance_is_the_score_of_a_product_of_powers(weight):
    net, weaker, x = Labeled(), Labeled(means=((1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)), std=1.1), _points()
    guided = autoguidance(net, weaker, weight)
    for condition in (None, 0, LABELS):
        classes = (
            torch.full((6,), 2 if condition is None else 0) if not isinstance(condition, torch.Tensor) else condition
        )
        found = guided(x, 0.4, condition)
        for i, k in enumerate(classes):
            logs = (lambda x, of=of, k=k: of.log_density(x, 0.4, k) for of in (weaker, net))
            torch.testing.assert_close(found[i], _gradient(_power(*logs, weight), x[i][None])[0], rtol=1e-6, atol=1e-6)


def test_a_network_without_classes_can_be_the_weaker_one():
    """Classifier-free guidance with two networks. The weaker one gets no condition."""
    labeled, x = Labeled(), _points()
    weaker = _unconditional(labeled)
    weaker.conditioning = Condition()
    found = autoguidance(labeled, weaker, 2.5)(x, 0.3, LABELS)
    torch.testing.assert_close(found, classifier_free(labeled, 2.5)(x, 0.3, LABELS))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_guidance_by_the_exact_classifier_equals_classifier_free_guidance(weight):
    """By Bayes' rule p(x) p(c | x)^w is proportional to p(x)^(1-w) p(x | c)^w; the shares of the classes cancel."""
    labeled, x = Labeled(), _points()
    guided = classifier(_unconditional(labeled), labeled.logits, weight)
    other = classifier_free(labeled, weight)
    for sigma in (0.2, torch.tensor([0.1, 0.4, 0.4, 1.0, 3.0, 7.0])):
        expected = other(x, sigma, LABELS)
        torch.testing.assert_close(guided(x, sigma, LABELS), expected)
        with torch.no_grad():
            torch.testing.assert_close(guided(x, sigma, LABELS), expected)
        with torch.inference_mode():
            torch.testing.assert_close(guided(x + 0, sigma, LABELS), expected)
    torch.testing.assert_close(guided(x, 0.3, 1), other(x, 0.3, 1))


def test_a_classifier_that_multiplies_by_its_level_in_inference_mode():
    guided, x = classifier(lambda x, sigma: -x, lambda x, sigma: x.square() / sigma[:, None], 2), _points()
    for sigma in (0.3, torch.tensor([0.1, 0.4, 0.4, 1.0, 3.0, 7.0])):
        expected = guided(x, sigma, 1)
        with torch.inference_mode():
            torch.testing.assert_close(guided(x + 0, sigma, 1), expected)
            torch.testing.assert_close(guided(x, sigma + 0, torch.ones(6).long()), expected)


def test_a_classifier_beside_a_network_with_classes():
    """The network gets the condition too, as in the paper."""
    labeled, x = Labeled(), _points()
    found = classifier(labeled, labeled.logits, 1.5)(x, 0.3, LABELS)
    bayes = classifier(_unconditional(labeled), labeled.logits, 1.0)(x, 0.3, LABELS) - labeled(x, 0.3)
    torch.testing.assert_close(found, labeled(x, 0.3, LABELS) + 1.5 * bayes)


@pytest.mark.parametrize("kind", ["classifier_free", "classifier"])
def test_derivatives_of_a_guided_score(kind):
    """The Hessian of a log-density is symmetric, and equals finite differences of the score."""
    labeled, x, k = Labeled(), _points(1), torch.tensor([1])
    guided = (
        classifier_free(labeled, 2)
        if kind == "classifier_free"
        else classifier(_unconditional(labeled), labeled.logits, 2)
    )
    found = torch.autograd.functional.jacobian(lambda x: guided(x[None], 0.5, k)[0], x[0])
    torch.testing.assert_close(found, found.T)
    h, e = 1e-5, torch.eye(2, dtype=x.dtype)
    columns = [(guided(x + h * one, 0.5, k) - guided(x - h * one, 0.5, k))[0] / (2 * h) for one in e]
    torch.testing.assert_close(found, torch.stack(columns, 1), rtol=1e-5, atol=1e-5)


# -- Calls of the networks


def test_calls_of_the_networks():
    labeled, weaker, x = Labeled(), Labeled(), _points()
    kinds = {
        "free": classifier_free(labeled, 3.0, interval=(0.2, 1.0)),
        "auto": autoguidance(labeled, weaker, 3.0, interval=(0.2, 1.0)),
        "classifier": classifier(_unconditional(labeled), weaker.logits, 3.0, interval=(0.2, 1.0)),
    }
    found = {}
    for name, guided in kinds.items():
        for sigma in (0.2, 0.3, 1.0, 1.1):
            labeled.batches, weaker.batches = [], []
            guided(x, sigma, LABELS)
            found[name, sigma] = labeled.batches, weaker.batches
    for sigma, inside in [(0.2, False), (0.3, True), (1.0, True), (1.1, False)]:
        assert found["free", sigma] == ([12] if inside else [6], [])
        assert found["auto", sigma] == ([6], [6] if inside else [])
        assert found["classifier", sigma] == ([6], [-6] if inside else [])
    for weight in (0, 1):
        labeled.batches = []
        classifier_free(labeled, weight)(x, 0.3, LABELS)
        assert labeled.batches == [6]


@pytest.mark.parametrize("kind", ["classifier_free", "autoguidance", "classifier"])
def test_the_interval_holds_for_each_level_of_a_batch(kind):
    labeled, weaker, x = Labeled(), Labeled(std=0.9), _points()
    make = {
        "classifier_free": lambda **interval: classifier_free(labeled, 3.0, **interval),
        "autoguidance": lambda **interval: autoguidance(labeled, weaker, 3.0, **interval),
        "classifier": lambda **interval: classifier(_unconditional(labeled), labeled.logits, 3.0, **interval),
    }[kind]
    sigma = torch.tensor([0.125, 0.25, 0.5, 1.0, 1.25, 4.0])
    found = make(interval=(0.25, 1.0))(x, sigma, LABELS)
    unguided = labeled(x, sigma, LABELS) if kind != "classifier" else labeled(x, sigma)
    inside = torch.tensor([False, False, True, True, False, False])
    torch.testing.assert_close(found[~inside], unguided[~inside])
    torch.testing.assert_close(found[inside], make()(x, sigma, LABELS)[inside])
    for i, s in enumerate(sigma.tolist()):  # a tensor () and a float
        for one in (s, torch.tensor(s)):
            alone = make(interval=(0.25, 1.0))(x[i][None], one, LABELS[i][None])
            torch.testing.assert_close(alone, found[i][None])


@pytest.mark.parametrize("kind", ["classifier_free", "autoguidance"])
def test_rescaling_gives_the_denoised_image_the_contrast_without_guidance(kind, rng):
    """With phi = 1 each image has the standard deviation without guidance, and the mean with guidance."""
    labeled, weaker, x = Labeled(), Labeled(std=0.9), _points().double()
    sigma = torch.tensor([0.125, 0.25, 0.5, 1.0, 1.25, 4.0], dtype=torch.float64)

    def denoised(score):
        return x + sigma[:, None] ** 2 * score

    def make(**options):
        if kind == "autoguidance":
            return autoguidance(labeled, weaker, 3.0, **options)
        return classifier_free(labeled, 3.0, **options)

    guided, unguided = denoised(make()(x, sigma, LABELS)), denoised(labeled(x, sigma, LABELS))
    full = denoised(make(rescale=1.0)(x, sigma, LABELS))
    torch.testing.assert_close(full.std(1), unguided.std(1))
    torch.testing.assert_close(full.mean(1), guided.mean(1))
    assert (guided.std(1) > unguided.std(1)).any()
    partly = make(rescale=0.7)
    torch.testing.assert_close(denoised(partly(x, sigma, LABELS)), 0.3 * guided + 0.7 * full)
    for i, s in enumerate(sigma.tolist()):  # a float, and an image alone
        torch.testing.assert_close(partly(x[i][None], s, LABELS[i][None]), partly(x, sigma, LABELS)[i][None])
    assert torch.equal(make(rescale=0)(x, sigma, LABELS), make()(x, sigma, LABELS))
    outside = make(rescale=0.7, interval=(5.0, 6.0))(x, sigma, LABELS)
    torch.testing.assert_close(outside, labeled(x, sigma, LABELS))


@pytest.mark.parametrize("kind", ["classifier_free", "autoguidance"])
def test_rescaling_at_weight_0_is_the_same_for_a_float_and_a_tensor(kind):
    labeled, x = Labeled(), _points().double()

    def make(**options):
        if kind == "autoguidance":
            return autoguidance(labeled, Labeled(std=0.9), 0.0, rescale=1.0, **options)
        return classifier_free(labeled, 0.0, rescale=1.0, **options)

    found = make()(x, 0.5, LABELS)
    torch.testing.assert_close((x + 0.25 * found).std(1), (x + 0.25 * labeled(x, 0.5, LABELS)).std(1))
    levels = torch.full((len(x),), 0.5, dtype=torch.float64)
    torch.testing.assert_close(make(interval=(0.25, 1.0))(x, levels, LABELS), found)


def test_rescaling_in_half_precision_at_the_lowest_level(rng):
    """sigma^2 = 4e-6 is below the normal numbers of float16, so the rescaling is computed in float32."""
    x, scores = torch.rand(4, 1, 8, 8, generator=rng), torch.randn(8, 1, 8, 8, generator=rng)  # with the class, without

    def score(x, sigma, condition):
        return scores.to(x)

    score.conditioning = Condition(classes=2, null_class=True)
    guided = classifier_free(score, 3.0, rescale=1.0)
    for sigma in (0.002, torch.full((4,), 0.002)):
        found, expected = guided(x.half(), sigma, 1), guided(x, sigma, 1)
        assert found.dtype == torch.float16 and (found - expected).norm() < 5e-3 * expected.norm()


def test_rescaling_of_a_constant_image_changes_nothing():
    def score(x, sigma, condition):
        return -x

    score.conditioning = Condition(classes=2, null_class=True)
    x = torch.full((2, 1, 4, 4), 0.5)
    assert torch.equal(classifier_free(score, 2, rescale=1)(x, 0.5, 1), -x)
    # The score of a point at 0, at which all denoised images are, as the weaker one, far from it.
    x = 100 * torch.arange(32.0).view(2, 1, 4, 4)
    guided = autoguidance(lambda x, sigma: -x / (1 + sigma**2), lambda x, sigma: -x / sigma**2, 0, rescale=1)
    assert torch.equal(guided(x, 4.0), -x / 16)


def test_plain_callables_get_a_tensor_as_their_level():
    def score(x, sigma, condition=None):
        assert isinstance(sigma, torch.Tensor) and sigma.shape == ()
        return -x

    def logits(x, sigma):
        assert sigma.shape == (6,)
        return x

    score.conditioning = Condition(classes=2, null_class=True)
    for guided in (classifier_free(score, 2), autoguidance(score, score, 2), classifier(score, logits, 2)):
        guided(_points(), 0.3, 1)


def test_scores_of_several_dtypes():
    def score(x, sigma):
        return -x

    x = _points()
    for dtype in (torch.float64, torch.bfloat16):
        for net, weaker in ((score, lambda x, sigma: -x.to(dtype)), (lambda x, sigma: -x.to(dtype), score)):  # noqa: B023
            found = autoguidance(net, weaker, 2, interval=(0.1, 1))(x, 0.3)
            assert found.dtype == x.dtype
            torch.testing.assert_close(found, -x, rtol=2e-2, atol=1e-6)
    guided = autoguidance(score, lambda x, sigma: -2 * x, 1.1, interval=(0.1, 1))
    for sigma in (0.3, torch.tensor(0.3), torch.full((6,), 0.3)):  # in float64 no weight is rounded to float32
        torch.testing.assert_close(guided(x.double(), sigma), -0.9 * x.double(), rtol=1e-14, atol=0)


def test_the_classifier_must_be_differentiable():
    with pytest.raises(ValueError, match="the classifier must be differentiable in x"):
        classifier(lambda x, sigma: -x, lambda x, sigma: x.detach(), 2)(_points(), 0.3, 1)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "weight=1.5"),
        ({"interval": (0.1, 2.0)}, "weight=1.5, interval=(0.1, 2.0)"),
        ({"rescale": 0.7}, "weight=1.5, rescale=0.7"),
        ({"interval": (0.1, 2.0), "rescale": 0.7}, "weight=1.5, interval=(0.1, 2.0), rescale=0.7"),
    ],
)
def test_the_repr_shows_the_options_that_are_used(options, shown):
    guided = classifier_free(Labeled(), 1.5, **options)
    assert guided.extra_repr() == shown and shown in repr(guided)


# -- Networks and samplers


def _net(seed=0, **options):
    torch.manual_seed(seed)
    options = {"widths": (4, 8), "layers_per_block": 1, "schedule": LEVELS, "classes": 3, "null_class": True, **options}
    net = ScoreNet.unet(1, 8, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x, sigma):
        return self.layers(x) / (1 + sigma[:, None])


def _guided(kind, **interval):
    if kind == "classifier_free":
        return classifier_free(_net(), 2, **interval)
    if kind == "autoguidance":
        return autoguidance(_net(), _net(1, widths=(4,)), 2, **interval)
    return classifier(_net(classes=None, null_class=False), Classifier().eval(), 2, **interval)


every_kind = pytest.mark.parametrize("kind", ["classifier_free", "autoguidance", "classifier"])


@pytest.mark.slow
@every_kind
@torch.no_grad()
def test_a_guided_network_and_its_inference_copy(kind, rng):
    guided = _guided(kind)
    net, x, labels = guided.net, torch.rand(5, 1, 8, 8, generator=rng), torch.tensor([0, 2, 1, 1, 0])
    copy = guided.inference_copy()
    assert type(copy) is type(guided) and type(copy.net) is InferenceScore and copy.is_inference_copy
    assert (type(copy.other) is InferenceScore) == (kind == "autoguidance") and not guided.is_inference_copy
    for one in (guided, copy):
        assert (one.schedule, one.value_range, one.sample_shape) == (LEVELS, (0, 1), (1, 8, 8))
        assert (one.weight, one.interval) == (2.0, None)
        classes = None if kind == "classifier" else Condition(classes=3, null_class=kind == "autoguidance")
        assert one.conditioning == classes
    for score, part in ((guided, net), (copy, copy.net)):
        if kind == "classifier_free":
            a, b = part(x, 0.3, 3), part(x, 0.3, labels)
        elif kind == "autoguidance":
            a, b = score.other(x, 0.3, labels), part(x, 0.3, labels)
        else:
            continue
        found, expected = score(x, 0.3, labels), a + 2 * (b - a)
        # The copy may compute in bfloat16, where batches of another size are rounded differently.
        assert (found - expected).norm() < (1e-5 if score is guided else 0.02) * expected.norm()
    assert (copy(x, 0.3, labels) - guided(x, 0.3, labels)).norm() < 0.03 * guided(x, 0.3, labels).norm()
    torch.testing.assert_close(guided.denoise(x, 0.3, labels), x + 0.09 * guided(x, 0.3, labels))
    assert torch.equal(Denoiser(guided)(x, 0.3, labels), guided.as_denoiser()(x, torch.tensor([[[0.3]]]), labels))


@pytest.mark.slow
@every_kind
def test_a_guided_network_is_sampled_like_the_function_that_it_computes(kind):
    guided = _guided(kind)
    sampler = ODESampler(guided, levels=4, precision="float32")
    images = run(sampler, 3, condition=1, generator=0)
    plain = ODESampler(lambda *arguments: guided(*arguments), sampler.schedule, clamp=False)
    init = 0.5 + LEVELS.sigma_max * torch.randn(3, 1, 8, 8, generator=seed(0))
    torch.testing.assert_close(images, run(plain, init=init, condition=1).clamp(0, 1), rtol=1e-4, atol=1e-4)
    copied = ODESampler(guided.inference_copy(), levels=4)
    assert torch.equal(
        run(copied, 3, condition=1, generator=0), run(ODESampler(guided, levels=4), 3, condition=1, generator=0)
    )
    with pytest.raises(ValueError, match="needs the network itself, but net is an inference copy"):
        ODESampler(guided.inference_copy(), precision="float32")


@every_kind
def test_sampling_is_in_eval_mode_and_restores_the_modes(kind):
    guided = _guided(kind)
    expected = run(AncestralSampler(guided, levels=3, precision="float32"), 2, condition=0, generator=0)
    guided.train()
    for module in guided.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    assert torch.equal(
        run(AncestralSampler(guided, levels=3, precision="float32"), 2, condition=0, generator=0), expected
    )
    assert all(module.training for module in guided.modules())


@pytest.mark.slow
@every_kind
def test_recommended_settings_and_batches_of_many_images(kind):
    guided = _guided(kind)
    guided.net.sampler_settings = SamplerSettings("ode", levels=3)
    sampler = recommended_sampler(guided)
    assert str(sampler) == str(recommended_sampler(guided.net)) and len(sampler) == 5
    classes = 3 if kind == "classifier" else None
    batches = list(bulk_samples(sampler, 5, batch_size=3, classes="cycle", n_classes=classes))
    assert [batch.classes.tolist() for batch in batches] == [[0, 1, 2], [0, 1]]
    again = next(bulk_samples(sampler, 2, first=3, batch_size=3, classes="cycle", n_classes=classes))
    assert torch.equal(again.images, batches[1].images) and again.images.std() > 0


def test_identities_of_guided_scores_differ_by_everything_that_changes_them():
    net, weaker = _net(), _net(1)
    scores = [
        net,
        classifier_free(net, 2),
        classifier_free(net, 3),
        classifier_free(net, 2, interval=(0.1, 1)),
        classifier_free(net, 2, rescale=0.5),
        classifier_free(weaker, 2),
        autoguidance(net, weaker, 2),
        autoguidance(weaker, net, 2),
    ]
    assert len({identity(score) for score in scores}) == len(scores)
    assert identity(classifier_free(net, 2.0)) == identity(scores[1])


def test_guided_scores_can_be_guided():
    net, weaker, x = Labeled(), Labeled(std=1.0), _points()
    both = autoguidance(classifier_free(net, 2.0), classifier_free(weaker, 2.0), 1.5)
    a, b = (classifier_free(one, 2.0)(x, 0.3, LABELS) for one in (weaker, net))
    torch.testing.assert_close(both(x, 0.3, LABELS), a + 1.5 * (b - a))
    with pytest.raises(ValueError, match="from 0 to 1: pass condition="):
        both(x, 0.3)
    assert both.inference_copy().net.weight == 2.0


def test_the_weights_of_classifiers_of_classifiers_add_up():
    labeled, x = Labeled(), _points()
    first = classifier(_unconditional(labeled), labeled.logits, 1.5)
    for inner in (first, autoguidance(first, _unconditional(labeled), 1.0)):
        found = classifier(inner, labeled.logits, 0.5)(x, 0.3, LABELS)
        torch.testing.assert_close(found, classifier_free(labeled, 2.0)(x, 0.3, LABELS))


@pytest.mark.parametrize("restore", ["replace", "guide", "guide-jacobian"])
def test_restoration_with_a_classifier_equals_that_with_classifier_free_guidance(restore):
    labeled = Labeled()
    observation = Observation(Mask(torch.tensor([True, False])), torch.tensor([[0.4, 0.0]]), sigma=0.3)
    found = [
        run(
            AnnealedLangevinSampler(guided, LEVELS, consistent=True, restore=restore),
            shape=(2,),
            condition=LABELS,
            observation=observation,
            generator=0,
        )
        for guided in (
            classifier_free(labeled, 1.5),
            classifier(lambda x, sigma: labeled(x, sigma), lambda x, sigma: labeled.logits(x, sigma).to(x), 1.5),
        )
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("derive", [lambda score: autoguidance(score, score, 2.0), lambda score: Tiled(score, 4)])
def test_restoration_with_a_derived_score_uses_the_deviation_of_the_data(derive):
    """Guidance has the score of the posterior for data with the covariance v I, if v is that of the score."""
    exact = Gaussian(torch.zeros(4), 300.0**2, (1, 4), schedule=NoiseSchedule.geometric(6000, 3, 40))
    mask = Mask(torch.tensor([True, True, True, False]))
    observation = Observation(mask, torch.full((1, 1, 4), 200.0), sigma=100.0)
    derived, x = derive(exact), 300 * torch.randn(5, 1, 4, generator=seed())
    method = ODESampler(derived, restore="guide").restoration(observation)
    found = method.score(derived, x, torch.tensor(200.0), slice(0, 5))
    torch.testing.assert_close(found, exact.posterior(observation)(x, 200.0), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_likelihood_under_bayes_rule_is_that_of_the_class():
    labeled, x = Labeled(), _points(3)
    schedule = NoiseSchedule.geometric(20, 0.1, 8)
    guided = classifier(_unconditional(labeled), labeled.logits, 1.0)
    found = log_likelihood(guided, x, schedule, probes=None, condition=1, progress=False)
    expected = log_likelihood(labeled, x, schedule, probes=None, condition=torch.ones(3).long(), progress=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "kind",
    ["classifier_free", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("autoguidance", "classifier"))],
)
@torch.no_grad()
def test_guidance_reads_no_value_of_a_device_and_needs_no_float64(kind):
    """Tensors on the meta device have no values: reading one raises an error."""
    guided = _guided(kind, interval=(0.1, 1.0)).to("meta")
    x, labels = torch.empty(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    with NoFloat64():
        assert guided.inference_copy()(x, 0.3, labels).shape == x.shape
        for sigma in (torch.empty((), device="meta"), torch.empty(4, device="meta")):
            assert guided(x, sigma, labels).shape == x.shape


# -- Variances


class Varied(Labeled):
    """It predicts a variance, another for each class."""

    predicts_variance = True

    def score_and_variance(self, x, sigma, condition=None):
        share = torch.sigmoid(x if condition is None else x * (1 + condition[:, None]))
        return self(x, sigma, condition), share


@pytest.mark.parametrize("weight", [*(pytest.param(weight, marks=pytest.mark.slow) for weight in (0.0, 1.0)), 2.5])
@pytest.mark.parametrize("guidance", ["classifier_free", "autoguidance", "classifier"])
def test_a_guided_score_has_the_variance_of_the_network_for_the_class(guidance, weight):
    net, x, labels = Varied(), _points(), torch.tensor([0, 1, 1, 0, 1, 0])
    guided = {
        "classifier_free": classifier_free(net, weight),
        "autoguidance": autoguidance(net, Labeled(std=0.7), weight),
        "classifier": classifier(net, net.logits, weight),
    }[guidance]
    for sigma in (0.3, torch.linspace(0.2, 2, 6, dtype=torch.float64)):
        score, share = guided.score_and_variance(x, sigma, labels)
        torch.testing.assert_close(score, guided(x, sigma, labels))
        assert torch.equal(share, net.score_and_variance(x, torch.as_tensor(sigma), labels)[1])
    samplers = [AncestralSampler(one, LEVELS, variance="learned") for one in (guided, net)]
    found, expected = (run(sampler, 4, shape=(2,), condition=1, generator=0) for sampler in samplers)
    assert torch.equal(found, expected) == (weight == (0 if guidance == "classifier" else 1))
    with pytest.raises(ValueError, match="predicts no variance"):
        classifier_free(Labeled(), weight).score_and_variance(x, 0.3, labels)


# -- Bad input


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export
@torch.no_grad()
def test_a_guided_network_can_be_exported_for_batches_of_any_length():
    torch.manual_seed(0)
    net = ScoreNet.mlp(2, width=8, depth=1, classes=2, null_class=True).eval()
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    score, batch = classifier_free(net, 2.0), torch.export.Dim("batch", min=1, max=64)
    given = _points(4).float(), torch.full((4,), 0.3), LABELS[:4]
    exported = torch.export.export(score, given, dynamic_shapes=tuple({0: batch} for _ in given), strict=False).module()
    given = _points(6).float(), torch.full((6,), 0.3), LABELS
    torch.testing.assert_close(exported(*given), score(*given))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: classifier_free(_net(null_class=False), 2),
            ValueError,
            "needs a network with a null class.*null_class=",
        ),
        (
            lambda: classifier_free(_net(classes=None, null_class=False), 2),
            ValueError,
            "needs a network with a null class",
        ),
        (lambda: classifier_free(lambda x, sigma, c: x, 2), ValueError, "needs a network with a null class"),
        (lambda: classifier_free(3, 2), TypeError, r"net must be a score, called as net\(x, sigma\), got int"),
        (lambda: classifier_free(_net(), "2"), ValueError, "weight must be a finite number, got '2'"),
        (lambda: classifier_free(_net(), float("nan")), ValueError, "weight must be a finite number, got nan"),
        (lambda: classifier_free(_net(), 2, interval=3), ValueError, "with 0 <= low < high, got 3"),
        (lambda: classifier_free(_net(), 2, interval=(1, 0.1)), ValueError, r"0 <= low < high, got \(1, 0.1\)"),
        (lambda: classifier_free(_net(), 2, rescale=1.5), ValueError, "rescale must be a number from 0 to 1, got 1.5"),
        (lambda: autoguidance(_net(), None, 2), TypeError, r"weaker must be a score, .* got NoneType"),
        (lambda: classifier(_net(), torch.zeros(3), 2), TypeError, r"classifier must be a function, .* got Tensor"),
        (
            lambda: autoguidance(_net(), ScoreNet.unet(3, 8, widths=(4,)), 2),
            ValueError,
            r"whose sample_shape is \(1, 8, 8\), got \(3, 8, 8\)",
        ),
        (
            lambda: classifier_free(Labeled(), 2)(_points(), 0.3),
            ValueError,
            "classes as its condition, .*from 0 to 1: pass",
        ),
        (lambda: classifier_free(Labeled(), 2)(_points(), 0.3, 2), ValueError, "from 0 to 1, got class 2"),
        (lambda: classifier_free(Labeled(), 2)(_points(), 0.0, 1), ValueError, "sigma must be positive, got 0"),
        (lambda: classifier_free(Labeled(), 2)(_points(), 0.3, torch.zeros(6)), TypeError, "classes as its condition"),
        (
            lambda: classifier(lambda x, s: -x, Labeled().logits, 2)(_points(), 0.3),
            ValueError,
            "classes as its condition.*pass condition=",
        ),
        (lambda: classifier(lambda x, s: -x, Labeled().logits, 2)(_points(), 0.3, 2), ValueError, "got class 2"),
        (
            lambda: classifier(lambda x, s: -x, lambda x, s: x[0], 2)(_points(), 0.3, 0),
            ValueError,
            r"logits \(6, K\), one row for each sample, got shape \(2,\)",
        ),
        (
            lambda: classifier_free(Labeled(), 2).inference_copy(compile=True),
            ValueError,
            "compile=True needs a ScoreNet",
        ),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()
