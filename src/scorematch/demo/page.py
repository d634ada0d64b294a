"""The page of the demo: its layout in Gradio, and the values that it exchanges with the browser."""

from __future__ import annotations

import base64
import binascii
import html
import io
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from scorematch.data.pictures import to_pixels
from scorematch.demo.restorer import Choices, Frame, Restorer
from scorematch.restoration import OPERATORS, summary
from scorematch.restoration.methods import METHODS, Restore
from scorematch.sampling import SAMPLERS

FOLDER = Path(__file__).parent
_PREFIX = "data:image/png;base64,"
_COLUMNS = 8  # frames of the chain that are shown in a row
_THUMBNAIL = 64  # the largest side in pixels of a frame in that row
_SECONDS = 86_400  # after which the file of an uploaded picture is deleted, and at the end of the server
_MANY_CALLS = 250  # the upper end of the slider, unless the network's own sampler needs more
_LABELS = {
    "mask": "Fill in the painted part",
    "hole": "Fill in a random hole",
    "half": "Fill in a random half, at a side or all around",
    "uncrop": "Extend a part of the picture",
    "gray": "Colorize a gray copy",
    "pool": "Enlarge a small copy",
    "resize": "Enlarge a copy that was made smaller like a photograph",
    "blur": "Sharpen a blurred copy",
    "motion": "Sharpen a copy that is blurred by motion",
    "fourier": "Complete a part of the Fourier transform",
    "clip": "Restore values that were cut off, as in an overexposed photograph",
    "quantize": "Restore values that were rounded to a few levels",
    "jpeg": "Repair a JPEG copy",
}  # of operators; others have their help


Stage = Literal["draft", "refined"]


class Draft(NamedTuple):
    """An image (C, H, W) that is drawn with few network calls, and the choices with which it is refined."""

    choices: Choices
    image: Tensor


class Canvas(TypedDict):
    """What the browser sends: the picture as a data URL of a PNG, and a "1" for each missing pixel, else "0".

    Of a value that it receives, it ignores what is empty: the picture, or what is painted, then stays as it is.
    """

    picture: str
    hole: str


# -- Values of the page -----------------------------------------------------------------------------------------------


def png(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1], C being 1 or 3, as the data URL of a PNG with 8 bits."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(file, "PNG")
    return _PREFIX + base64.b64encode(file.getvalue()).decode()


def canvas(image: Tensor) -> Canvas:
    """The value of a canvas with an image (C, H, W) in [0, 1], on which nothing is painted."""
    return {"picture": png(image), "hole": "0" * image[0].numel()}


