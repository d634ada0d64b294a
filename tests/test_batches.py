"""Checks of batches of data, and of the units of their values."""

import math
from contextlib import nullcontext

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.core.batches import is_outside
from scorematch.data import open_images


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)], ids=str)
def test_values_may_exceed_the_range_by_a_tenth_of_it(value_range):
    low, high = value_range
    margin = 0.1 * (high - low)
    assert not is_outside(low - margin, high + margin, value_range)
    assert is_outside(math.nextafter(low - margin, -math.inf), high, value_range)
    assert is_outside(low, math.nextafter(high + margin, math.inf), value_range)
    assert is_outside(math.nan, math.nan, value_range)


@pytest.mark.parametrize(("end", "refused"), [(-0.099, False), (-0.101, True), (1.099, False), (1.101, True)])
def test_images_from_which_levels_are_made_may_exceed_the_range_by_a_tenth(end, refused, rng):
    x = torch.rand(4, 1, 8, 8, generator=rng)
    x[1, 0, 2, 3] = end
    with pytest.raises(ValueError, match=r"must have values in \[0, 1\]") if refused else nullcontext():
        NoiseSchedule.from_data(x)


@pytest.mark.parametrize(("end", "refused"), [(-1.199, False), (-1.201, True), (1.199, False), (1.201, True)])
def test_pictures_of_another_range_may_exceed_it_by_a_tenth(end, refused):
    x = torch.zeros(4, 1, 8, 8)
    x[1, 0, 2, 3] = end
    with pytest.raises(ValueError, match=r"must have values in \[-1, 1\]") if refused else nullcontext():
        open_images(x, value_range=(-1, 1))
