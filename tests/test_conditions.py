"""Networks that take several conditions: a class, a vector and an image."""

import numpy as np
import pytest
import torch

from scorematch import ScoreNet, dsm_loss
from scorematch.cli import main
from scorematch.data import open_arrays
from scorematch.guidance import Tiled, autoguidance, classifier_free
from scorematch.likelihood import log_likelihood
from scorematch.loss import sliced_score_matching_loss
from scorematch.nets.precondition import Units
from scorematch.nets.reconditioning import difference
from scorematch.restoration.palette import Inpainting
from scorematch.sampling import SAMPLERS, ODESampler, bulk_samples, recommended_sampler
from scorematch.sampling.settings import SamplerSettings
from scorematch.training import train
from scorematch.training.start import begin_with
from tests.helpers import refused, seed

pytestmark = pytest.mark.usefixtures("no_plots")

SMALL = {"widths": (12, 12), "layers_per_block": 1}
NAN = torch.full((4, 3), torch.nan)


def mlp(**options):
    return ScoreNet.mlp(2, width=16, depth=1, classes=5, null_class=True, condition_features=3, **options)


def unet(**options):
    return ScoreNet.unet(1, 8, **{**SMALL, "classes": 5, "null_class": True, "condition_features": 3, **options})


def unet_of_all():
    return unet(condition_channels=2)


def ncsnpp():
    return ScoreNet.ncsnpp(1, 8, **SMALL, classes=5, null_class=True, condition_channels=2)


NETWORKS = [mlp, unet, unet_of_all, ncsnpp]


def perturbed(net):
    """A network of random weights, in which every condition has an effect."""
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=seed(parameter.numel()))
    return net.eval().requires_grad_(False)


def example(net):
    """Samples (4, ...) and a condition with all parts."""
    x = torch.randn(4, *net.sample_shape, generator=seed(0))
    parts = {
        "class": torch.tensor([3, 0, 4, 3]),
        "features": torch.randn(4, 3, generator=seed(1)),
        "image": torch.rand(4, 2, *net.sample_shape[1:], generator=seed(2)),
    }
    return x, {name: parts[name] for name in net.conditioning.parts()}


@pytest.mark.slow
@pytest.mark.parametrize("make", NETWORKS)
def test_every_part_matters_and_a_part_that_is_left_out_is_the_null(make, tmp_path):
    net = perturbed(make())
    x, given = example(net)
    y = net(x, 0.3, given)
    for name in given:
        assert (net(x, 0.3, {**given, name: given[name].flip(0)}) - y).abs().max() > 1e-3
    null = {"class": torch.full((4,), 5), "features": NAN}
    for name in {*given} - {"image"}:
        left = {key: part for key, part in given.items() if key != name}
        assert torch.equal(net(x, 0.3, left), net(x, 0.3, {**left, name: null[name]}))
    if "image" not in given:
        assert torch.equal(net(x, 0.3), net(x, 0.3, null))
    one = {**given, "class": torch.full((4,), 2)}
    assert torch.equal(net(x, 0.3, {**given, "class": 2}), net(x, 0.3, one))
    for rows in ([0], [2, 3]):
        assert torch.allclose(net(x[rows], 0.3, {k: part[rows] for k, part in given.items()}), y[rows], atol=1e-4)

    copy = net.inference_copy()
    assert copy is not net and torch.allclose(copy(x, 0.3, given), y, rtol=0.05, atol=0.05 * float(y.std()))
    sigma = torch.tensor([0.3, 0.5, 0.3, 0.5])
    each = net(x, sigma, given)
    assert torch.allclose(copy(x, sigma, given), each, rtol=0.05, atol=0.05 * float(each.std()))
    net.save_pretrained(tmp_path)
    same = ScoreNet.from_pretrained(tmp_path)
    assert same.conditioning == net.conditioning and torch.equal(same(x, 0.3, given), y)


