"""The tasks of Palette: their conditions and masks, and the scores that minimize its loss."""

import math

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.restoration import JPEG, AveragePool, Grayscale, Half, Hole, Mask, Observation, Uncrop
from scorematch.restoration.masks import Draws
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
from scorematch.sampling import AncestralSampler
from tests.helpers import NoFloat64, seed

SIZES = [(16, 16), (32, 32), (64, 64), (48, 96)]
EVERY = [task() for task in TASKS.values()]
EVERY.append(MultiTask(EVERY))


def holes(task, size, n, generator):
    """At most n masks (n, H, W) of a task, fewer for large images, and the share of the area that each covers."""
    n = min(n, 2**19 // (size[0] * size[1]))
    x = torch.zeros(n, 1, *size)
    condition, mask = task(x, generator)
    assert torch.equal(condition[~mask], x[~mask])
    return mask[:, 0], mask.float().mean((1, 2, 3))


def chi_square_is_plausible(counts, probabilities):
    """Whether the chi-square statistic is below its mean plus four standard deviations (p > 1e-3 in these tests)."""
    expected = probabilities / probabilities.sum() * counts.sum()
    degrees = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum()) < degrees + 4 * math.sqrt(2 * degrees)


# -- Properties of every task


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_tasks_return_the_documented_shapes_and_follow_the_seed(task, rng):
    x = torch.rand(16, 3, 24, 20, generator=rng, dtype=torch.float64)
    before, state = x.clone(), torch.get_rng_state()
    condition, mask = task(x, seed(0))
    assert condition.shape == x.shape and condition.dtype == x.dtype
    assert mask.dtype == torch.bool and mask.expand_as(x).flatten(1).any(1).all()
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    for again in (task(x, seed(0)), task(x, 0)):  # an int is a seed
        assert torch.equal(condition, again[0]) and torch.equal(mask, again[1])
    if not isinstance(task, Colorization):  # it draws no random numbers
        assert not torch.equal(condition, task(x, seed(1))[0])
    torch.manual_seed(3)
    first = task(x)[0]
    torch.manual_seed(3)
    assert torch.equal(first, task(x)[0])
    torch.set_default_dtype(torch.float64)
    try:
        again = task(x, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(condition, again[0]) and torch.equal(mask, again[1])


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_outside_of_a_hole_the_condition_is_the_image(task, rng):
    """If there is no hole, the mask is the whole image, and the condition differs from the image."""
    x = torch.rand(50, 3, 16, 16, generator=rng)
    condition, mask = task(x, rng)
    hole = ~mask.expand_as(x).flatten(1).all(1)
    shown = torch.where(mask[hole], 0, condition[hole])
    assert torch.equal(shown, torch.where(mask[hole], 0, x[hole]))
    assert (condition[~hole] != x[~hole]).flatten(1).any(1).all()


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_parameters_are_drawn_for_each_image(task, rng):
    x = torch.rand(1, 3, 16, 16, generator=rng).expand(100, -1, -1, -1)
    condition, mask = task(x, rng)
    everywhere = mask.expand_as(x).flatten(1).all(1)[:, None, None, None]
    shown = torch.where(mask & ~everywhere, 0, condition)  # the part outside of the hole, which has no noise
    different = len(torch.unique(shown.flatten(1), dim=0))
    assert different == 1 if isinstance(task, Colorization) else different >= 5


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_every_task_gives_a_finite_loss_and_gradients(task, rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(3, 8, widths=(4,), layers_per_block=1, condition_channels=3)
    x = torch.rand(2, 3, 8, 8, generator=rng)
    condition, mask = task(x, rng)
    loss = dsm_loss(net, x, condition=condition, mask=mask, generator=rng)
    loss.backward()
    assert torch.isfinite(loss) and net.backbone.conv_out.weight.grad.abs().max() > 0


def test_the_repr_of_a_task_has_its_options():
    """By it the settings of two runs are told apart."""
    assert repr(JPEGRestoration()) == "JPEGRestoration(5, 30)" and repr(JPEGRestoration(6)) == "JPEGRestoration(6, 30)"


@pytest.mark.parametrize("task", EVERY, ids=repr)
def test_conditions_are_not_differentiated(task, rng):
    x = torch.rand(2, 3, 8, 8, generator=rng).requires_grad_()
    assert not task(x, rng)[0].requires_grad


def test_no_float64_reaches_a_device():
    """For the tasks that read no values; the others read their masks, or run a codec."""
    x = torch.empty(2, 3, 16, 16, device="meta")
    for task in (Colorization(), Uncropping()):
        with NoFloat64():
            condition, mask = task(x, 0)
        assert condition.device.type == mask.device.type == "meta" and condition.dtype == torch.float32


@pytest.mark.slow
def test_outputs_of_a_task_are_arguments_of_the_loss_and_the_sampler(rng):
    """As in the example of the module: a training loss, and a sample that keeps the values outside of the hole."""
    torch.manual_seed(0)
    net = ScoreNet.unet(
        3, 16, widths=(4, 8), layers_per_block=1, condition_channels=3, schedule=NoiseSchedule.geometric(5, 0.05, 6)
    )
    x = torch.rand(4, 3, 16, 16, generator=rng)
    condition, mask = MultiTask([Inpainting(), Uncropping()])(x, rng)
    loss = dsm_loss(net, x, condition=condition, mask=mask, generator=rng)
    loss.backward()
    assert torch.isfinite(loss) and net.backbone.conv_out.weight.grad.abs().max() > 0
    observation = Observation(Mask(~mask), x)
    restored = AncestralSampler(net).sample(condition=condition, observation=observation, generator=0, progress=False)
    assert torch.equal(restored[(~mask).expand_as(x)], x[(~mask).expand_as(x)])
    assert not torch.equal(restored, x)


# -- Masks


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_uncropping_hides_half_of_the_area_at_the_border(size):
    height, width = size
    masks, shares = holes(Uncropping(), size, 400, seed(0))
    assert (shares - 0.5).abs().max() <= 0.5 / min(size)  # at most half a row of pixels
    top, bottom, left, right = masks[:, 0].all(1), masks[:, -1].all(1), masks[:, :, 0].all(1), masks[:, :, -1].all(1)
    sides = torch.stack([top, bottom, left, right])
    around = sides.all(0)
    assert torch.equal(sides.sum(0), torch.where(around, 4, 1))  # the mask is at one side or at all four
    n = len(masks)
    assert abs(float(around.float().mean()) - 0.5) < 4 * 0.5 / math.sqrt(n)
    assert chi_square_is_plausible(sides[:, ~around].sum(1), torch.ones(4))
    kept = (~masks[around]).float()
    rows, columns = kept.amax(2), kept.amax(1)
    assert torch.equal(kept, rows[:, :, None] * columns[:, None])  # the visible part is a box in the middle
    for line in (rows, columns):
        assert (line - line.flip(1)).abs().sum(1).max() <= 2
    assert torch.equal(masks[top & ~around].sum((1, 2)).unique(), torch.tensor([height // 2 * width]))


@pytest.mark.parametrize(
    "size", [SIZES[0], *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES[1:3]), SIZES[3]], ids=str
)
def test_inpainting_masks_are_never_empty_or_full(size):
    masks, shares = holes(Inpainting(), size, 4000, seed(1))
    assert (masks.any(2).any(1)).all() and not masks.all(2).all(1).any()
    assert shares.max() < 0.7
    # The mean is 0.6 x 0.14 + 0.4 x 0.23. At 16 pixels it is slightly larger, since lines are at least one pixel wide.
    assert abs(float(shares.mean()) - 0.178) < 4 * float(shares.std()) / math.sqrt(len(shares)) + 0.01


@pytest.mark.parametrize("size", [(1, 1), (2, 1)])
def test_an_image_that_is_too_small_for_a_hole_gives_an_error(size):
    """No number of its pixels is 10 to 40 % of them, and boxes would be drawn again without end."""
    with pytest.raises(ValueError, match=f"a random hole needs an image of at least 3 pixels, got {size[0]}x{size[1]}"):
        Hole().drawn(torch.zeros(1, 1, *size), [0])


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 9), (2, 1, 8, 8, 8)])
def test_random_masks_are_for_images(shape):
    for operator in (Hole(), Half()):
        with pytest.raises(ValueError, match=r"(Hole|Half)\(\) is for images \(N, C, H, W\), got shape \(2, "):
            operator.drawn(torch.zeros(shape), [0, 1])


def test_a_hole_in_the_smallest_images():
    for size in ((1, 3), (2, 2), (1, 90)):
        assert Hole().drawn(torch.zeros(1, 1, *size), range(8)).mask.shape == (8, 1, *size)
        missing = Hole().missing(100, *size, Draws(seed(), torch.device("cpu"))).flatten(1)
        assert bool(missing.any(1).all()) and not bool(missing.all(1).any())


@pytest.mark.slow
def test_no_mask_of_the_smallest_images_is_empty_or_full(monkeypatch):
    from scorematch.restoration import operators

    monkeypatch.setattr(operators, "boxes", operators.strokes)
    masks, _ = holes(Inpainting(), (8, 8), 2**13, seed(5))
    assert (masks.any(2).any(1)).all() and not masks.all(2).all(1).any()


def test_inpainting_masks_are_strokes_in_60_and_boxes_in_40_percent(monkeypatch):
    """Strokes are replaced by empty masks; the rest are boxes, which cover 10 to 40 percent of the area."""
    from scorematch.restoration import operators

    n, size = 2000, (32, 32)
    monkeypatch.setattr(operators, "strokes", lambda n, height, width, draws: torch.zeros(n, height, width).bool())
    masks, shares = holes(Inpainting(), size, n, seed(2))
    n = len(masks)
    boxes = shares[shares > 0]
    assert abs(len(boxes) / n - 0.4) < 4 * math.sqrt(0.24 / n)
    assert boxes.min() >= 0.1 and boxes.max() <= 0.4
    assert boxes.quantile(0.05) < 0.14 and boxes.quantile(0.95) > 0.32  # the shares cover the range
    masks = masks[shares > 0]
    single = (masks == masks.any(2)[:, :, None] & masks.any(1)[:, None]).flatten(1).all(1)
    assert 0.1 < float(single.float().mean()) < 0.35  # a fifth of the masks have one box; overlapping boxes add some
    padded = torch.nn.functional.pad(masks, (1, 0, 1, 0))
    corners = masks & ~padded[:, :-1, 1:] & ~padded[:, 1:, :-1]  # the upper left one of each box, unless it is covered
    assert corners.sum((1, 2)).max() == 5
    edges = [masks[:, side].any(1).float().mean() for side in (0, -1)]
    edges += [masks[..., side].any(1).float().mean() for side in (0, -1)]
    assert max(edges) < 1.6 * min(edges)  # boxes reach every edge equally often


@pytest.mark.slow
def test_strokes_cover_14_percent_at_every_image_size(monkeypatch):
    """As with the parameters of Yu et al. at 256 pixels."""
    from scorematch.restoration import operators

    monkeypatch.setattr(operators, "boxes", operators.strokes)
    for size in [(32, 32), (48, 96)]:
        _, shares = holes(Inpainting(), size, 4000, seed(3))
        assert abs(float(shares.mean()) - 0.14) < 4 * float(shares.std()) / math.sqrt(len(shares)) + 0.005


@pytest.mark.slow
def test_strokes_have_no_preferred_direction(monkeypatch):
    """The strokes of Yu et al. run to the right; here they are flipped at random, so the masks have a centered mean."""
    from scorematch.restoration import operators

    monkeypatch.setattr(operators, "boxes", operators.strokes)
    masks, _ = holes(Inpainting(), (16, 16), 4000, seed(4))
    place = torch.linspace(-1, 1, 16)
    for along in (place, place[:, None]):
        lean = (masks * along).mean((1, 2))
        assert abs(float(lean.mean())) < 4 * float(lean.std()) / math.sqrt(len(lean))


def test_holes_are_filled_with_standard_normal_noise(rng):
    """As in the paper, for images in [-1, 1]; for images in [0, 1] the mean and the standard deviation are 1/2."""
    x = torch.zeros(500, 3, 32, 32)
    condition, mask = Uncropping()(x, rng)
    noise = condition[mask.expand_as(x)]
    assert abs(float(noise.mean()) - 0.5) < 5 * 0.5 / math.sqrt(len(noise))
    assert abs(float(noise.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * len(noise))
    hole = torch.arange(32) < 10
    own = condition_of(Mask(~hole), x, seed(1))
    assert own.shape == x.shape and not own[..., 10:].any() and (own[..., :10] != 0).all()
    damaged = torch.where(hole, math.nan, x)
    assert torch.equal(condition_of(Mask(~hole), damaged, seed(1)), own)  # the values in the hole do not matter


# -- Colors and codecs


def test_condition_of_a_measurement_equals_the_condition_in_training(rng):
    x = torch.rand(4, 3, 16, 24, generator=rng)
    hole = torch.rand(4, 1, 16, 24, generator=rng) > 0.5
    noisy = 0.5 + 0.5 * torch.randn(x.shape, generator=seed(1))
    assert torch.equal(condition_of(Mask(~hole), Mask(~hole).measure(x), 1), torch.where(hole, noisy, x))
    border = torch.arange(24) >= 17
    outside = Uncrop(right=7)
    assert torch.equal(condition_of(outside, outside.measure(x), seed(1)), torch.where(border, noisy, x))
    assert torch.equal(condition_of(Grayscale(), Grayscale().measure(x)), Colorization()(x)[0])
    assert torch.equal(condition_of(JPEG(7), JPEG(7).measure(x)), JPEGRestoration(7, 7)(x)[0])
    small = AveragePool(2).measure(x)
    assert torch.equal(condition_of(AveragePool(2), small), small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    gray_and_small = Grayscale() @ AveragePool(2)
    gray = gray_and_small.measure(x)
    expected = gray.expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(condition_of(gray_and_small, gray), expected)


def test_the_condition_of_colorization_is_the_luma_on_three_channels(rng):
    x = torch.rand(5, 3, 16, 16, generator=rng)
    condition, mask = Colorization()(x)
    assert torch.equal(condition, Grayscale().measure(x).expand(-1, 3, -1, -1))
    assert mask.all()


@pytest.mark.parametrize(("lowest", "highest"), [(5, 30), pytest.param(10, 20, marks=pytest.mark.slow)])
def test_probabilities_of_jpeg_qualities_decay_exponentially(lowest, highest, rng):
    """The probability of a quality q is proportional to exp(-q / 10); q is identified from the compressed images."""
    x = torch.rand(1, 1, 16, 16, generator=rng)
    known = torch.stack([JPEG(quality).measure(x)[0] for quality in range(lowest, highest + 1)])
    assert len(torch.unique(known.flatten(1), dim=0)) == len(known)
    n = 1500
    condition, mask = JPEGRestoration(lowest, highest)(x.expand(n, -1, -1, -1), rng)
    same = (condition.flatten(1)[:, None] == known.flatten(1)).all(2)
    assert same.sum(1).eq(1).all() and mask.all()
    counts = same.sum(0).float()
    assert chi_square_is_plausible(counts, torch.exp(-torch.arange(lowest, highest + 1) / 10))
    assert not chi_square_is_plausible(counts, torch.ones(len(counts)))
    if (lowest, highest) == (5, 30):  # the range of the paper: half of the qualities are at most 10
        assert abs(float(counts[:6].sum()) / n - 0.49) < 4 * 0.5 / math.sqrt(n)


# -- Mixtures


def constant(value, channels=1):
    """A user-defined task, a function: its condition is the mean over the channels, minus a value."""

    def task(x, generator):
        return x.mean(1, keepdim=True).repeat(1, channels, 1, 1) - value, torch.ones(1, 1, 1, 1, dtype=torch.bool)

    return task


@pytest.mark.parametrize("weights", [None, [1, 2, 5]])
def test_each_image_gets_one_task_with_the_probability_of_its_weight(weights, rng):
    n = 4000
    x = torch.arange(n)[:, None, None, None].expand(-1, 1, 8, 8).float()
    condition, mask = MultiTask([constant(0.0), constant(0.25), constant(0.5)], weights)(x, rng)
    value = x - condition
    assert mask.shape == x.shape and mask.all()
    assert torch.equal(value, value[:, :1, :1, :1].expand_as(value))  # by one task
    counts = torch.stack([(value[:, 0, 0, 0] == v).sum() for v in (0.0, 0.25, 0.5)])
    assert counts.sum() == n
    assert chi_square_is_plausible(counts, torch.tensor(weights or [1.0, 1.0, 1.0]))


def test_multitasks_can_be_nested(rng):
    masks = MultiTask([Inpainting(), Uncropping()])
    task = MultiTask([masks, JPEGRestoration(10, 10)], weights=[3, 1])
    assert repr(task) == (
        "MultiTask([MultiTask([Inpainting(), Uncropping()]), JPEGRestoration(10, 10)], weights=[3.0, 1.0])"
    )


def test_the_repr_of_a_task_of_ones_own_has_its_options():
    class Noise(Task):
        def __init__(self, sigma):
            self.sigma = sigma

        def _degrade(self, x, draws):
            return x, torch.ones(())

    assert repr(Noise(0.5)) == "Noise(sigma=0.5)"


def test_nested_multitasks_draw_all_tasks(rng):
    task = MultiTask([MultiTask([Inpainting(), Uncropping()]), JPEGRestoration(10, 10)], weights=[3, 1])
    x = torch.rand(800, 1, 16, 16, generator=rng)
    condition, mask = task(x, rng)
    codec = mask.flatten(1).all(1)
    assert abs(float(codec.float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 800)
    assert torch.equal(condition[codec], JPEG(10).measure(x[codec]))
    assert torch.equal(condition[~mask], x[~mask])


def test_functions_in_a_multitask_may_return_a_condition_alone(rng):
    x = torch.rand(2, 1, 8, 8, generator=rng)  # two images, which are not a condition and a mask
    condition, mask = MultiTask([lambda x, generator: x / 2])(x, rng)
    assert torch.equal(condition, x / 2) and mask.dtype == torch.bool and mask.all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, r"must return a tensor or \(condition, mask\), got None\."),
        ((torch.zeros(1), None), r"must return a tensor or \(condition, mask\), got \(tensor"),
        ((torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)), r"mask must be bool, True where the loss counts"),
    ],
)
def test_functions_in_a_multitask_that_return_something_else_raise(made, message, rng):
    with pytest.raises(TypeError, match=message):
        MultiTask([lambda x, generator: made])(torch.zeros(2, 1, 8, 8), rng)


