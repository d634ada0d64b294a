"""Converted networks that were trained: samples of the published samplers are images like the data, not noise.

A network of each family is trained for some seconds on images of one round blob, and saved and read in its authors'
format. Its samples are compared with the blobs that they are nearest to. The samplers that do not clamp the denoised
image, such as that of score_sde, give noise for a network that was trained too little: at the highest levels a small
error of the predicted noise is a large error of the image.
"""

import json
import math

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.sampling import recommended_sampler
from tests import published as theirs
from tests.published import randomize
from tests.test_published import _improved, _score_sde

pytestmark = pytest.mark.slow
GUIDED = {"num_head_channels": 16, "resblock_updown": True, "learn_sigma": True, "use_new_attention_order": True}
SIZE, PLACES = 8, (3.0, 4.0)  # of an image, and of the center of a blob, in pixels


def _at(centers):
    """Images of blobs with the given centers, (N, 2), in [0, 1]."""
    pixels, centers = torch.arange(SIZE).float(), centers[:, :, None, None]
    squares = (pixels[:, None] - centers[:, 0]) ** 2 + (pixels - centers[:, 1]) ** 2
    return torch.exp(-squares / 3)[:, None]


def _blobs(n, generator):
    low, high = PLACES
    return _at(low + (high - low) * torch.rand(n, 2, generator=generator))


def _distances(images):
    """The root mean square difference of each image and channel from the blob nearest to it."""
    line = torch.linspace(*PLACES, 31)
    every = _at(torch.cartesian_prod(line, line)).flatten(1)
    return torch.cdist(images.flatten(0, 1).flatten(1), every).amin(1) / SIZE


