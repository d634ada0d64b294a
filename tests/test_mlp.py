"""Networks for vectors, and vectors as the condition of a network."""

import math

import pytest
import torch

from scorematch import AnnealedLangevinSampler, ScoreNet, dsm_loss
from scorematch.evaluation.exact import Gaussian
from scorematch.guidance import classifier_free
from scorematch.likelihood import log_likelihood
from scorematch.nets.blocks import begin_null
from scorematch.restoration import Matrix, Observation
from scorematch.sampling import ODESampler
from scorematch.training.levels import LogNormal, weighting_for
from tests.helpers import seed

COVARIANCE = torch.tensor([[4.0, 1.5], [1.5, 1.0]])
MEAN = torch.tensor([10.0, -2.0])


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number))


def perturbed(net):
    """The output of a new network is zero."""
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


def network(condition_features=0, **options):
    torch.manual_seed(0)
    net = ScoreNet.mlp(2, width=32, depth=2, condition_features=condition_features, **options)
    return perturbed(net)


def small_unet(**options):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, (8,), widths=(8,), layers_per_block=1, **options)
    return perturbed(net)


@pytest.fixture(scope="module")
def trained():
    """A network of a normal distribution whose mean is the condition, in units of the data."""
    torch.manual_seed(0)
    net = ScoreNet.mlp(2, width=64, depth=2, condition_features=2)
    condition = 3 * random(4096, 2)
    x = condition + MEAN + random(4096, 2, number=1) @ torch.linalg.cholesky(COVARIANCE).T
    net.fit_units(x, condition)
    levels, weighting = LogNormal(*net.preconditioning.log_levels), weighting_for(net, None, 2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for step in range(300):
        rows = torch.randint(len(x), (256,), generator=seed(step))
        sigma = levels.quantile(torch.rand(256, generator=seed(step))).float()
        given = condition[rows].clone()
        given[:25] = torch.nan
        loss = dsm_loss(net, x[rows], sigma=sigma, weighting=weighting, condition=given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@pytest.mark.slow
def test_samples_have_the_moments_of_the_condition(trained):
    for number, center in enumerate(([0.0, 0.0], [3.0, -4.0])):
        condition = torch.tensor(center).expand(2000, 2)
        x = ODESampler(trained).sample(condition=condition, generator=number, progress=False)
        assert torch.allclose(x.mean(0), MEAN + condition[0], atol=0.4)
        assert torch.allclose(x.T.cov(), COVARIANCE, atol=0.6)


@pytest.mark.slow
def test_without_a_condition_the_network_knows_the_distribution_of_all_data(trained):
    x = ODESampler(trained).sample(2000, generator=0, progress=False)
    assert torch.allclose(x.mean(0), MEAN, atol=0.5)
    assert torch.allclose(x.T.cov(), COVARIANCE + 9 * torch.eye(2), atol=2.0)
    y = random(4, 2)
    assert torch.equal(trained(y, 1.0), trained(y, 1.0, torch.full((4, 2), torch.nan)))


@pytest.mark.slow
def test_the_log_likelihood_and_the_posterior_of_a_trained_network(trained):
    condition = torch.zeros(200, 2)
    exact = Gaussian(MEAN, COVARIANCE)
    x = exact.sample(200, 0)
    found = log_likelihood(trained, x, trained.schedule.respaced(60), probes=None, condition=condition, progress=False)
    assert found.mean() == pytest.approx(float(exact.log_density(x).mean()), abs=0.25)
    observation = Observation(Matrix(torch.tensor([[1.0, 0.0]])), torch.tensor([[12.0]]), 0.1)
    sampler = ODESampler(trained, restore="guide-jacobian")
    y = sampler.sample(200, condition=condition, observation=observation, generator=0, progress=False)
    assert y[:, 0].mean() == pytest.approx(12, abs=0.3)


def test_guidance_with_a_vector():
    """Between the score without and with the condition, and beyond."""
    net = ScoreNet.mlp(2, width=8, depth=2, condition_features=2).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    x, condition = 10 + random(4, 2), random(4, 2, number=1)
    with torch.no_grad():
        none, given = net(x, 2.0), net(x, 2.0, condition)
        assert not torch.allclose(none, given, atol=1e-3)
        assert torch.allclose(classifier_free(net, 1.5)(x, 2.0, condition), none + 1.5 * (given - none), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: network(3), lambda: small_unet(condition_features=3)], ids=["mlp", "unet"])
def test_every_use_of_a_network_with_a_vector(make, tmp_path):
    net = make()
    x, condition = random(4, *net.sample_shape), random(4, 3, number=1)
    net.fit_units(10 * x + 3, condition)
    y = net(x, 0.3, condition).detach()
    assert not torch.allclose(y, net(x, 0.3, 2 * condition))
    assert torch.allclose(net(x[1:2], 0.3, condition[1:2]), y[1:2], rtol=1e-4, atol=1e-5)
    copy = net.inference_copy()
    assert copy is not net and torch.allclose(copy(x, 0.3, condition), y, rtol=0.05, atol=0.05 * float(y.std()))
    half = torch.cat([condition[:2], torch.full((2, 3), torch.nan)])
    assert torch.allclose(net(x, 0.3, half)[2:], net(x, 0.3)[2:], atol=1e-6)
    net.save_pretrained(tmp_path)
    assert torch.equal(ScoreNet.from_pretrained(tmp_path)(x, 0.3, condition), y)
    dsm_loss(net, x, condition=half, generator=seed()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    sampler = AnnealedLangevinSampler(net, levels=3)
    assert sampler.sample(condition=condition, generator=0, progress=False).shape == x.shape


def test_classes_of_vectors():
    net = network(classes=3, null_class=True)
    x = random(3, 2)
    assert not torch.allclose(net(x, 0.3, 0), net(x, 0.3, 1)) and torch.equal(net(x, 0.3), net(x, 0.3, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export
@pytest.mark.parametrize("encoder", [None, torch.nn.Linear(3, 3)])
@pytest.mark.parametrize("make", [network, small_unet])
@torch.no_grad()
def test_exported_networks_of_vectors_take_batches_of_any_length(make, encoder):
    net = make(condition_features=3, condition_encoder=encoder)
    begin_null(net.backbone)
    shape = net.sample_shape

    def arguments(n):
        return random(n, *shape), torch.full((n,), 0.3), random(n, 3, number=1)

    batch = torch.export.Dim("batch", min=1, max=64)
    for count in (2, 3):  # without a condition, and with one
        shapes = tuple({0: batch} for _ in range(count))
        exported = torch.export.export(net, arguments(4)[:count], dynamic_shapes=shapes, strict=False).module()
        given = arguments(7)[:count]
        torch.testing.assert_close(exported(*given), net(*given))


def test_a_new_network_is_the_score_of_a_normal_distribution():
    torch.manual_seed(0)
    net, x = ScoreNet.mlp(5, precondition="flow"), random(3, 5)
    assert all(not parameter.any() for parameter in net.backbone.linear_out.parameters())
    sigma = 0.7
    assert torch.allclose(net(x, sigma), -x / (sigma * (1 + sigma)))
    karras = ScoreNet.mlp(5)
    assert torch.allclose(karras(x, sigma), -x / (sigma**2 + 0.25))
    assert karras.schedule.sigma_min == 0.005 and math.isclose(karras.schedule.sigma_max, 50)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: network()(random(2, 3), 0.3), ValueError, r"x must be vectors \(N, 2\), got shape \(2, 3\)"),
        (lambda: network(3)(random(2, 2), 0.3, random(2, 4)), ValueError, r"a vector .*\(N, 3\), got shape \(2, 4\)"),
        (lambda: network()(random(2, 2), 0.3, random(2, 4)), TypeError, "takes no condition"),
        (
            lambda: ScoreNet.mlp(2, classes=3)(random(2, 2), 0.3, torch.tensor([[0], [1]])),
            ValueError,
            r"classes must have shape \(2,\) like the batch, got \(2, 1\)",
        ),
        (lambda: ScoreNet.mlp(0), ValueError, "features must be an integer of at least 1"),
        (lambda: network().fit_units(random(8, 2), random(8, 3)), TypeError, "takes no vector as its condition"),
        (lambda: network(3).fit_units(random(8, 2), torch.ones(8, 3)), ValueError, "value 0 of condition is constant"),
        (lambda: ScoreNet.mlp(2, precondition="ncsn"), ValueError, "precondition must be one of 'karras', 'flow'"),
    ],
)
def test_invalid_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()