@pytest.mark.parametrize("make", NETWORKS)
def test_guidance_drops_the_class_and_the_vector_and_keeps_the_image(make):
    net = perturbed(make())
    x, given = example(net)
    none = net(x, 0.3, {name: part for name, part in given.items() if name == "image"})
    expected = none + 1.5 * (net(x, 0.3, given) - none)
    assert torch.allclose(classifier_free(net, 1.5)(x, 0.3, given), expected, atol=1e-4)
    weaker = autoguidance(net, lambda x, sigma, condition: none, 1.5)
    assert torch.allclose(weaker(x, 0.3, given), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r'this network takes classes .*: pass condition=\{"class": ...\}'):
        classifier_free(net, 1.5)(x, 0.3, {name: part for name, part in given.items() if name != "class"})
    if len(net.sample_shape) == 3:
        assert torch.allclose(Tiled(net, 8)(x, 0.3, given), net(x, 0.3, given), atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_passes_all_parts_on(name):
    """Samples with a dict are those of the network with the condition inside."""
    net = perturbed(mlp())
    net.schedule = net.schedule.respaced(60)
    _, given = example(net)

    class Fixed(torch.nn.Module):
        schedule, sample_shape, preconditioning = net.schedule, net.sample_shape, net.preconditioning
        value_range = units = None

        def forward(self, x, sigma):
            return net(x, sigma, given)

    options = {"generator": [0, 1, 2, 3], "progress": False, "batch_size": 4}
    settings = SamplerSettings(name, levels=3)
    expected = recommended_sampler(Fixed(), settings).sample(4, **options)
    sampler = recommended_sampler(net, settings)
    found = sampler.sample(condition=given, **options)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    options["batch_size"] = 3
    assert torch.allclose(sampler.sample(condition=given, **options), expected, rtol=1e-4, atol=1e-4)


def test_losses_and_likelihoods_pass_all_parts_on():
    net = perturbed(mlp())
    x, given = example(net)
    for loss in (dsm_loss, sliced_score_matching_loss):
        expected = loss(lambda x, sigma: net(x, sigma, given), x, net.schedule, generator=0)
        assert torch.allclose(loss(net, x, net.schedule, condition=given, generator=0), expected)
    schedule = net.schedule.respaced(8)
    expected = log_likelihood(lambda x, sigma: net(x, sigma, given), x, schedule, probes=None, progress=False)
    found = log_likelihood(net, x, schedule, probes=None, condition=given, progress=False)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_many_samples_have_their_class_and_their_vector():
    net = perturbed(mlp())
    sampler, rows = ODESampler(net, levels=3), torch.randn(5, 3, generator=seed())
    found = list(bulk_samples(sampler, 5, classes="cycle", condition=rows, batch_size=2))
    assert torch.equal(torch.cat([batch.classes["features"] for batch in found]), rows)
    assert torch.cat([batch.classes["class"] for batch in found]).tolist() == [0, 1, 2, 3, 4]
    alone = list(bulk_samples(sampler, 1, first=3, classes=3, condition=rows, batch_size=2))
    assert torch.allclose(alone[0].images, found[1].images[1:], atol=1e-4)
    (free,) = bulk_samples(sampler, 2, classes=1, batch_size=2)
    (null,) = bulk_samples(sampler, 2, condition={"features": NAN[:1], "class": torch.tensor([1])}, batch_size=2)
    assert torch.equal(free.images, null.images)


@pytest.mark.slow
def test_a_network_with_another_condition_begins_with_the_same_outputs(tmp_path):
    x, given = example(unet())
    plain = perturbed(ScoreNet.unet(1, 8, **SMALL, condition_features=3))
    plain.save_pretrained(tmp_path / "vector")
    both = perturbed(unet())
    begin_with(both, tmp_path / "vector")
    assert torch.allclose(both(x, 0.3, given), plain(x, 0.3, given["features"]), atol=1e-5)
    assert torch.allclose(both(x, 0.3), plain(x, 0.3), atol=1e-5)
    assert difference(plain.config, both.config) == "5 classes are new"
    both = perturbed(unet())
    both.save_pretrained(tmp_path / "both")
    for net, condition in (
        (ScoreNet.unet(1, 8, **SMALL, condition_features=3), given["features"]),
        (ScoreNet.unet(1, 8, **SMALL, classes=5, null_class=True), given["class"]),
        (ScoreNet.unet(1, 8, **SMALL), None),
        (unet(classes=7), given),
    ):
        begin_with(net, tmp_path / "both")
        names = [name for name in given if name in net.conditioning.parts()]
        expected = both(x, 0.3, {name: given[name] for name in names})
        assert torch.allclose(net(x, 0.3, condition), expected, atol=1e-5)


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.slow
def test_training_with_a_class_and_a_vector(tmp_path):
    """The data of all kinds have both; dropped samples train the nulls; a network may take one of them only."""
    n = 32
    x, vectors = torch.randn(n, 2, generator=seed()), torch.randn(n, 3, generator=seed(1))
    labels = torch.arange(n) % 5
    pair = (x, {"class": labels, "features": vectors})
    items = Items((a, {"class": b, "features": c}) for a, b, c in zip(x, labels, vectors, strict=True))
    for data in (pair, {"x": x, "condition": vectors, "label": labels}, items):
        found = open_arrays(data).read([5, 1])[1]
        assert torch.equal(found["class"], labels[[5, 1]]) and torch.equal(found["features"], vectors[[5, 1]])
    options = {"images": 128, "batch_size": 32, "progress": False, "label_drop": 0.3}
    torch.manual_seed(0)
    net = train(mlp(), pair, tmp_path / "run", **options)
    assert torch.allclose(net.backbone.vector_embedding.mean, vectors.mean(0), atol=1e-5)
    assert net.backbone.vector_embedding.null.any()
    torch.manual_seed(0)
    first, last = (each.backbone.condition_embedding.weight[5] for each in (mlp(), net))
    assert not torch.equal(first, last)
    of_classes = ScoreNet.mlp(2, width=8, depth=1, classes=5, null_class=True)
    assert train(of_classes, pair, tmp_path / "classes", **options).conditioning.classes == 5


def test_one_step_with_label_drop_says_that_the_null_is_trained(tmp_path):
    """Its gradient is zero in the first steps, while the last layer is."""
    x, vectors = torch.randn(32, 2, generator=seed()), torch.randn(32, 3, generator=seed(1))
    for drop in (0.0, 0.3):
        net = ScoreNet.mlp(2, width=8, depth=1, condition_features=3)
        net = train(net, (x, vectors), tmp_path / str(drop), images=32, batch_size=32, label_drop=drop, progress=False)
        assert net.inference_copy().conditioning.null_class == (drop > 0)


def test_a_network_of_vectors_without_label_drop_must_be_given_one(tmp_path, capsys):
    """Its null was never trained, and samples without a condition would look like samples."""
    x, vectors = torch.randn(32, 2, generator=seed()), torch.randn(32, 3, generator=seed(1))
    options = {"images": 128, "batch_size": 32, "progress": False}
    for drop in (0.0, 0.3):
        net = ScoreNet.mlp(2, width=8, depth=1, condition_features=3)
        net = train(net, {"x": x, "condition": vectors}, tmp_path / str(drop), label_drop=drop, **options)
        sampler = ODESampler(ScoreNet.from_pretrained(tmp_path / str(drop) / "network"), levels=3)
        assert sampler.sample(2, condition=vectors[:2], progress=False).isfinite().all()
        if drop:
            assert sampler.sample(2, progress=False).isfinite().all()
        else:
            with pytest.raises(ValueError, match="this network takes a vector as its condition"):
                sampler.sample(2, progress=False)
            guided = ODESampler(classifier_free(net, 2.0), levels=3)
            with pytest.raises(ValueError, match="Without label_drop in training"):
                guided.sample(2, condition=vectors[:2], progress=False)
            message = refused(["sample", tmp_path / str(drop), tmp_path / "x.npz", "--levels", "3", "--quiet"], capsys)
            assert "takes a vector as its condition. Add --condition with 3 values." in message
            np.save(tmp_path / "x.npy", x.numpy())
            command = ["evaluate", tmp_path / str(drop), tmp_path / "x.npy", "--levels", "3", "--quiet"]
            message = refused(command, capsys)
            assert "takes a vector as its condition. Add --condition with 3 values." in message


@pytest.mark.slow
def test_training_with_a_class_and_an_image(tmp_path):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, **SMALL, classes=5, null_class=True, condition_channels=1)
    x, labels = torch.rand(64, 1, 8, 8, generator=seed()), torch.arange(64) % 5
    options = {"images": 64, "batch_size": 32, "progress": False, "condition": Inpainting(), "sample_every": 64}
    net = train(net, (x, labels), tmp_path / "run", label_drop=0.2, **options)
    assert (tmp_path / "run" / "samples" / "000000064.png").exists()
    given = {"class": labels[:4], "image": x[:4]}
    y = net(x[:4], 0.3, given)
    assert not torch.equal(y, net(x[:4], 0.3, {**given, "class": 1}))
    assert not torch.equal(y, net(x[:4], 0.3, {**given, "image": 0 * x[:4]}))


