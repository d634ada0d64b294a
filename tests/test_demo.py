"""The demo in the browser: its computations, the values of its page, the command, and the page in a browser."""

import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scorematch
from scorematch import NoiseSchedule, ScoreNet
from scorematch.cli import main
from scorematch.data.heat import heat_map
from scorematch.demo.page import Draft, Events, canvas, png, read_canvas, results, serve
from scorematch.demo.restorer import FRAMES, Choices, Frame, Restorer, _Watched
from scorematch.restoration import JPEG, OPERATORS, AveragePool, Grayscale, Hole, Mask, Observation
from scorematch.restoration.palette import condition_of
from scorematch.sampling import SAMPLERS, ODESampler, SamplerSettings, recommended_sampler
from tests.helpers import python, run, seed
from tests.networks import shared

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"
CHOICES = Choices("langevin", 6)


def _net(channels=1, size=8, **options):
    """A small network whose output depends on its input and its condition."""
    torch.manual_seed(0)
    options = {"schedule": NoiseSchedule.geometric(10, 0.02, 40), **options}
    net = ScoreNet.unet(channels, size, widths=(4, 8), layers_per_block=1, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope="module")
def gray():
    return Restorer(_net())


@pytest.fixture(scope="module")
def color():
    return Restorer(_net(3))


@pytest.fixture
def picture():
    """A picture of RGB with values of 8 bits."""
    return torch.randint(256, (3, 8, 8), generator=seed(5)) / 255


def _hole():
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:5, 3:] = True
    return hole


# -- What a network offers


def test_a_network_offers_the_operators_that_fit_it(gray, color):
    palette = Restorer(_net(3, condition_channels=3))
    assert list(gray.operators) == [name for name in OPERATORS if name != "gray"]
    assert (
        gray.operators["pool"] == ("4", "2", "8") and gray.operators["mask"] == () and gray.operators["hole"] == ("",)
    )
    assert list(color.operators) == list(OPERATORS)
    assert list(palette.operators) == ["mask", "hole", "half", "gray", "jpeg"] and not palette.draws
    assert gray.draws and gray.classes == () and not gray.needs_class


def test_a_class_is_needed_only_without_a_null_class():
    with_null, without = (Restorer(_net(classes=3, null_class=null)) for null in (True, False))
    assert with_null.classes == without.classes == ("0", "1", "2")
    assert (with_null.needs_class, without.needs_class) == (False, True)


def test_classes_with_names():
    net = _net(classes=2)
    net.class_names = ["cat", "dog"]
    assert Restorer(net).classes == ("cat", "dog")


def test_the_sampler_and_its_network_calls_are_those_recommended_for_the_network(gray):
    assert gray.sampler == "langevin" and gray.calls == len(recommended_sampler(gray.net))
    net = _net()
    net.sampler_settings = SamplerSettings("ode", levels=5, method="heun")
    restorer = Restorer(net)
    assert (restorer.sampler, restorer.calls) == ("ode", 9)
    assert repr(restorer.make_sampler(Choices("ode", 9))) == repr(recommended_sampler(net))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("calls", [5, 8, 39])
def test_a_sampler_uses_as_many_network_calls_as_it_can(gray, name, calls):
    method = "auto" if name == "decoupled" else "guide"  # which has a method of its own
    sampler = gray.make_sampler(Choices(name, calls, method=method))
    more = SAMPLERS[name](gray.net, levels=len(sampler.schedule) + 1)
    assert len(sampler) <= calls < len(more)
    assert type(sampler) is SAMPLERS[name] and sampler.restore == method


def test_options_that_are_recommended_for_a_sampler_are_kept_for_it_alone():
    net = _net()
    net.sampler_settings = SamplerSettings("predictor-corrector", levels=20, corrector_steps=2, sigma_max=5.0)
    restorer = Restorer(net)
    own, other = restorer.make_sampler(Choices("predictor-corrector", 14)), restorer.make_sampler(Choices("ode", 9))
    assert own.corrector_steps == 2 and own.schedule.sigma_max == pytest.approx(5)
    assert other.schedule.sigma_max == pytest.approx(10)