# -- Palette's loss, and the scores that minimize it


@pytest.mark.parametrize("p", [1, 2])
def test_dsm_loss_equals_palettes_loss(p, rng):
    """|f(c, sqrt(gamma) x0 + sqrt(1 - gamma) e, gamma) - e|_p^p in [-1, 1] and its gradient are those of p dsm_loss."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(c, y, gamma):
        return torch.sin(weight * y + c.mean(1, keepdim=True)) * (1 - gamma) + weight * c[:, :1] * gamma

    schedule = NoiseSchedule.from_betas(torch.linspace(1e-6, 0.01, 2000, dtype=torch.float64))
    gammas = 1 / (1 + (2 * schedule.sigmas) ** 2)

    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))  # float64 weights

        def forward(self, y, step, c):
            return f(c, y, gammas[len(gammas) - 1 - step.round().long()].view(-1, 1, 1, 1))

    net = ScoreNet(Backbone(), schedule, precondition="ddpm", value_range=(0, 1))
    x, c = (torch.rand(5, channels, 4, 4, generator=rng, dtype=torch.float64) for channels in (1, 2))
    e = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    levels = torch.tensor([1, 400, 900, 1500, 1998])
    gamma = gammas[levels].view(-1, 1, 1, 1)
    noisy = gamma.sqrt() * (2 * x - 1) + (1 - gamma).sqrt() * e
    expected = (f(2 * c - 1, noisy, gamma) - e).abs().pow(p).flatten(1).sum(1)
    losses = p * dsm_loss(net, x, sigma=schedule.sigmas[levels], noise=e, condition=c, p=p, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(loss.sum(), weight) for loss in (losses, expected))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # In a mask the loss is the mean over the mask, times the number of all pixels.
    mask = torch.rand(5, 1, 4, 4, generator=rng) < 0.5
    inside = dsm_loss(net, x, sigma=schedule.sigmas[levels], noise=e, condition=c, p=p, mask=mask, reduction="none")
    each = (f(2 * c - 1, noisy, gamma) - e).abs().pow(p)
    means = torch.stack([one[where].mean() for one, where in zip(each, mask, strict=True)])
    torch.testing.assert_close(p * inside, 16 * means, rtol=1e-12, atol=1e-12)


def test_pixels_outside_the_mask_do_not_change_the_loss(rng):
    """For a score that treats each pixel separately."""
    x, z = torch.rand(3, 2, 6, 6, generator=rng), torch.randn(3, 2, 6, 6, generator=rng)
    _, mask = Inpainting()(torch.zeros(3, 2, 8, 8), rng)
    mask = mask[..., 1:7, 1:7] | (torch.arange(6) == 2)
    other = torch.where(mask, x, torch.rand(x.shape, generator=rng))

    def loss(x):
        return dsm_loss(lambda x, sigma: -x.sin(), x, sigma=0.4, noise=z, mask=mask, reduction="none")

    assert torch.equal(loss(x), loss(other))
    assert not torch.equal(loss(x), loss(x + 0.1))


def test_the_loss_of_power_2_prefers_the_mean_and_of_power_1_the_median():
    """The mean and the median of the posterior, for data at two points."""
    n, sigma = 200_000, 1.0
    x = torch.where(torch.rand(n, 1, generator=seed(0)) < 0.7, 1.0, -1.0)
    z = torch.randn(n, 1, generator=seed(1))

    def score(denoised):
        def net(x, sigma):
            plus = torch.sigmoid(2 * x + math.log(0.7 / 0.3))
            return denoised(2 * plus - 1) - x

        return net

    mean, median = score(lambda mean: mean), score(lambda mean: mean.sign())
    for p, best, worse in [(2, mean, median), (1, median, mean)]:
        losses = [dsm_loss(net, x, sigma=sigma, noise=z, p=p, reduction="none") for net in (best, worse)]
        difference = losses[1] - losses[0]
        assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(n)


@pytest.mark.slow
def test_the_exact_conditional_score_minimizes_the_loss():
    """For jointly Gaussian (x0, c), where x0 given c is N(B c, S). The score is linear, and so the loss is quadratic.

    At the exact score the gradient is zero; if matrices are added to it, the loss grows by their quadratic form.
    """
    n, sigma = 400_000, 0.6
    b = torch.tensor([[0.8, -0.3], [0.1, 0.5]], dtype=torch.float64)
    s = torch.tensor([[0.50, 0.20], [0.20, 0.30]], dtype=torch.float64)
    c = torch.randn(n, 2, generator=seed(0), dtype=torch.float64)
    x = c @ b.T + torch.randn(n, 2, generator=seed(1), dtype=torch.float64) @ torch.linalg.cholesky(s).T
    z = torch.randn(n, 2, generator=seed(2), dtype=torch.float64)
    total = s + sigma**2 * torch.eye(2, dtype=torch.float64)
    precision = torch.linalg.inv(total)

    def losses(on_x, on_c):
        def net(x, sigma, condition):
            return x @ on_x.T + condition @ on_c.T

        return dsm_loss(net, x, sigma=sigma, noise=z, condition=c, reduction="none")

    parameters = (-precision).requires_grad_(), (precision @ b).requires_grad_()
    optimum = losses(*parameters)
    for i, gradient in enumerate(torch.autograd.grad(optimum.mean(), parameters)):
        # Entry (j, k) of the gradient is the mean of sigma r_j v_k, where v is x or c.
        r = sigma * sigma * ((x + sigma * z) @ parameters[0].T + c @ parameters[1].T + z / sigma).detach()
        v = (x + sigma * z) if i == 0 else c
        deviation = (r[:, :, None] * v[:, None]).std(0) / math.sqrt(n)
        assert (gradient.abs() < 5 * deviation).all()
    # The mean square of an error E_x x + E_c c of the score, for x = B c + e, e ~ N(0, S + sigma^2) and c ~ N(0, 1).
    for factors in [(1.05, 1.0), (1.0, 0.95), (0.95, 1.05)]:
        on_x, on_c = (factor * one.detach() for factor, one in zip(factors, parameters, strict=True))
        e_x, e_c = on_x - parameters[0].detach(), on_c - parameters[1].detach()
        along = e_x @ b + e_c
        excess = sigma**2 / 2 * float((along @ along.T + e_x @ total @ e_x.T).trace())
        difference = losses(on_x, on_c) - optimum.detach()
        assert abs(float(difference.mean()) - excess) < 5 * float(difference.std()) / math.sqrt(n)


TINTS = torch.tensor([[1.0, 0.101 / 0.587, 0.0], [0.0, 0.4 / 0.587, 0.0], [0.0, 0.286 / 0.587, 1.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


@pytest.mark.slow
def test_colorization_draws_colors_of_equal_luma_with_their_probabilities(rng):
    """The gray image does not determine which of three tints of luma 0.4 it had. The score is that of the posterior.

    The luma of the samples is correct to 0.001 without an observation, and to rounding with one.
    """
    shapes = torch.rand(1, 1, 8, 8, generator=rng)
    images = shapes * TINTS[:, :, None, None]
    condition, _ = Colorization()(images)
    torch.testing.assert_close(condition, condition[:1].expand_as(condition), atol=1e-6, rtol=0)

    def score(x, sigma, condition):
        """The score given the gray image, for which x0 is one of three points, condition * tint / luma."""
        points = condition[:, None, :1] * TINTS[None, :, :, None, None] / 0.4
        logits = -(x[:, None] - points).square().sum((2, 3, 4)) / (2 * sigma**2) + SHARES.log()
        return ((logits.softmax(1)[..., None, None, None] * points).sum(1) - x) / sigma**2

    n = 1500
    sampler = AncestralSampler(score, NoiseSchedule.geometric(20, 0.01, 100))
    shown = condition[:1].expand(n, -1, -1, -1)
    x = sampler.sample(shape=(3, 8, 8), condition=shown, generator=rng, progress=False)
    distance = (x[:, None] - images).flatten(2).norm(dim=2)
    assert distance.min(1).values.max() < 0.05  # each sample is one of the three images
    counts = torch.bincount(distance.argmin(1), minlength=3)
    deviation = (SHARES * (1 - SHARES) / n).sqrt()
    assert ((counts / n - SHARES).abs() < 4 * deviation + 0.01).all()
    assert (Grayscale().measure(x) - condition[:1, :1]).abs().max() < 1e-3

    seen = Observation(Grayscale(), condition[:1, :1])
    exact = sampler.sample(shape=(3, 8, 8), condition=shown[:50], observation=seen, generator=rng, progress=False)
    assert (Grayscale().measure(exact) - condition[:1, :1]).abs().max() < 1e-6


# -- Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Inpainting()(torch.zeros(1, 1, 8, 8).byte()), TypeError, r"got torch.uint8. Write x / 255"),
        (
            lambda: Inpainting()(torch.zeros(1, 8, 8)),
            ValueError,
            r"images \(N, C, H, W\) of at least 8 x 8 pixels, got shape \(1, 8, 8\)",
        ),
        (lambda: Inpainting()(torch.zeros(0, 1, 8, 8)), ValueError, r"at least one sample, got shape \(0, 1, 8, 8\)"),
        (lambda: Uncropping()(torch.zeros(1, 1, 8, 7)), ValueError, r"at least 8 x 8 pixels, got shape \(1, 1, 8, 7\)"),
        (lambda: Colorization()(torch.zeros(2, 1, 8, 8)), ValueError, r"needs RGB images .*got shape \(2, 1, 8, 8\)"),
        (
            lambda: JPEGRestoration()(torch.zeros(2, 2, 8, 8)),
            ValueError,
            r"\(N, 3, H, W\), got shape \([12], 2, 8, 8\)",
        ),
        (lambda: JPEGRestoration(0, 30), ValueError, "quality must be an integer from 1 to 100, got 0"),
        (lambda: JPEGRestoration(5, 300), ValueError, "got 300"),
        (lambda: JPEGRestoration(30, 5), ValueError, "lowest must be at most highest, got lowest=30 and highest=5"),
        (lambda: Inpainting()([torch.zeros(1, 1, 8, 8)]), TypeError, "x must be a tensor .*, got list"),
        (lambda: Inpainting()(torch.zeros(1, 1, 8, 8), "0"), TypeError, "torch.Generator or a seed, got '0'"),
        (lambda: MultiTask([]), ValueError, "at least one task"),
        (
            lambda: MultiTask([Inpainting]),
            TypeError,
            r"callable as task\(x, generator\), such as Inpainting\(\), got <class",
        ),
        (lambda: MultiTask([Inpainting()], [1, 2]), ValueError, r"1 positive numbers.*got \[1.0, 2.0\]"),
        (lambda: MultiTask([Inpainting()], [0]), ValueError, r"got \[0.0\]"),
        (lambda: MultiTask([Inpainting()], [math.nan]), ValueError, r"got \[nan\]"),
        (
            lambda: MultiTask([constant(0, 1), constant(0, 2)])(torch.zeros(50, 1, 8, 8), seed(0)),
            ValueError,
            r"same number of channels, got \[1, 2\]",
        ),
        (lambda: condition_of(Uncrop(left=1), torch.zeros(1, 1, 8, 8).byte()), TypeError, "uint8. Write y / 255"),
        (lambda: MultiTask(Inpainting()), TypeError, r"tasks must be a list of tasks, .* Write MultiTask\(\["),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