@pytest.mark.slow
def test_the_commands_take_a_class_and_a_vector(tmp_path, capsys):
    quiet = ["--device", "cpu", "--quiet"]
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, condition=np.random.default_rng(1).random((40, 3)), label=np.arange(40) % 5)
    run = str(tmp_path / "run")
    options = ["--images", "256", "--batch-size", "32", "--label-drop", "0.1", *quiet]
    assert main(["train", str(tmp_path / "x.npz"), "--out", run, "--labels", *options]) == 0
    assert main(["info", run]) == 0
    assert "5 classes, 0 to 4, or no class; and a vector of 3 values" in capsys.readouterr().out
    sample = ["sample", run, str(tmp_path / "y.npz"), "-n", "6", "--levels", "3", *quiet]
    given = ["--class", "cycle", "--condition", "0.1,0.2,0.3"]
    assert main([*sample, *given, "--guidance", "2"]) == 0
    written = np.load(tmp_path / "y.npz")
    assert written["label"].tolist() == [0, 1, 2, 3, 4, 0] and np.allclose(written["condition"], [[0.1, 0.2, 0.3]] * 6)
    again = open_arrays(tmp_path / "y.npz").read([1])[1]
    assert set(again) == {"class", "features"}
    for left, message in ((given[:2], "Add --condition with 3 values"), (given[2:], "Add --class K")):
        assert main([*sample, *left, "--guidance", "2", "--overwrite"]) != 0
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": None}, ValueError, r'an image as its condition.*: pass condition=\{"image": ...\}'),
        ({"text": 3}, ValueError, 'of this network is "class" and "features" and "image", got .text.'),
        ({"class": torch.arange(3)}, ValueError, r"one entry for each of 4 samples, got shape \(3,\)"),
        ({"class": 6}, ValueError, "classes as its condition, .* from 0 to 4, or 5 for none, got class 6"),
        ({"features": torch.zeros(4, 2)}, ValueError, r"a vector as its condition, float \(N, 3\), got shape \(4, 2\)"),
        ({"features": torch.eye(4, 3) / torch.eye(4, 3)}, ValueError, "float .* of finite values, got nan"),
        ({"features": torch.full((4, 3), torch.inf)}, ValueError, "float .* of finite values, got inf"),
        (
            {"features": torch.zeros(4, 3, dtype=torch.int64)},
            TypeError,
            r"a vector .*, got torch.int64 of shape \(4, 3\)",
        ),
        ({"features": [1.0]}, TypeError, "condition must be a tensor, .* got list. Write torch.as_tensor"),
    ],
)
def test_a_bad_part_is_refused(change, error, message):
    net = unet_of_all()
    x, given = example(net)
    with pytest.raises(error, match=message):
        net(x, 0.3, {**given, **change})