def _net_with_two_flows(recommended=None, **options):
    """Its quick setting is a flow with three network calls, the recommended one a flow with eleven."""
    net = _net(**options)
    quick = SamplerSettings("ode", levels=3, method="unipc", sigma_min=0.05)
    others = [SamplerSettings(levels=2), quick, SamplerSettings("ode", levels=11, method="heun")]
    settings = recommended or SamplerSettings("ode", levels=11, method="dpm-solver++")
    net.sampler_settings = SamplerSettings(settings.sampler, alternatives=others, **settings.options)
    return net


def test_the_stored_settings_of_a_number_of_calls_are_used():
    net = _net_with_two_flows()
    for calls in (3, 11, 21):
        assert repr(Restorer(net).make_sampler(Choices("ode", calls))) == repr(recommended_sampler(net, calls=calls))


def test_restorations_do_not_use_the_settings_for_drawing():
    restorer = Restorer(_net_with_two_flows())
    made = [restorer.make_sampler(Choices("ode", calls, "guide")) for calls in (restorer.calls, 3)]
    assert list(map(repr, made)) == [repr(ODESampler(restorer.net, restore="guide", levels=each)) for each in (None, 3)]


@pytest.mark.slow
def test_a_draft_is_drawn_by_the_flow_with_the_fewest_calls():
    """Not by annealed sampling, whose image is another one, and only if the user has not chosen the sampler."""
    restorer = Restorer(_net_with_two_flows())
    assert restorer.quickest == ("ode", 3)
    chosen = Choices("ode", 11, seed=5, label=None)
    assert restorer.draft(chosen) == Choices("ode", 3, seed=5)
    assert restorer.draft(Choices("ode", 12)) is restorer.draft(Choices("langevin", 11)) is None
    for recommended in (SamplerSettings(levels=40), SamplerSettings("ode", levels=2, method="unipc")):
        other = Restorer(_net_with_two_flows(recommended))
        assert other.quickest is None and other.draft(Choices(other.sampler, other.calls)) is None
    alone = _net()
    alone.sampler_settings = SamplerSettings("ode", levels=11, method="unipc")
    assert Restorer(alone).quickest is None


def test_too_few_network_calls_give_an_error(gray):
    with pytest.raises(ValueError, match=r"this sampler needs at least 3 network calls, got 2\. Choose more\."):
        gray.make_sampler(Choices("ode", 2))


# -- Chains


def test_the_last_frame_of_a_drawing_is_a_sample(gray):
    *_, last = gray.draw(Choices("langevin", 12, seed=3))
    expected = run(recommended_sampler(gray.net, levels=12), 1, generator=3)
    assert torch.equal(last.denoised, expected) and last.sigma == 0


@pytest.mark.slow
def test_a_class_reaches_the_network():
    restorer = Restorer(_net(classes=3, null_class=True))
    drawn = [list(restorer.draw(Choices("langevin", 6, label=label)))[-1].denoised for label in (None, 0, 1)]
    sampler = recommended_sampler(restorer.net, levels=6)
    assert torch.equal(drawn[0], run(sampler, 1, generator=0))
    assert torch.equal(drawn[2], run(sampler, 1, generator=0, condition=1)) and not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("name", "arguments", "operator"),
    [
        ("mask", "", Mask(~_hole())),
        ("gray", "", Grayscale()),
        ("pool", "4", AveragePool(4)),
        ("jpeg", "9", JPEG(9)),
        ("hole", "", Hole().drawn(torch.zeros(1, 3, 8, 8), [2])),
    ],
)
def test_the_last_frame_of_a_restoration_is_that_of_the_sampler(color, picture, name, arguments, operator):
    made = color.operator(name, arguments, _hole(), picture, 2)
    assert repr(made) == repr(operator)
    *_, last = color.restore(picture, made, 3, Choices("langevin", 6, "guide", seed=2))
    observation = Observation(operator, operator.measure(picture[None]))
    expected = run(SAMPLERS["langevin"](color.net, levels=6, restore="guide"), 3, observation=observation, generator=2)
    assert torch.equal(last.denoised, expected)


def test_a_network_with_an_image_as_its_condition_restores_with_it(picture):
    restorer = Restorer(_net(3, condition_channels=3))
    operator, generator = Mask(~_hole()), seed(4)
    *_, last = restorer.restore(picture, operator, 2, Choices("langevin", 6, seed=4))
    y = operator.measure(picture[None])
    condition = condition_of(operator, y.expand(2, -1, -1, -1), generator)
    sampler = recommended_sampler(restorer.net, levels=6)
    expected = run(sampler, 2, condition=condition, observation=Observation(operator, y), generator=generator)
    assert torch.equal(last.denoised, expected)