def read_canvas(value: Any, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Reads the value of a canvas, which comes from the browser and may be anything.

    Args:
        value: a ``Canvas``.
        shape: the shape (C, H, W) of the picture.

    Returns:
        The picture (C, H, W), float32 in [0, 1], and the hole (H, W), bool, True where a pixel is missing.

    Raises:
        ValueError: if it is not a PNG of this size with a mask of the same size.
    """
    from PIL import Image

    channels, height, width = shape
    wrong = ValueError(f"the canvas must have a picture of {height}x{width} pixels. Draw or upload one.")
    if not isinstance(value, dict):
        raise wrong
    url, painted = value.get("picture"), value.get("hole")
    if not (isinstance(url, str) and url.startswith(_PREFIX) and isinstance(painted, str)):
        raise wrong
    if len(painted) != height * width or not set(painted) <= {"0", "1"}:
        raise wrong
    try:
        content = base64.b64decode(url.removeprefix(_PREFIX), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            if file.size != (width, height):
                raise wrong
            pixels = np.array(file.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise wrong from error
    picture = torch.from_numpy(pixels.reshape(height, width, channels)).movedim(-1, 0).float() / 255
    hole = torch.from_numpy(np.array([int(pixel) for pixel in painted], dtype=bool)).reshape(height, width)
    return picture, hole


def results(
    frames: list[Frame], given: Tensor | None = None, *, stage: Stage | None = None, draft: Tensor | None = None
) -> str:
    """The HTML of a chain so far: the images of its last frame, and the first image of some of its frames.

    Args:
        frames: the frames so far, at least one.
        given: the degraded picture (C, H, W) in [0, 1] that is restored, or None if an image is drawn.
        stage: what the chain draws, if an image is drawn twice.
        draft: the draft (C, H, W), which is shown until it is refined.
    """
    last = frames[-1]
    done = last.sigma == 0
    title, name = ("Drawing", "drawn") if given is None else ("Restorations", "restored")
    images = [] if given is None else [_figure(given, "given")]
    if draft is not None and not done:
        images.append(_figure(draft, "draft", f"{name}-1.png"))
    else:
        for i, image in enumerate(last.denoised, 1):
            images.append(_figure(image, stage or "" if given is None else str(i), f"{name}-{i}.png" if done else None))
    what = {"draft": "Draft: ", "refined": "Refined: " if done else "Refining the draft: ", None: ""}[stage]
    status = "Click an image to download it." if done else f"Noise level {last.sigma:.3g}."
    of_first = " of image 1" if len(last.denoised) > 1 else ""
    chosen = _evenly(frames)
    noisy = [_figure(_thumbnail(frame.noisy[0])) for frame in chosen]
    denoised = [_figure(_thumbnail(frame.denoised[0])) for frame in chosen]
    spaces = ["<span></span>"] * (_COLUMNS - len(chosen))
    maps = _uncertainty(last.denoised) if done and given is not None and len(last.denoised) > 1 else ""
    smooth = "smooth" if max(last.denoised.shape[-2:]) > 2 * _THUMBNAIL else ""
    return (
        f"<section class='{smooth}'><h2>{title}</h2><p>{what}{last.call} of {last.calls} network calls. {status}</p>"
        f"<div class='bar'><div style='width: {100 * last.call / last.calls:.0f}%'></div></div>"
        f"<div class='images' data-done='{int(done)}'>{''.join(images)}</div>{maps}</section>"
        f"<section class='{smooth}'><h2>From noise to image</h2>"
        f"<p>The chain{of_first}. Above: the noisy image. Below: the network's estimate of the image without noise.</p>"
        f"<div class='chain'>{''.join(noisy + spaces + denoised)}</div></section>"
    )


def _uncertainty(restored: Tensor) -> str:
    """The HTML of the mean of restorations (n, C, H, W) and of the map of their standard deviation, equally high."""
    found = summary(restored)
    heat = found.deviation_map()
    wide = found.mean.shape[-1] * heat.shape[-2] / found.mean.shape[-2]  # of the mean, if it is as high as the map
    mean = _figure(found.mean, "mean", "restored-mean.png")
    deviation = _figure(heat, "standard deviation (images have values from 0 to 1)", "restored-deviation.png")
    columns = f"grid-template-columns: {wide:.0f}fr {heat.shape[-1]}fr"
    text = f"The mean of the {len(restored)} restorations, and how far they differ from it:"
    return f"<p>{text}</p><div class='maps' style='{columns}'>{mean}{deviation}</div>"


def _evenly(frames: list[Frame]) -> list[Frame]:
    """The frames, of those so far, that are nearest to equal distances in the whole chain, at most ``_COLUMNS``."""
    chosen = set()
    for i in range(_COLUMNS):
        here = (k for k, frame in enumerate(frames) if frame.call * (_COLUMNS - 1) >= i * frame.calls)
        chosen |= set(list(here)[:1])
    return [frames[k] for k in sorted(chosen)]


def _figure(image: Tensor, caption: str = "", download: str | None = None) -> str:
    """The HTML of one image, with a link to download it if a file name is given."""
    url = png(image)
    shown = f"<img src='{url}' alt='{html.escape(caption)}'>"
    if download is not None:
        shown = f"<a href='{url}' download='{download}'>{shown}</a>"
    return f"<figure>{shown}{f'<figcaption>{html.escape(caption)}</figcaption>' if caption else ''}</figure>"


def _thumbnail(image: Tensor) -> Tensor:
    """The image, reduced if it is large."""
    scale = _THUMBNAIL / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(1, int(scale * side)) for side in image.shape[-2:]]
    return torch.nn.functional.interpolate(image[None], size, mode="area")[0]


# -- What the buttons do ----------------------------------------------------------------------------------------------


class Events:
    """The functions behind the buttons, on values of the page. Errors are exceptions with one sentence for the user."""

    def __init__(self, restorer: Restorer) -> None:
        self.restorer = restorer

    def draw(
        self, count: int, drawn: Draft | None, sampler: str, calls: int, label: int
    ) -> Iterator[tuple[Canvas, str, int, Draft | None]]:
        """Draws an image, or a draft of it.

        Yields the canvas, the results, the number of drawn images, which is the next seed, and the last draft, which
        changes when a new one is complete.

        Args:
            count: the number of images drawn before.
            drawn: the last draft, or None.
            sampler: a key of ``SAMPLERS``.
            calls: the number of network calls.
            label: the class, or -1 for none.
        """
        choices = Choices(sampler, int(calls), seed=count, label=_label(label))
        draft = self.restorer.draft(choices)
        frames: list[Frame] = []
        for frame in self.restorer.draw(draft or choices):
            frames.append(frame)
            image = frame.denoised[0]
            if draft and frame.sigma == 0:
                drawn = Draft(choices, image)
            yield canvas(image), results(frames, stage="draft" if draft else None), count + 1, drawn

    def refine(self, drawn: Draft) -> Iterator[tuple[Canvas, str]]:
        """Draws the image of a draft with more network calls. Yields the canvas and the results."""
        frames: list[Frame] = []
        for frame in self.restorer.draw(drawn.choices):
            frames.append(frame)
            picture = png(frame.denoised[0]) if frame.sigma == 0 else ""
            yield {"picture": picture, "hole": ""}, results(frames, stage="refined", draft=drawn.image)

    def restore(
        self,
        value: Any,
        operator: str,
        arguments: str,
        n: int,
        sampler: str,
        calls: int,
        method: Restore,
        seed: int | None,
        label: int,
        photo: Tensor | None = None,
    ) -> Iterator[str]:
        """Restores the picture on the canvas. Yields the results.

        Args:
            value: the value of the canvas.
            operator: a key of ``Restorer.operators``.
            arguments: the arguments of the operator in its text form; not for "mask".
            n: the number of restorations.
            sampler: a key of ``SAMPLERS``.
            calls: the number of network calls.
            method: the method of restoration.
            seed: the random seed; None is an error.
            label: the class, or -1 for none.
            photo: the uploaded picture of another size of which the canvas shows a part, or None. A painted part and
                colors are restored in it.
        """
        if seed is None or not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be a whole number from 0 to {2**32 - 1}, such as 0.")
        picture, hole = read_canvas(value, self.restorer.shape)
        if photo is not None and operator in ("mask", "gray"):
            picture, hole = photo, self.restorer.enlarged(hole, photo)
        made = self.restorer.operator(operator, arguments, hole, picture, int(seed))
        y = made.measure(picture[None])
        missing = made.pseudo_inverse(torch.ones_like(y)) == 0
        given = torch.where(missing, 0.5, made.as_image(y).clamp(0, 1))[0]
        choices = Choices(sampler, int(calls), method, int(seed), _label(label))
        frames: list[Frame] = []
        for frame in self.restorer.restore(picture, made, int(n), choices):
            frames.append(frame)
            yield results(frames, given)

    def upload(self, path: str) -> tuple[Canvas, Tensor | None]:
        """Puts a picture of the user, or its middle, on the canvas, and returns it if it has another size."""
        picture = self.restorer.read(path)
        part = self.restorer.part(picture)
        return canvas(part), None if picture.shape == part.shape else picture

    def invert(self, value: Any) -> Canvas:
        """Makes the picture on the canvas a negative; what is painted remains."""
        picture, _ = read_canvas(value, self.restorer.shape)
        return {"picture": png(1 - picture), "hole": value["hole"]}


def _label(label: int) -> int | None:
    return None if label < 0 else int(label)


# -- Gradio -----------------------------------------------------------------------------------------------------------


def import_gradio() -> Any:
    """Imports Gradio, with its telemetry turned off.

    Raises:
        ImportError: without Gradio.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read at the import
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the demo needs Gradio: pip install "scorematch[demo]".') from error
    return gradio


def _template(height: int, width: int) -> str:
    """The HTML of the canvas for pictures of a size in pixels."""
    side = min(height, width)
    template = (FOLDER / "canvas.html").read_text("utf-8")
    return template.format(width=width, height=height, largest=max(2, side // 3), size=max(1, side // 8))


def _reported(function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
    """A generator of the results of a function, with its errors shown as messages on the page."""
    gr = import_gradio()

    def run(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            message = html.escape(" ".join(str(error).split()))
            raise gr.Error(message[:1].upper() + message[1:], print_exception=False) from error

    return run


def build(restorer: Restorer, name: str) -> Any:
    """Builds the page.

    Args:
        restorer: the network.
        name: its name, for the title.

    Returns:
        A ``gradio.Blocks``.

    Raises:
        ImportError: without Gradio.
    """
    gr = import_gradio()
    events, (channels, height, width) = Events(restorer), restorer.shape

    blank = torch.zeros(restorer.shape)
    what = "draws and restores" if restorer.draws else "restores"
    color = "gray" if channels == 1 else "color"
    title = f"scorematch: {name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3_600, _SECONDS)) as page:
        gr.HTML(
            f"<h1>{html.escape(name)}</h1><p>A score network that {what} {color} images of {height}x{width} pixels. "
            "Paint over a part of the picture: it is then missing, and the network fills it in.</p>",
            elem_id="about",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                painted = gr.HTML(
                    canvas(blank),
                    html_template=_template(height, width),
                    js_on_load=(FOLDER / "canvas.js").read_text("utf-8"),
                    apply_default_css=False,
                    elem_id="canvas",
                )
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", scale=3, min_width=120, elem_id="restore")
                    stop = gr.Button("Stop", min_width=60, elem_id="stop")
                with gr.Row():
                    new = gr.Button("New image", visible=restorer.draws, size="sm", min_width=80, elem_id="new")
                    file = gr.UploadButton("Upload", file_types=["image"], type="filepath", size="sm", min_width=80)
                    negative = gr.Button("Invert", size="sm", min_width=80, elem_id="invert")
                names = [(_LABELS.get(name, OPERATORS[name].help), name) for name in restorer.operators]
                operator = gr.Radio(names, value="mask", label="Damage", elem_id="operator")
                arguments = gr.Dropdown([""], value="", allow_custom_value=True, visible=False)
                n = gr.Slider(1, 8, 4, step=1, label="Restorations", elem_id="restorations")
                classes = [] if restorer.needs_class else [("any", -1)]
                classes += [(name, k) for k, name in enumerate(restorer.classes)]
                label = gr.Dropdown(classes, value=classes[0][1], label="Class", visible=bool(restorer.classes))
                with gr.Accordion("Sampler", open=False):
                    sampler = gr.Dropdown(list(SAMPLERS), value=restorer.sampler, label="Sampler")
                    most = max(_MANY_CALLS, restorer.calls)
                    info = "As they are set, restorations use the settings for restoring." if restorer.draws else None
                    calls = gr.Slider(
                        2, most, restorer.calls, step=1, label="Network calls", elem_id="calls", info=info
                    )
                    methods = [(f"{name}: {method.help} ({method.cost})", name) for name, method in METHODS.items()]
                    method = gr.Dropdown(methods, value="auto", label="Method of restoration")
                    seed = gr.Number(0, label="Seed", precision=0)
            with gr.Column(scale=3, min_width=320):
                hint = "Paint over a part of the picture, and click Restore."
                hint = hint if restorer.draws else f"Upload a picture. {hint}"
                shown = gr.HTML(f"<p class='hint'>{hint}</p>", apply_default_css=False, elem_id="results")
        count, drawn, photo = gr.State(0), gr.State(None), gr.State(None)

        chains: Any = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "hidden"}
        private: Any = {"api_visibility": "private"}
        # The listeners of a button run one after the other: those that end a chain must come first.
        refine = drawn.change(_reported(events.refine), drawn, [painted, shown], **chains, **private)
        new.click(None, cancels=refine, **private)
        new.click(lambda: None, None, photo, **private)
        begin = [new.click, page.load] if restorer.draws else [new.click]
        inputs, outputs = [count, drawn, sampler, calls, label], [painted, shown, count, drawn]
        draw = gr.on(begin, _reported(events.draw), inputs, outputs, **chains, **private)
        gr.on([go.click, file.upload, negative.click], None, cancels=[draw, refine], **private)
        values = [painted, operator, arguments, n, sampler, calls, method, seed, label, photo]
        restore = go.click(_reported(events.restore), values, shown, **chains, **private)
        stop.click(None, cancels=[draw, refine, restore], **private)
        file.upload(_reported(lambda path: [events.upload(path)]), file, [painted, photo], **private)
        negative.click(_reported(lambda value: [events.invert(value)]), painted, painted, **private)
        negative.click(lambda photo: None if photo is None else 1 - photo, photo, photo, **private)

        def offer(name: str) -> Any:
            """Shows the arguments of an operator, if it has any."""
            choices = list(restorer.operators[name]) or [""]
            label = OPERATORS[name].form.partition(":")[2].capitalize()
            return gr.update(choices=choices, value=choices[0], label=label, visible=choices != [""])

        operator.change(offer, operator, arguments, show_progress="hidden", **private)
    page.queue(default_concurrency_limit=1)
    return page


def serve(page: Any, restorer: Restorer, *, host: str, port: int | None, share: bool, browser: bool) -> None:
    """Serves a page until an interruption.

    Args:
        page: the result of ``build``.
        restorer: the network; its chains end with the server.
        host: the address to listen at.
        port: the port; None is the first free one from 7860.
        share: whether to publish the page at gradio.live for some days.
        browser: whether to open it in the browser.

    Raises:
        OSError: if the port is not free, or this computer does not have the address.
        KeyboardInterrupt: after Ctrl-C, when the server has ended.
    """
    gr = import_gradio()
    try:  # Gradio would try 100 ports, each for some seconds
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host.strip("[]"), 0))
    except OSError as error:
        raise OSError(
            f"{host} is not an address of this computer. Pass one with --host, or 0.0.0.0 for all of its addresses."
        ) from error
    try:
        _, url, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size="20mb",
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css_paths=FOLDER / "style.css",
        )
    except OSError as error:
        ports = "the ports from 7860 are" if port is None else f"port {port} is"
        raise OSError(f"{ports} not free at {host}. Pass another port with --port.") from error
    try:
        print(f"{public or url}\nPress Ctrl-C to end.", flush=True)
        threading.Event().wait()
    finally:
        restorer.stopped.set()
        page.close(verbose=False)