def test_a_condition_without_names_is_refused():
    net = mlp()
    x, given = example(net)
    with pytest.raises(TypeError, match=r'takes several conditions. Write condition=\{"class": ..., "features": ...\}'):
        net(x, 0.3, given["features"])
    with pytest.raises(TypeError, match="takes several conditions"):
        bulk_samples(ODESampler(unet_of_all(), levels=3), 4, condition=given["features"])
    with pytest.raises(TypeError, match="this network takes no condition"):
        ScoreNet.mlp(2, width=8)(x, 0.3, given)
    both = ScoreNet.mlp(2, width=8, classes=5, condition_features=3)  # without a null
    with pytest.raises(ValueError, match="of finite values, got nan"):
        both(torch.zeros(1, 2), 0.3, {"class": 1, "features": torch.full((1, 3), torch.nan)})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"class": torch.zeros(8, 3)}, r"must be \{\"class\": integers \(N,\), .*\}, got 'class' of float32"),
        ({"features": torch.zeros(8, 3)}, "the network is class-conditional, but the data have no labels"),
        ({"class": torch.zeros(8, dtype=torch.int64)}, r"a vector of 3 values .*, got none. Pass a pair"),
        (
            {"class": torch.zeros(8, dtype=torch.int64), "features": NAN.repeat(2, 1)},
            "the condition of x must be finite",
        ),
    ],
)
def test_bad_conditions_of_data_are_refused(condition, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(mlp(), (torch.randn(8, 2), condition), tmp_path / "run", images=8, batch_size=8, progress=False)


class Encoder(torch.nn.Module):
    """Features of a signal (N, 1, 8)."""

    def __init__(self, features=3):
        super().__init__()
        self.linear_out = torch.nn.Linear(8, features)

    def forward(self, signal):
        return self.linear_out(torch.tanh(signal[:, 0]))


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_an_encoder_of_the_condition_is_trained_and_stored_with_the_network(several, tmp_path):
    torch.manual_seed(0)
    classes = {"classes": 5, "null_class": True} if several else {}
    options = {**SMALL, "condition_features": 3, "condition_encoder": Encoder(), **classes}
    net = ScoreNet.unet(1, (8,), **options)
    assert net.backbone.get_submodule(next(n for n, m in net.backbone.named_modules() if isinstance(m, Encoder)))
    x, signals = torch.randn(32, 1, 8, generator=seed(0)), 100 * torch.randn(32, 1, 8, generator=seed(1))
    condition = {"class": torch.arange(32) % 5, "features": signals} if several else signals
    before = [parameter.clone() for parameter in options["condition_encoder"].parameters()]
    training = {"images": 128, "batch_size": 32, "progress": False, "label_drop": 0.2}
    train(net, (x, condition), tmp_path / "run", **training)
    after = list(options["condition_encoder"].parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    net = perturbed(net)
    given = {name: part[:4] for name, part in condition.items()} if several else condition[:4]
    y = net(x[:4], 0.3, given)
    assert not torch.allclose(y, net(x[:4], 0.3, {**given, "features": signals[4:8]} if several else signals[4:8]))
    assert torch.allclose(net(x[:4], 0.3), net(x[:4], 0.3, {"features": signals[:4] * torch.nan}))
    assert torch.allclose(classifier_free(net, 1.0)(x[:4], 0.3, given), y, atol=1e-5)
    sampler = ODESampler(net, levels=3)
    assert sampler.sample(condition=given, generator=0, progress=False).shape == (4, 1, 8)
    net.save_pretrained(tmp_path / "net")
    same = ScoreNet.from_pretrained(tmp_path / "net", condition_encoder=Encoder())
    assert torch.allclose(same(x[:4], 0.3, given), y, atol=1e-5)
    with pytest.raises(ValueError, match=r"whose code is not stored. In Python, pass .* as condition_encoder=."):
        ScoreNet.from_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=r"condition_encoder must return features .4, 3., .* got shape .4, 2."):
        ScoreNet.unet(1, (8,), **{**options, "condition_encoder": Encoder(2)})(x[:4], 0.3, given)
    with pytest.raises(ValueError, match=r"float .N, ...., of finite values, got inf"):
        net(x[:4], 0.3, {"features": signals[:4] + torch.tensor([torch.inf] + 7 * [0])})


@pytest.mark.parametrize("image", [0, 2])
def test_the_condition_of_an_encoder_has_units_of_its_own(image):
    """Also if it has as many axes and channels as the data."""
    torch.manual_seed(0)
    encoder = Encoder()
    net = ScoreNet.unet(1, (8,), **SMALL, condition_features=3, condition_encoder=encoder, condition_channels=image)
    x, signals = 250 + 30 * torch.randn(16, 1, 8, generator=seed()), torch.randn(16, 1, 8, generator=seed(1))
    parts = {"features": signals, "image": torch.randn(16, 2, 8, generator=seed(2))}
    condition = parts if image else signals
    net.fit_units(open_arrays((x, condition)))
    taken = []
    encoder.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    net(x, 10.0, parts if image else {"features": signals})
    net(x, 10.0, condition)
    assert all(torch.equal(each, signals) for each in taken) and len(taken) == 2


def test_an_encoder_needs_the_number_of_its_features():
    for build in (lambda **options: ScoreNet.mlp(2, **options), lambda **options: ScoreNet.unet(1, 8, **options)):
        with pytest.raises(ValueError, match="condition_encoder needs the number of its features"):
            build(condition_encoder=Encoder())
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, which is trained with the network, got .*sum"):
            build(condition_features=1, condition_encoder=torch.sum)  # the weights of a function would not be found
    ScoreNet.mlp(2, width=8)
    with pytest.raises(ValueError, match=r"holds a network without an encoder .*: leave out condition_encoder="):
        ScoreNet.from_pretrained("mnist", condition_encoder=Encoder())


@pytest.mark.slow
def test_images_of_data_are_standardized_and_changed_with_the_data(tmp_path, capsys):
    x = 250 + 30 * torch.randn(16, 1, 8, generator=seed(0))
    image = 1500 + 400 * torch.randn(16, 2, 8, generator=seed(1))
    np.savez(tmp_path / "x.npz", x=x.numpy(), condition=image.numpy())
    quiet = ("--device", "cpu", "--quiet")
    options = ("--images", "16", "--batch-size", "8", "--precision", "float32", "--sample-every", "16")
    assert main(["train", str(tmp_path / "x.npz"), "--out", str(tmp_path / "run"), *options, *quiet]) == 0
    net = ScoreNet.from_pretrained(tmp_path / "run")
    assert net.conditioning.channels == 2
    mean, std = (torch.tensor(part)[:, None] for part in net.units.image[:2])
    assert torch.allclose(mean[:, 0], image.mean((0, 2))) and torch.allclose(std[:, 0], image.std((0, 2)))
    score = net(x[:3], 5.0, image[:3])
    net.units = net.units._replace(image=Units((0.0, 0.0), (0.5, 0.5)))
    assert torch.allclose(net(x[:3], 5.0, (image[:3] - mean) / (2 * std)), score, atol=1e-5)

    sample = ["sample", str(tmp_path / "run"), str(tmp_path / "y.npz"), *quiet, "--condition"]
    np.save(tmp_path / "image.npy", image[:3].numpy())
    assert main([*sample, str(tmp_path / "image.npy")]) == 0
    drawn = np.load(tmp_path / "y.npz")
    assert drawn["x"].shape == (3, 1, 8) and np.array_equal(drawn["condition"], image[:3].numpy())
    np.save(tmp_path / "short.npy", image[:3, :, :4].numpy())
    for value, message in (
        (tmp_path / "short.npy", "must have an image of shape (2, 8) for each sample, as "),
        ("0.3,0.7", "must be a file of arrays, such as .npz or .npy, with the images that "),
    ):
        assert message in refused([*sample[:2], tmp_path / "z.npz", *quiet, "--condition", value], capsys)

    def loss(net, x, *, sigma, noise, condition):
        assert torch.equal(condition, torch.cat([x, -x], 1))
        return dsm_loss(net, x, sigma=sigma, noise=noise, condition=condition, reduction="none")

    own = ScoreNet.unet(1, (8,), **SMALL, condition_channels=2)
    changes = {"loss": loss, "augment": ("flip", "shift"), "images": 16, "batch_size": 8, "progress": False}
    train(own, (x, torch.cat([x, -x], 1)), tmp_path / "changed", **changes)
    with pytest.raises(ValueError, match=r"an image of 2 channels .* \(N, 2, 8\), got torch.float32 of shape \(1, 8\)"):
        train(ScoreNet.unet(1, (8,), **SMALL, condition_channels=2), (x, x), tmp_path / "wrong", **changes)
    with pytest.raises(ValueError, match=r"does not take. Build it with condition_channels=2"):
        train(ScoreNet.unet(1, (8,), **SMALL), (x, image), tmp_path / "none", **changes)