def _train(net, loss, *, steps=300, rate=1e-2):
    """Trains with a loss of (images, noise, generator), and returns the network."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    net.train()
    for _ in range(steps):
        x = _blobs(32, generator)
        optimizer.zero_grad()
        loss(x, torch.randn(x.shape, generator=generator), generator).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


def _samples(net, sampler=None):
    sampler = recommended_sampler(net) if sampler is None else sampler
    shape = net.sample_shape or (1, SIZE, SIZE)  # a checkpoint of NCSN does not have it
    return sampler.sample(12, shape=shape, generator=0, progress=False)


def _broad(values):
    return values[:, None, None, None]


# -- The networks, each in a file of its authors


def _loss_of_score(net):
    """Of a network that predicts the score, at its own noise levels."""
    levels = net.schedule.sigmas.float()

    def loss(x, z, generator):
        sigma = levels[torch.randint(len(levels), (len(x),), generator=generator)]
        return (_broad(sigma) * net(x + _broad(sigma) * z, sigma) + z).square().mean()

    return loss


def _weights(net):
    return {f"module.{name}": value for name, value in net.backbone.state_dict().items()}


@pytest.fixture(scope="session")
def trained_ncsn(tmp_path_factory):
    torch.manual_seed(0)
    net = ScoreNet.ncsn(1, SIZE, width=4, schedule=NoiseSchedule.geometric(1, 0.01, 10))
    _train(net, _loss_of_score(net), rate=2e-2, steps=150)
    path = tmp_path_factory.mktemp("ncsn") / "checkpoint.pth"
    torch.save([_weights(net), {}], path)
    return ScoreNet.from_checkpoint(path)


def _ncsnv2_network(folder):
    torch.manual_seed(0)
    schedule = NoiseSchedule.geometric(5, 0.01, 30)
    net = ScoreNet.ncsnv2(1, SIZE, width=4, schedule=schedule)
    _train(net, _loss_of_score(net))
    average = dict(net.backbone.state_dict())
    torch.save([{**_weights(net), "module.sigmas": schedule.sigmas.float()}, {}, 5, 300, average], folder / "model.pth")
    sampling = {"n_steps_each": 5, "step_lr": schedule.suggest_step_size(5), "denoise": True}
    config = {"model": {}, "data": {"image_size": SIZE}, "sampling": sampling}
    (folder / "config.json").write_text(json.dumps(config))
    return ScoreNet.from_checkpoint(folder / "model.pth", config=folder / "config.json")


def _in_color(loss):
    """A loss of images of three equal channels, whose noise is not equal."""

    def colored(x, z, generator):
        x = x.expand(-1, 3, -1, -1)
        return loss(x, torch.randn(x.shape, generator=generator), generator)

    return colored


def _loss_of_ddpm(net):
    """Of a network that predicts the noise of images in [-1, 1], and perhaps a variance."""
    betas = torch.linspace(1e-3, 0.2, 100, dtype=torch.float64)
    levels = (1 / torch.cumprod(1 - betas, 0) - 1).sqrt().float()

    def loss(x, z, generator):
        steps = torch.randint(len(levels), (len(x),), generator=generator)
        s = _broad(levels[steps])
        return (net((2 * x - 1 + s * z) / (1 + s**2).sqrt(), steps.float())[:, :3] - z).square().mean()

    return _in_color(loss)


def _score_sde_network(folder, sde):
    config = _score_sde(
        sde, continuous=sde == "vesde", nf=16, ch_mult=[1], attn_resolutions=[], sigma_max=5, num_scales=100
    )
    if sde == "vpsde":
        config["sampling"] = {"predictor": "ancestral_sampling", "corrector": "none"}
    net = randomize(theirs.ScoreSDE(config), 1)

    def loss(x, z, generator):
        sigma = torch.exp(math.log(0.01) + math.log(500) * torch.rand(len(x), generator=generator))
        return (net(x + _broad(sigma) * z, sigma) + z).square().mean()

    _train(net, _in_color(loss) if sde == "vesde" else _loss_of_ddpm(net))
    theirs.save_score_sde(net, folder / "checkpoint.pth")
    (folder / "config.json").write_text(json.dumps(config))
    return ScoreNet.from_checkpoint(folder / "checkpoint.pth", config=folder / "config.json")


def _improved_network(folder, **options):
    options = _improved(diffusion_steps=100, channel_mult=[2], attention_resolutions=[], **options)
    net = randomize(theirs.ImprovedUNet(options), 1)
    _train(net, _loss_of_ddpm(net), rate=5e-3, steps=150)
    theirs.save_improved(net, folder / "model.pt")
    (folder / "options.json").write_text(json.dumps(options))
    return ScoreNet.from_checkpoint(folder / "model.pt", config=folder / "options.json")


def _edm_network(folder):
    inner = randomize(theirs.SongUNet(SIZE, model_channels=16, channel_mult=(1,), attn_resolutions=()), 1)
    net = theirs.Preconditioned("EDMPrecond", inner, sigma_min=0, sigma_max=math.inf, sigma_data=0.5)

    def loss(x, z, generator):
        y, s = 2 * x - 1, torch.exp(1.4 * torch.randn(len(x), generator=generator) - 1)
        total = _broad((s**2 + 0.25).sqrt())
        noisy, s, level = y + _broad(s) * z, _broad(s), s.log() / 4
        target = (y - 0.25 / total**2 * noisy) * total / (0.5 * s)
        return (inner(noisy / total, level, None) - target).square().mean()

    _train(net, _in_color(loss), steps=150)
    theirs.save_edm(net, folder / "net.pkl")
    return ScoreNet.from_checkpoint(folder / "net.pkl")


# -- Their samples


def test_samples_of_ncsn_are_images_with_the_published_sampler_and_not_with_levels_in_between(trained_ncsn):
    """Levels in between, of which the network knows nothing, were the default before its own sampler was stored."""
    assert len(recommended_sampler(trained_ncsn)) == 1000
    few = AnnealedLangevinSampler(trained_ncsn, steps_per_level=20)  # with the step size 2e-5 also enough
    assert few.step_size == 2e-5
    published = _distances(_samples(trained_ncsn, few)).median()
    between = trained_ncsn.schedule.respaced(100)
    with pytest.warns(UserWarning, match="90 of the 100 noise levels of the schedule are not among the 10"):
        sampler = AnnealedLangevinSampler(trained_ncsn, between, consistent=True)
    assert published < 0.12
    assert _distances(_samples(trained_ncsn, sampler)).median() > 1.5 * published


@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (_ncsnv2_network, "langevin"),
        (lambda folder: _score_sde_network(folder, "vesde"), "predictor-corrector"),
        (lambda folder: _score_sde_network(folder, "vpsde"), "ancestral"),
        (lambda folder: _improved_network(folder, sigma_small=True), "ancestral"),
        (lambda folder: _improved_network(folder, **GUIDED), "ancestral"),
        (_edm_network, "ode"),
    ],
    ids=["NCSNv2", "score_sde, VE", "score_sde, VP", "improved-diffusion", "guided-diffusion", "EDM"],
)
def test_samples_with_the_published_sampler_are_images(make, sampler, tmp_path):
    net = make(tmp_path)
    assert net.sampler_settings.sampler == sampler
    distances = _distances(_samples(net))
    noise = _distances(torch.rand(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    assert distances.median() < 0.12 < 0.4 < noise.median()
