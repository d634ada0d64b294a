"""The start from the normal distribution of noisy data: the flow from very high noise, and what it is computed from."""

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.core.cosines import Cosines
from scorematch.restoration import Grayscale, Observation
from scorematch.sampling import ODESampler, SamplerSettings, data_moments
from tests.helpers import run, seed

SHAPE = (3, 6, 4)
MEAN = [0.5, -2.0, 0.1]
COSINES = Cosines(torch.zeros(1, *SHAPE))
SPECTRUM = [9 / (1 + i) for i in range(COSINES.bands)]
VARIANCES = COSINES.spread(torch.tensor([SPECTRUM]))
MIDDLE = torch.tensor(MEAN).view(-1, 1, 1)


def normal_score(x, sigma):
    """The score of normal data with these moments."""
    return COSINES.inverse(COSINES.transform(MIDDLE - x) / (VARIANCES + sigma**2))


@pytest.mark.slow
def test_the_start_is_where_the_flow_of_normal_data_is_and_its_moments_are_found():
    z = torch.randn(1000, *SHAPE, generator=seed(0))
    few = ODESampler(
        normal_score, sigmas=[0.7, 0.6], method="unipc", denoise=False, data_mean=MEAN, data_spectrum=SPECTRUM
    )
    assert str(few) == "ODESampler(2 levels 0.7 -> 0.6, unipc, normal start, 1 network calls)"
    flow = ODESampler(normal_score, NoiseSchedule.geometric(1e4, 0.7, 80), method="unipc", order=3, denoise=False)
    torch.testing.assert_close(few.start(z[:8]), run(flow, init=MIDDLE + 1e4 * z[:8]), rtol=1e-3, atol=2e-3)

    found = data_moments(few.start(z))
    size = COSINES.spread(torch.eye(COSINES.bands)).flatten(1).sum(1)
    variance = torch.tensor(SPECTRUM) + 0.7**2
    errors = (torch.tensor(found["data_spectrum"]) / variance - 1) / (2 / (1000 * size)).sqrt()
    assert errors.abs().max() < 5
    assert found["data_mean"] == pytest.approx(MEAN, abs=5 * float((variance.max() / 1000).sqrt()))


def test_the_moments_are_stored_and_checked():
    images = torch.randn(50, *SHAPE, generator=seed(0))
    settings = SamplerSettings("ode", method="unipc", sigmas=[0.7, 0.1], **data_moments(images))
    assert SamplerSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match=r"data_mean.*data_spectrum"):
        SamplerSettings("ode", method="unipc", sigmas=[0.7, 0.1], data_mean=MEAN)
    with pytest.raises(ValueError, match="two or more samples"):
        data_moments(images[:1])
    short = ODESampler(normal_score, sigmas=[0.7, 0.1], data_mean=MEAN, data_spectrum=SPECTRUM[:-1])
    with pytest.raises(
        ValueError, match=rf"data_spectrum must have {len(SPECTRUM)} numbers .* got {len(SPECTRUM) - 1}"
    ):
        short.sample(1, shape=SHAPE, progress=False)
    with pytest.warns(UserWarning, match="the highest level of this sampler, 0.7, is for a start from the normal"):
        run(ODESampler(normal_score, **settings.options), observation=Observation(Grayscale(), images[:1, :1]))
