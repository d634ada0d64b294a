"""Nearest training images against brute force, and the figures of memorization on sets with known copies."""

import math

import pytest
import torch

from scorematch.data import read_image
from scorematch.evaluation import memorization as module
from scorematch.evaluation.memorization import Memorization, Neighbors, Proportion, memorization_of, nearest
from tests.helpers import seed

K = 3


def points(n, number=0, dimension=5):
    return torch.randn(n, dimension, generator=seed(number), dtype=torch.float64)


def pictures(n, number=0, shape=(1, 4, 4)):
    return torch.randint(256, (n, *shape), generator=seed(number), dtype=torch.uint8)


def neighbors_of(queries, batches, k=K):
    return nearest(queries, [(batch, None) for batch in batches], k)


def of_distances(*rows):
    """Neighbors with these distances."""
    distances = torch.tensor(rows, dtype=torch.float64)
    return Neighbors(distances, torch.zeros(distances.shape).long(), torch.zeros(distances.shape).bool())


def check(samples, training, held_out=None, **options):
    return memorization_of(samples, training, held_out, **{"neighbors": 2, "progress": False, **options})


# -- The nearest neighbors


@pytest.mark.parametrize("sizes", [[50], [20, 29, 1], [1] * 50])
def test_neighbors_equal_brute_force(sizes, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    queries, features = points(20), points(50, 1) + 100
    found = neighbors_of(queries, features.split(sizes))
    distances, indices = torch.cdist(queries, features).topk(K, largest=False)
    torch.testing.assert_close(found.distances, distances, rtol=1e-10, atol=0)
    assert torch.equal(found.indices, indices) and not found.flipped.any()
    assert found.distances.dtype == torch.float64 and found.indices.dtype == torch.int64


def test_the_order_of_the_features_does_not_matter():
    queries, features, order = points(20), points(50, 1), torch.randperm(50, generator=seed())
    found, other = neighbors_of(queries, [features]), neighbors_of(queries, features[order].split(9))
    torch.testing.assert_close(other.distances, found.distances, rtol=1e-12, atol=0)
    assert torch.equal(order[other.indices], found.indices)


def test_equal_features_have_distance_zero():
    features = points(10) + 1e4
    found = neighbors_of(features.float(), features.float().split(4))
    assert (found.distances[:, 0] == 0).all() and torch.equal(found.indices[:, 0], torch.arange(10))
    assert (found.distances[:, 1] > 0).all()


def test_mirror_images_count_once_and_are_marked():
    queries = torch.tensor([[0.0, 0.0]])
    features, flipped = torch.tensor([[3.0, 0.0], [9.0, 0.0]]), torch.tensor([[1.0, 0.0], [10.0, 0.0]])
    found = nearest(queries, [(features, flipped)], 2)
    assert found.distances.tolist() == [[1, 9]] and found.indices.tolist() == [[0, 1]]
    assert found.flipped.tolist() == [[True, False]]


# -- The figures


def test_ratios_and_copies():
    """The first is a copy for k = 1/3, the second for k = 1/2; the third, of a duplicated image, for any k."""
    found = Memorization("pixels", 9, of_distances([1, 4], [2, 5], [0, 0], [3, 3]), of_distances([1, 1.5], [1, 2.5]))
    assert found.samples.ratios.tolist() == [0.25, 0.4, 0, 1]
    shares = {ratio: [share.value for share in found.copies(ratio)] for ratio in (1 / 4, 1 / 3, 1 / 2, 1)}
    assert shares == {1 / 4: [0.25, 0], 1 / 3: [0.5, 0], 1 / 2: [0.75, 0.5], 1: [0.75, 1]}
    assert Memorization("pixels", 9, found.samples, None).copies()[1] is None


def test_copies_are_found_and_held_out_images_are_the_control():
    training, held_out = pictures(200), pictures(50, 1)
    copies = (training[:30].float() / 255 + 0.02 * torch.randn(30, 1, 4, 4, generator=seed())).clamp(0, 1)
    samples = torch.cat([copies, pictures(70, 2).float() / 255])
    found = check(samples, training, held_out)
    ours, theirs = found.copies()
    assert (ours.value, theirs.value) == (0.3, 0) and found.training == 200 and found.extractor == "pixels"
    assert torch.equal(found.samples.indices[:30, 0], torch.arange(30))
    assert found.nearer().value > 0.5 + 3 * found.nearer().error


def test_samples_of_the_data_are_as_near_as_held_out_images():
    training, held_out, samples = (pictures(n, number) for n, number in ((100, 0), (200, 1), (300, 2)))
    nearer = check(samples, training, held_out).nearer()
    assert abs(nearer.value - 0.5) < 4 * nearer.error
    # For equal distributions the variance of the rank statistic is (n + m + 1) / (12 n m).
    assert nearer.error == pytest.approx(math.sqrt(501 / (12 * 200 * 300)), rel=0.1)


def test_the_probability_to_be_nearer_counts_pairs_and_half_of_the_ties():
    a, b = torch.randint(5, (40,), generator=seed()).double(), torch.randint(5, (30,), generator=seed(1)).double()
    sets = [of_distances(*([d, 9.0] for d in of.tolist())) for of in (a, b)]
    found = Memorization("pixels", 9, *sets).nearer()
    wins = (a[:, None] < b).double() + 0.5 * (a[:, None] == b).double()
    assert found.value == pytest.approx(float(wins.mean()))
    assert found.error == pytest.approx(float((wins.mean(1).var() / 40 + wins.mean(0).var() / 30).sqrt()))
    assert Memorization("pixels", 9, sets[0], None).nearer() is None
    one = of_distances([1.0, 9.0])
    assert Memorization("pixels", 9, sets[0], one).nearer().error is None  # not NaN


def test_intervals_of_shares_are_those_of_wilson():
    none = Proportion.of(torch.zeros(100, dtype=torch.bool))
    z2 = 1.959964**2
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(z2 / (100 + z2))
    some = Proportion.of(torch.arange(100) < 20)
    for end in (some.low, some.high):  # the ends solve (p - x)^2 = z^2 x (1 - x) / n
        assert (0.2 - end) ** 2 == pytest.approx(z2 * end * (1 - end) / 100)
    assert str(some) == "20.00% (13.34% to 28.88%)"


def test_copies_of_mirror_images_are_found_with_flips():
    training = pictures(50, shape=(3, 4, 6))
    samples = training[[4, 7]].flip(3)
    assert check(samples, training).samples.distances.min() > 0
    found = check(samples, training, flips=True)
    assert (found.samples.distances[:, 0] == 0).all() and found.samples.indices[:, 0].tolist() == [4, 7]
    assert found.samples.flipped[:, 0].all() and found.copies()[0].value == 1


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_neighbors_in_features_equal_brute_force(batch_size):
    def features(images):
        return images.float().mean((2, 3)) / 255

    training, samples = pictures(30, shape=(3, 4, 4)), pictures(8, 1, (3, 4, 4))
    found = check(samples, training, pictures(5, 2, (3, 4, 4)), features=features, batch_size=batch_size)
    distances, indices = torch.cdist(features(samples).double(), features(training).double()).topk(2, largest=False)
    torch.testing.assert_close(found.samples.distances, distances, rtol=1e-6, atol=0)
    assert torch.equal(found.samples.indices, indices) and found.held_out.distances.shape == (5, 2)
    assert "features" in found.extractor


def test_the_picture_shows_the_samples_with_the_smallest_ratios_beside_their_neighbors(tmp_path):
    training = pictures(20)
    samples = torch.cat([pictures(3, 1), training[6:7].flip(3), training[5:6]])
    found = check(samples, training, neighbors=3, flips=True)
    found.save_picture(tmp_path / "neighbors.png", samples, training, rows=2)
    picture = read_image(tmp_path / "neighbors.png", 1)[0]
    assert picture.shape == (2 * 6 + 2, 4 * 6 + 2)  # a border of two pixels around each image
    cells = picture[2:, 2:].unfold(0, 4, 6).unfold(1, 4, 6)
    rows = {3: (6, True), 4: (5, False)}  # the ratio of both samples is 0
    for i, sample in enumerate(found.samples.ratios.argsort()[:2].tolist()):
        number, flipped = rows[sample]
        image = training[number, 0].flip(1) if flipped else training[number, 0]
        torch.testing.assert_close(cells[i, 0], image / 255)
        torch.testing.assert_close(cells[i, 1], image / 255)
        last = training[found.samples.indices[sample, 2], 0]
        torch.testing.assert_close(cells[i, 3], (last.flip(1) if found.samples.flipped[sample, 2] else last) / 255)


def test_table():
    found = check(pictures(10, 1), pictures(20), pictures(5, 2))
    lines = found.table().splitlines()
    assert lines[0].startswith("| pixels | images | distance, 1% quantile |") and len(lines) == 4
    assert lines[2].startswith("| samples | 10 | ") and lines[3].startswith("| held-out images | 5 | ")
    assert len(check(pictures(10, 1), pictures(20)).table().splitlines()) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check(pictures(2), pictures(9), neighbors=1), "neighbors must be an integer of at least 2, got 1"),
        (lambda: check(pictures(2), pictures(9), batch_size=-1), "batch_size must be an integer of at least 1, got -1"),
        (lambda: check(pictures(2), pictures(1)), "the 2 nearest neighbors need at least 2 features, got 1"),
        (lambda: check(pictures(2), pictures(9, shape=(1, 4, 5))), "like the queries, got 20. Use one extractor, and"),
        (
            lambda: check(pictures(2), pictures(9), pictures(2, shape=(1, 4, 5))),
            "of the held-out images must have 16 dimensions, like those of the samples, got 20",
        ),
        (lambda: check(pictures(2), pictures(9)).copies(0), "ratio must be above 0 and at most 1, got 0"),
        (lambda: check(pictures(2), pictures(9), features="nonsense"), "features must be one of .*got 'nonsense'"),
        (lambda: nearest(points(2), [], 0), "k must be an integer of at least 1, got 0"),
        (lambda: nearest(points(2) * math.nan, [], 1), "queries must be finite"),
        (lambda: neighbors_of(points(2), [points(2) * math.inf]), "features must be finite"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