def test_such_a_network_does_not_draw():
    with pytest.raises(ValueError, match=r"restores pictures and does not draw them\. Upload a picture\."):
        Restorer(_net(3, condition_channels=3)).draw(CHOICES)


@pytest.mark.parametrize(("name", "calls"), [*((name, 5) for name in SAMPLERS), ("langevin", 26)])
def test_the_frames_of_a_chain_go_from_noise_to_image(gray, name, calls):
    frames = list(gray.draw(Choices(name, calls)))
    assert len(frames) <= FRAMES + 2
    assert [frame.call for frame in frames] == sorted(frame.call for frame in frames)
    assert [frame.sigma for frame in frames] == sorted((frame.sigma for frame in frames), reverse=True)
    last = frames[-1]
    assert last.call == last.calls == len(gray.make_sampler(Choices(name, calls))) and last.sigma == 0
    assert torch.equal(last.noisy, last.denoised)
    for frame in frames:
        for images in (frame.noisy, frame.denoised):
            assert images.shape == (1, 1, 8, 8) and images.min() >= 0 and images.max() <= 1


def test_frames_show_the_denoised_images_of_the_last_network_call():
    net = _net()
    watched, x = _Watched(net), torch.rand(2, 1, 8, 8)
    assert torch.equal(watched(x, torch.tensor(0.5)), net(x, 0.5))
    torch.testing.assert_close(watched.denoised, net.denoise(x, 0.5))
    assert watched.calls == 1 and watched.schedule is net.schedule and watched.device == torch.device("cpu")


def test_a_predicted_variance_is_passed_on():
    net = shared("unet, variance")
    watched, x = _Watched(net), torch.rand(2, 5, 8, 8)
    found, expected = watched.score_and_variance(x, 0.5), net.score_and_variance(x, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(watched.denoised, net.denoise(x, 0.5))


def test_chains_end_when_the_restorer_is_stopped():
    restorer = Restorer(_net())
    frames = restorer.draw(Choices("langevin", 12))
    assert next(frames).call == 1
    restorer.stopped.set()
    assert list(frames) == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gray", "", r"operator must be one of 'mask', 'hole', .* got 'gray'\."),
        ("pool", "two", "operator must be pool:SIZE, such as pool:4, got 'pool:two'"),
        ("pool", "2 @ mask:secret.png", "operator must be pool:SIZE, such as pool:4, got 'pool:2 @ mask:secret.png'"),
    ],
)
def test_an_operator_that_does_not_fit_the_network_gives_an_error(gray, picture, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        gray.operator(name, arguments, _hole(), picture[:1], 0)


# -- Pictures and values of the page


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_uploaded_picture_is_cropped_and_resized(mode, channels, gray, color, tmp_path):
    """A white picture of twice the height, with a black border at the top and at the bottom, which is cropped."""
    values = np.zeros((32, 16), dtype=np.uint16 if mode == "I;16" else np.uint8)
    values[8:24] = 65535 if mode == "I;16" else 255
    made = Image.fromarray(values)
    (made if mode in ("L", "I;16") else made.convert(mode)).save(tmp_path / "x.png")
    restorer = gray if channels == 1 else color
    picture = restorer.read(str(tmp_path / "x.png"))
    assert picture.shape == (channels, 32, 16)
    torch.testing.assert_close(restorer.part(picture), torch.ones(channels, 8, 8))


def test_a_large_picture_is_made_smaller(gray, tmp_path):
    Image.new("L", (16, 2048)).save(tmp_path / "x.png")
    assert gray.read(str(tmp_path / "x.png")).shape == (1, 1024, 8)


def test_a_file_that_is_not_an_image_gives_an_error(gray, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(OSError, match=r"the file cannot be read as an image\. Upload a PNG or JPEG file\."):
        gray.read(str(tmp_path / "x.png"))


def test_a_damaged_file_gives_an_error(gray, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(24, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[content.index(b"IDAT") - 1] -= 64  # the length of the pixels: what follows them is no chunk
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(OSError, match=r"the file cannot be read as an image\. Upload a PNG or JPEG file\."):
        gray.read(str(tmp_path / "x.png"))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_value_of_a_canvas_keeps_every_pixel(channels, picture):
    value = canvas(picture[:channels])
    value["hole"] = "".join(map(str, _hole().int().flatten().tolist()))
    found, hole = read_canvas(value, (channels, 8, 8))
    assert torch.equal(found, picture[:channels]) and torch.equal(hole, _hole())


def _jpeg_in_place_of_a_png():
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "changed",
    [
        {"picture": png(torch.zeros(1, 8, 9))},
        {"picture": "https://example.org/x.png"},
        {"picture": "data:image/png;base64,AAAA"},
        {"picture": "data:image/png;base64,%%%"},
        {"picture": png(torch.zeros(1, 8, 8))[:60]},
        {"picture": _jpeg_in_place_of_a_png()},
        {"picture": None},
        {"hole": "0" * 63},
        {"hole": "2" * 64},
        {"hole": ["0"] * 64},
    ],
)
def test_a_bad_value_of_a_canvas_gives_an_error(changed):
    with pytest.raises(ValueError, match=r"the canvas must have a picture of 8x8 pixels\. Draw or upload one\."):
        read_canvas({**canvas(torch.zeros(1, 8, 8)), **changed}, (1, 8, 8))


def test_a_value_that_is_no_canvas_gives_an_error():
    with pytest.raises(ValueError, match="the canvas must have a picture of 8x8 pixels"):
        read_canvas("nothing", (1, 8, 8))


def _pictures(page):
    """The pictures of a part of the page, (C, H, W) with 8 bits."""
    found = [
        Image.open(io.BytesIO(base64.b64decode(url)))
        for url in re.findall(r"src='data:image/png;base64,([^']*)'", page)
    ]
    return [torch.from_numpy(np.array(image)) for image in found]


def test_the_known_pixels_of_the_shown_restorations_are_those_of_the_canvas(color, picture):
    value = {**canvas(picture), "hole": "".join(map(str, _hole().int().flatten().tolist()))}
    *_, page = Events(color).restore(value, "mask", "", 3, "langevin", 6, "replace", 0, -1)
    given, *restored = _pictures(page)[:4]
    pixels = (picture * 255).round().byte().movedim(0, -1)
    for shown in restored:
        assert torch.equal(shown[~_hole()], pixels[~_hole()])
    assert torch.equal(given[~_hole()], pixels[~_hole()]) and (given[_hole()] == 128).all()
    assert not torch.equal(restored[0], restored[1])
    assert re.findall(r"download='([^']*)'", page) == [
        *("restored-1.png", "restored-2.png", "restored-3.png", "restored-mean.png", "restored-deviation.png")
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_restorations_are_shown_with_their_mean_and_the_map_of_their_deviation(channels):
    images = torch.rand(5, channels, 8, 12, generator=seed())
    maps = results([Frame(6, 6, 0.0, images, images)], images[0]).partition("class='maps'")[2]
    *_, mean, deviation = _pictures(maps.partition("<section")[0])
    values = (images.square().mean(0) - images.mean(0).square()).mul(5 / 4).mean(0).sqrt()
    for shown, expected in ((mean, images.mean(0)), (deviation, heat_map(values))):
        expected = (255 * expected).movedim(0, -1)
        assert (shown.reshape(expected.shape) - expected).abs().max() <= 1
    assert "columns: 384fr 456fr" in maps  # 32 x (8, 12) pixels, and 72 for the scale
    for frame, given in (
        (Frame(6, 6, 0.0, images[:1], images[:1]), images[0]),  # a single restoration
        (Frame(6, 6, 0.0, images, images), None),  # drawings
        (Frame(5, 6, 1.0, images, images), images[0]),  # before the end
    ):
        assert "class='maps'" not in results([frame], given)


@pytest.mark.slow
def test_the_mean_is_shown_for_every_operator(gray, color, picture):
    for restorer in (gray, color):
        shape = restorer.shape
        value = {**canvas(picture[: shape[0]]), "hole": "".join(map(str, _hole().int().flatten().tolist()))}
        for name, arguments in restorer.operators.items():
            *_, page = Events(restorer).restore(value, name, (*arguments, "")[0], 2, "langevin", 3, "auto", 0, -1)
            _, first, second, mean, deviation = _pictures(page)[:5]
            assert (mean.float() - (first.float() + second.float()) / 2).abs().max() <= 1, name
            assert deviation.shape == (256, 328, 3)


def test_nothing_painted_gives_an_error(gray):
    events = Events(gray).restore(canvas(torch.zeros(1, 8, 8)), "mask", "", 1, "langevin", 6, "replace", 0, -1)
    with pytest.raises(ValueError, match=r"nothing is missing: paint over a part of the picture first\."):
        next(events)


@pytest.mark.parametrize("bad", [None, -1, 2**32])
def test_a_bad_seed_gives_an_error(gray, bad):
    events = Events(gray).restore(canvas(torch.zeros(1, 8, 8)), "pool", "2", 1, "langevin", 6, "replace", bad, -1)
    with pytest.raises(ValueError, match=r"the seed must be a whole number from 0 to 4294967295, such as 0\."):
        next(events)


def test_a_drawing_appears_on_the_canvas_and_the_next_one_differs(gray):
    events = Events(gray)
    *_, (first, page, count, draft) = events.draw(0, None, "langevin", 6, -1)
    *_, (second, *_) = events.draw(count, draft, "langevin", 6, -1)
    *_, last = gray.draw(Choices("langevin", 6, seed=0))
    assert first == canvas(last.denoised[0]) and first != second and count == 1 and draft is None
    assert "6 of 6 network calls" in page and "download='drawn-1.png'" in page


@pytest.mark.slow
def test_a_draft_is_shown_until_it_is_refined_with_the_same_seed():
    net = _net_with_two_flows(channels=3, classes=3, null_class=True)
    events, before = Events(Restorer(net)), Draft(CHOICES, torch.zeros(3, 8, 8))
    *frames, (value, page, count, drawn) = events.draw(4, before, "ode", 11, 1)
    score = net.inference_copy()
    quick, best = (run(recommended_sampler(score, calls=n), 1, generator=4, condition=1)[0] for n in (3, 11))
    assert all(frame[3] is before for frame in frames) and count == 5
    assert (
        value == canvas(quick)
        and torch.equal(drawn.image, quick)
        and drawn.choices == Choices("ode", 11, seed=4, label=1)
    )
    assert "Draft: 3 of 3 network calls" in page and "<figcaption>draft<" in page and f"{png(quick)}' download" in page
    *refining, (last, page) = events.refine(drawn)
    assert last == {"picture": png(best), "hole": ""} and png(best) != png(quick)
    assert (
        "Refined: 11 of 11 network calls" in page
        and "<figcaption>refined<" in page
        and f"{png(best)}' download" in page
    )
    for value, page in refining:
        assert value == {"picture": "", "hole": ""} and "data-done='0'" in page
        assert "Refining the draft: " in page and "<figcaption>draft<" in page and f"{png(quick)}' download" in page
    *_, (_, page, _, drawn) = events.draw(4, before, "ode", 10, 1)  # with calls that the user has chosen
    assert drawn is before and "raft" not in page and "efin" not in page


@pytest.mark.slow
def test_a_refined_digit_is_nearly_its_draft():
    restorer = Restorer(ScoreNet.from_pretrained("mnist-classes"))
    chosen = [Choices(restorer.sampler, restorer.calls, seed=k, label=k) for k in range(3)]
    *_, last = zip(*(list(restorer.draw(each))[-3:] for each in chosen), strict=True)
    *_, draft = zip(*(list(restorer.draw(restorer.draft(each)))[-3:] for each in chosen), strict=True)
    images, drafts = (torch.cat([frame.denoised for frame in frames]) for frames in (last, draft))
    change = (images - drafts).square().mean().sqrt()
    assert 0 < change < 0.4 * (images - images.roll(1, 0)).square().mean().sqrt()


def test_inverting_keeps_what_is_painted(gray, picture):
    value = {"picture": png(picture[:1]), "hole": "01" * 32}
    inverted = Events(gray).invert(value)
    assert inverted["hole"] == value["hole"]
    torch.testing.assert_close(read_canvas(inverted, (1, 8, 8))[0], 1 - picture[:1])


def test_an_upload_appears_on_the_canvas(gray, tmp_path):
    Image.new("L", (16, 16), 200).save(tmp_path / "x.png")
    shown, photo = Events(gray).upload(str(tmp_path / "x.png"))
    assert shown == canvas(torch.full((1, 8, 8), 200 / 255)) and photo.shape == (1, 16, 16)


@pytest.mark.parametrize("operator", ["mask", "gray", "pool"])
def test_an_uploaded_picture_is_restored_at_its_own_size(color, operator):
    """What is painted on its middle, and its colors; other damage is that of the small picture."""
    photo = torch.randint(256, (3, 24, 40), generator=seed()) / 255
    value = {**canvas(color.part(photo)), "hole": "".join(map(str, _hole().int().flatten().tolist()))}
    *_, page = Events(color).restore(
        value, operator, "2" if operator == "pool" else "", 1, "langevin", 6, "replace", 0, -1, photo
    )
    restored = _pictures(page)[1]
    if operator == "pool":
        assert restored.shape == (8, 8, 3)
        return
    known = torch.ones(24, 40, dtype=torch.bool)
    known[6:15, 17:32] = False
    assert torch.equal(color.enlarged(_hole(), photo), ~known)
    pixels = (photo * 255).round().byte().movedim(0, -1)
    assert restored.shape == (24, 40, 3)
    assert torch.equal(restored[known], pixels[known]) == (operator == "mask")
    assert not torch.equal(restored[~known], pixels[~known])


def test_the_colors_of_a_panorama_are_restored_in_its_middle(color):
    photo = torch.randint(256, (3, 9, 60), generator=seed()) / 255
    *_, page = Events(color).restore(canvas(color.part(photo)), "gray", "", 1, "langevin", 6, "replace", 0, -1, photo)
    restored = _pictures(page)[1].int()
    colored = (restored.amax(2) - restored.amin(2)).amax(0) > 2
    assert restored.shape == (9, 60, 3) and colored[25:34].any() and not colored[:25].any() and not colored[34:].any()


def _frame(call, calls, size=8):
    image = torch.full((1, 1, size, size), call / calls)
    return Frame(call, calls, float(calls - call), image, image)


@pytest.mark.parametrize(
    ("calls", "so_far", "columns"), [(100, 25, 8), (100, 1, 1), (100, 13, 4), (3, 3, 3), (40, 25, 8)]
)
def test_the_chain_has_frames_at_equal_distances(calls, so_far, columns):
    every = sorted({max(1, calls * i // FRAMES) for i in range(FRAMES + 1)})
    frames = [_frame(call, calls) for call in every[:so_far]]
    chain = results(frames).partition("class='chain'")[2]
    shown = _pictures(chain)
    assert len(shown) == 2 * columns and chain.count("<span>") == 8 - columns
    values = [int(image[0, 0]) for image in shown[:columns]]
    assert values == [int(image[0, 0]) for image in shown[columns:]] == sorted(values)
    if so_far == len(every):
        assert values[-1] == 255
        assert max(np.diff(values), default=0) <= 255 * (1 / 7 + 1 / min(calls, FRAMES)) + 1


def test_large_images_of_the_chain_are_reduced(gray):
    shown = _pictures(results([_frame(4, 4, size=160)]))
    assert [image.shape[0] for image in shown] == [160, 64, 64]
    strip = torch.rand(1, 1, 160, 1)
    assert [image.shape for image in _pictures(results([Frame(4, 4, 0.0, strip, strip)]))] == [(160, 1), *[(64, 1)] * 2]


# -- The command


def test_without_gradio_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "no-such-network"]) == 2
    assert capsys.readouterr().err == 'scorematch: the demo needs Gradio: pip install "scorematch[demo]".\n'


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_a_bad_port_gives_an_error(port, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", f"--port={port}"])
    assert ended.value.code == 2
    assert (
        f"argument --port: must be an integer of at least 1 and at most 65,535, got '{port}'" in capsys.readouterr().err
    )


def test_the_space_requires_what_the_package_requires():
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    gradio, *others = re.findall(r'"(.*?)"', re.search(r"^demo = \[(.*)\]", project, re.MULTILINE)[1])
    first, *lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert first == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert lines == [*re.findall(r'"(.*?)"', needed), *others]
    lowest = re.fullmatch(r"gradio>=([\d.]+),<\d+", gradio)[1]
    assert re.search(rf"^sdk_version: {lowest}\.\d+$", (SPACE / "README.md").read_text(), re.MULTILINE)


# -- The page


needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra demo is not installed")


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def _server(*command, **options):
    """Starts the demo, yields its address, interrupts it, and checks that it ends with status 130."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, command)], **pipes, **options)
    try:
        first = process.stdout.readline()  # it is printed when the page is served; or the process has ended
        assert first.startswith("http://"), first + process.stdout.read()
        yield first.strip()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert rest.endswith("scorematch: interrupted\n"), rest
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_gradio
def test_the_space_serves_the_page(tmp_path):
    """With exactly the files that docs/demo.md uploads."""
    shutil.copytree(SPACE, tmp_path, dirs_exist_ok=True)
    package = Path(scorematch.__file__).parent
    shutil.copytree(package, tmp_path / "scorematch", ignore=shutil.ignore_patterns("*.pyc", "__pycache__"))
    port = _free_port()
    environment = {"PATH": "/usr/bin:/bin", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with _server("app.py", cwd=tmp_path, env=environment) as address:
        assert address.endswith(f":{port}/")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/", timeout=60) as page:
            assert '"title":"scorematch: mnist"' in page.read().decode()


@pytest.mark.slow
@needs_gradio
def test_the_page_has_the_controls_that_the_network_needs(tmp_path):
    """Networks with classes, with and without a null class, for restoration, and for images that no block divides."""
    (tmp_path / "build.py").write_text(
        "from scorematch import ScoreNet\n"
        "from scorematch.demo.page import build\n"
        "from scorematch.demo.restorer import Restorer\n"
        "def controls(channels, size, **options):\n"
        "    net = ScoreNet.unet(channels, size, widths=(4,), layers_per_block=1, **options)\n"
        "    page = build(Restorer(net), '<b>')\n"
        "    blocks = [block for block in page.blocks.values() if getattr(block, 'visible', False)]\n"
        "    labels = {getattr(block, 'label', None) or getattr(block, 'value', None): block for block in blocks\n"
        "              if block.get_block_name() in ('radio', 'dropdown', 'button')}\n"
        "    assert not page.analytics_enabled\n"
        "    assert not any('<b>' in str(block.value) for block in blocks if block.get_block_name() == 'html')\n"
        "    return labels\n"
        "plain = controls(1, 9)\n"
        "assert {'New image', 'Restore', 'Stop', 'Damage', 'Sampler'} <= set(plain) and 'Class' not in plain\n"
        "names = [value for _, value in plain['Damage'].choices]\n"
        "assert names[:5] == ['mask', 'hole', 'half', 'uncrop', 'blur']\n"
        "assert not {'gray', 'pool', 'resize'} & set(names)\n"
        "palette = controls(3, 8, condition_channels=3)\n"
        "assert 'New image' not in palette\n"
        "assert [value for _, value in palette['Damage'].choices] == ['mask', 'hole', 'half', 'gray', 'jpeg']\n"
        "for null in (False, True):\n"
        "    classes = controls(3, 8, classes=3, null_class=null)['Class']\n"
        "    assert [value for _, value in classes.choices] == [-1, 0, 1, 2][not null:]\n"
        "    assert classes.value == (-1 if null else 0)\n"
    )
    python(tmp_path / "build.py")


@pytest.mark.slow
@needs_gradio
def test_a_port_that_is_not_free_gives_an_error(tmp_path):
    _net().save_pretrained(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = python("-m", "scorematch", "demo", tmp_path, "--no-browser", "--port", port, check=False)
    assert done.returncode == 2
    assert done.stderr == f"scorematch: port {port} is not free at 127.0.0.1. Pass another port with --port.\n"


@needs_gradio
@pytest.mark.parametrize("host", ["203.0.113.7", "[2001:db8::7]"])  # of documentations, RFC 5737 and 3849
def test_an_address_of_another_computer_gives_an_error_at_once(gray, host):
    with pytest.raises(OSError, match=f"{re.escape(host)} is not an address of this computer. Pass one with --host"):
        serve(None, gray, host=host, port=None, share=False, browser=False)


@pytest.mark.slow
@needs_gradio
def test_an_uploaded_picture_does_not_stay_on_the_disk(tmp_path):
    _net().save_pretrained(tmp_path / "net")
    uploads = tmp_path / "uploads"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(uploads)}
    with _server("-m", "scorematch", "demo", tmp_path / "net", "--no-browser", env=environment) as address:
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="me.png"\r\n\r\npicture\r\n--x--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"http://{address[7:]}gradio_api/upload", part, headers)
        opener.open(request, timeout=60).close()
        assert len(list(uploads.rglob("me.png"))) == 1
    assert not list(uploads.rglob("me.png"))


@contextmanager
def _browser(playwright, executable):
    arguments = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            headless=True,
            args=[*arguments.split(), "--disable-component-update", "--disable-sync"],
            timeout=60_000,
        )
        context.set_default_timeout(60_000)
        try:
            yield context
        finally:
            context.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_gradio
def test_a_stroke_and_a_click_restore_the_picture_in_a_browser(tmp_path):
    """Outside of the stroke the shown restorations have the pixels of the canvas, and no other server is asked."""
    pytest.importorskip("playwright", reason="Playwright is not installed")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("there is no Chromium or Chrome")
    from playwright.sync_api import sync_playwright

    net = _net(3, size=16)
    quick = SamplerSettings("ode", levels=2)
    net.sampler_settings = SamplerSettings("ode", levels=60, method="unipc", alternatives=[quick])
    net.save_pretrained(tmp_path)
    requests, errors = [], []
    command = ("-m", "scorematch", "demo", tmp_path, "--no-browser", "--port", _free_port())
    with _server(*command) as address, sync_playwright() as playwright, _browser(playwright, executable) as context:
        context.on("request", lambda request: requests.append(request.url))
        page = context.pages[0]
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("text=Refining the draft: ")
        page.click("[data-tool=right]")  # what is painted meanwhile stays
        page.wait_for_selector("text=Refined: 60 of 60 network calls.")
        page.click("[data-tool=brush]")
        assert 128 <= page.evaluate(_PAINTED) < 140  # a pixel of the picture may be orange

        page.click("#new")
        page.wait_for_selector("text=Refining the draft: ")
        with page.expect_response("**/cancel") as answer:
            page.click("#stop")
        assert answer.value.ok and page.is_visible("text=Refining the draft: ")
        assert page.inner_text("#results figcaption") == "draft" and page.evaluate(_PAINTED) < 12
        (drawn, *_) = _pictures_of(page)

        # An error is shown as a message.
        page.click("#restore")
        page.wait_for_selector("text=Nothing is missing: paint over a part of the picture first.")

        page.fill("#restorations input[type=number]", "2")
        page.locator("#canvas canvas").scroll_into_view_if_needed()
        box = page.locator("#canvas canvas").bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.6 * box["height"], steps=4)
        page.mouse.up()
        page.click("#restore")
        page.wait_for_selector("a[download='restored-2.png']")
        given, *restored = _pictures_of(page)[:3]

        # A second click starts a chain that is interrupted with the server.
        page.click("[data-tool=right]")
        page.click("#restore")
    hole = (given == 128).all(-1)
    assert hole[8, 8] and 0 < hole.sum() < 100
    assert len(restored) == 2 and not torch.equal(restored[0], restored[1])
    for image in restored:
        assert torch.equal(image[~hole], drawn[~hole]) and not torch.equal(image[hole], drawn[hole])
    assert errors == []
    assert {url for url in requests if not url.startswith(("data:", address))} == set()


# The number of orange pixels of the canvas, which are 92 % opaque.
_PAINTED = """() => {
  const {width, height} = document.querySelector("#canvas canvas");
  const values = document.querySelector("#canvas canvas").getContext("2d").getImageData(0, 0, width, height).data;
  return Array.from({length: width * height}, (_, i) => values.slice(4 * i, 4 * i + 3))
    .filter(([red, green, blue]) => red > 225 && green > 100 && green < 135 && blue < 50).length;
}"""


def _pictures_of(page):
    """The pictures that the page shows as results."""
    sources = page.eval_on_selector_all("#results img", "images => images.map(image => image.src)")
    return _pictures("".join(f"src='{source}'" for source in sources))
