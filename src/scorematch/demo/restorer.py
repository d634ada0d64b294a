"""Drawing and restoring with one network, step by step: the computations of the demo, without its page."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scorematch.core.arguments import check_choice
from scorematch.core.conditions import takes_image, with_image
from scorematch.core.scores import Given, device_of
from scorematch.data.pictures import read_image
from scorematch.restoration import OPERATORS, Mask, Observation, Operator, Photograph
from scorematch.restoration.methods import Restore
from scorematch.restoration.operators import single_operator
from scorematch.restoration.palette import TASKS, condition_of
from scorematch.restoration.photograph import Box, resized
from scorematch.sampling import SAMPLERS, Sampler, SamplerSettings, recommended_sampler
from scorematch.score import ScoreNet

_LARGEST = 1024  # the largest side of an uploaded picture in pixels
FRAMES = 24  # the largest number of frames that are shown of a chain


@dataclass(frozen=True)
class Frame:
    """A chain of n images after some of its network calls.

    Attributes:
        call: the number of network calls so far.
        calls: the number of network calls of the whole chain.
        sigma: the noise level, in units of images in [0, 1]; 0 at the end.
        noisy: the states (n, C, H, W), scaled so that noise and image together have the contrast of an image.
        denoised: the denoised images (n, C, H, W); at the end, the results.
    """

    call: int
    calls: int
    sigma: float
    noisy: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Choices:
    """What a user chooses for a chain.

    Attributes:
        sampler: a key of ``SAMPLERS``.
        calls: the number of network calls; the sampler uses as many as it can up to this number.
        method: a key of ``METHODS``, the method of restoration; None draws.
        seed: the random seed.
        label: the class to draw, or None.
    """

    sampler: str
    calls: int
    method: Restore | None = None
    seed: int = 0
    label: int | None = None


class Restorer:
    """A network with everything that the demo offers for it.

    Args:
        net: a network that draws gray or RGB images in [0, 1].

    Attributes:
        shape: the shape (C, H, W) of its images.
        draws: whether it draws images without being given one; a network like Palette's does not.
        classes: the names of the classes of a class-conditional network, which may be numbers; empty for others.
        needs_class: whether a class must be chosen.
        sampler: the key in ``SAMPLERS`` of the recommended sampler.
        calls: the number of network calls of the recommended sampler.
        quickest: the sampler and the number of network calls of the stored settings with the fewest calls, if these and
            the recommended ones are flows, which draw nearly the same image from the same seed; otherwise None.
        operators: the names in ``OPERATORS`` that it can restore from, with arguments that fit its images; for "mask",
            which is painted, there are none.
        stopped: set it to end all chains, each after its current step.
    """

    def __init__(self, net: ScoreNet) -> None:
        self.net = net.inference_copy()
        self.stopped = threading.Event()
        assert net.sample_shape is not None  # noqa: S101  (the command checks it)
        channels, height, width = net.sample_shape
        self.shape = (channels, height, width)
        takes = net.conditioning
        self.draws = not takes_image(net)
        numbers = range(takes.classes) if takes is not None and takes.classes is not None else ()
        self.classes = net.class_names or tuple(map(str, numbers))
        self.needs_class = takes is not None and bool(self.classes) and not takes.null_class
        settings = net.sampler_settings
        self.sampler = "langevin" if settings is None else settings.sampler
        recommended = recommended_sampler(self.net)
        self.calls = len(recommended)
        self._stored: dict[tuple[str, int], SamplerSettings] = {}
        self.quickest: tuple[str, int] | None = None
        for each in () if settings is None else (settings, *settings.alternatives):
            sampler = recommended_sampler(self.net, each)
            self._stored.setdefault((each.sampler, len(sampler)), each)
            fewest = self.calls if self.quickest is None else self.quickest[1]
            if len(sampler) < fewest and not (sampler.draws_noise or recommended.draws_noise):
                self.quickest = each.sampler, len(sampler)
        self.operators: dict[str, tuple[str, ...]] = {"mask": ()}
        for name in OPERATORS:
            if name != "mask" and (arguments := self._fitting(name)):
                self.operators[name] = arguments

    def _fitting(self, name: str) -> tuple[str, ...]:
        """The arguments of the examples of an operator that fit the images; none if the network is not made for it."""
        if not self.draws and name not in TASKS:
            return ()
        x, found = torch.zeros(1, *self.shape), []
        for text in OPERATORS[name].examples:
            try:
                operator = single_operator(text).drawn(x, [0])
                if operator.as_image(operator.measure(x)).shape == x.shape:
                    found.append(text.partition(":")[2])
            except (ValueError, RuntimeError):
                pass
        return tuple(found)

    def read(self, path: str) -> Tensor:
        """Reads a picture from a file; one with a side of more than 1,024 pixels is made smaller.

        Returns:
            The picture (C, H, W), float32 in [0, 1].

        Raises:
            OSError: if the file is not an image.
        """
        try:
            picture = read_image(path, self.shape[0])
        except OSError as error:
            raise OSError("the file cannot be read as an image. Upload a PNG or JPEG file.") from error
        scale = _LARGEST / max(picture.shape[1:])
        size = [max(1, round(scale * side)) for side in picture.shape[1:]]
        return picture if scale >= 1 else resized(picture[None], size)[0]

    def part(self, picture: Tensor) -> Tensor:
        """The middle of a picture (C, H, W), resized to the size of the network's images."""
        return resized(self._middle(picture).of(picture[None]), self.shape[1:])[0]

    def enlarged(self, hole: Tensor, picture: Tensor) -> Tensor:
        """A hole (H, W) in ``part(picture)`` as one in the picture."""
        box = self._middle(picture)
        hole = Mask(hole).of_size(box.height, box.width).mask
        return box.back(hole[None, None].float(), picture.shape[1:])[0, 0] > 0

    def _middle(self, picture: Tensor) -> Box:
        box = Box.largest(picture.shape[1:], self.shape[1:])
        assert box is not None  # noqa: S101  (without missing pixels there is one)
        return box

    def operator(self, name: str, arguments: str, hole: Tensor, picture: Tensor, seed: int) -> Operator:
        """The operator that a user chooses.

        Args:
            name: a key of ``operators``.
            arguments: its arguments in its text form, such as "4" for "pool"; not for "mask".
            hole: bool (H, W), True where pixels are missing; for "mask".
            picture: the picture (C, H, W).
            seed: the seed of random operators, such as "hole".

        Raises:
            ValueError: for an operator that the network does not have, a hole without pixels, or bad arguments.
        """
        check_choice("operator", name, self.operators)
        if name == "mask":
            if not bool(hole.any()):
                raise ValueError("nothing is missing: paint over a part of the picture first.")
            return Mask(~hole)
        return single_operator(f"{name}:{arguments}").drawn(picture[None], [seed])

    def make_sampler(self, choices: Choices, net: Any = None) -> Sampler:
        """The sampler with the largest number of noise levels that needs at most the chosen number of network calls.

        If settings with this sampler and this number of calls are stored with the network, it has their options. A
        network that draws restores with other settings than it draws with; where the sampler and its calls are those
        recommended for drawing, the sampler is the one recommended for restoring.

        Args:
            choices: the sampler and the number of network calls.
            net: the score that it samples; None is the network.

        Raises:
            ValueError: if the sampler needs more network calls, even with two noise levels.
        """
        net = self.net if net is None else net
        restoring = choices.method is not None and self.draws
        if restoring and (choices.sampler, choices.calls) == (self.sampler, self.calls):
            return recommended_sampler(net, restore=choices.method)
        stored = None if restoring else self._stored.get((choices.sampler, choices.calls))
        if stored is not None:
            return SAMPLERS[stored.sampler](net, **{**stored.options, "restore": choices.method})

        def sampler(levels: int) -> Sampler:
            own: SamplerSettings | None = None if restoring else self.net.sampler_settings
            known = own is not None and own.sampler == choices.sampler != "langevin"  # Langevin reads them itself
            given: dict[str, Any] = own.options if own is not None and known else {}
            return SAMPLERS[choices.sampler](net, **{**given, "levels": levels, "restore": choices.method})

        possible = bisect_right(range(2, choices.calls + 1), choices.calls, key=lambda levels: len(sampler(levels)))
        if not possible:
            raise ValueError(
                f"this sampler needs at least {len(sampler(2))} network calls, got {choices.calls}. Choose more."
            )
        return sampler(possible + 1)

    def draft(self, choices: Choices) -> Choices | None:
        """The choices for a first, quick image with the same seed; None unless the recommended sampler is chosen."""
        if self.quickest is None or (choices.sampler, choices.calls) != (self.sampler, self.calls):
            return None
        sampler, calls = self.quickest
        return replace(choices, sampler=sampler, calls=calls)

    def draw(self, choices: Choices) -> Iterator[Frame]:
        """Draws one image.

        Yields:
            At most about ``FRAMES`` frames of the chain; the last one has the result.

        Raises:
            ValueError: for bad choices, or a network that does not draw images.
        """
        if not self.draws:
            raise ValueError("this network restores pictures and does not draw them. Upload a picture.")
        return self._chain(1, choices, torch.Generator().manual_seed(choices.seed), choices.label, None)

    def restore(self, picture: Tensor, operator: Operator, n: int, choices: Choices) -> Iterator[Frame]:
        """Restores a picture from what an operator leaves of it.

        Args:
            picture: the undamaged picture (C, H, W) in [0, 1]. The network sees only ``operator.measure`` of it. One of
                another size than the network's images is resized, and the results have its size; see ``Photograph``.
            operator: the degradation.
            n: the number of restorations.
            choices: the sampler and its options.

        Yields:
            At most about ``FRAMES`` frames of the chain; the last one has the results.

        Raises:
            ValueError: for bad choices.
        """
        y = operator.measure(picture[None])
        own = tuple(picture.shape) == self.shape
        photo = None if own else Photograph(operator, y, self.shape, crop="center")
        seen = Observation(operator, y) if photo is None else photo.observation
        generator = torch.Generator().manual_seed(choices.seed)
        condition: Any = choices.label
        if not self.draws:
            image = condition_of(seen.operator, seen.y.expand(n, -1, -1, -1), generator)
            condition = with_image(image, choices.label, self.net)
        for frame in self._chain(n, choices, generator, condition, seen):
            last = photo is not None and frame.sigma == 0
            yield replace(frame, denoised=photo.restored(frame.denoised)) if last and photo else frame

    def _chain(
        self, n: int, choices: Choices, generator: torch.Generator, condition: Given, observation: Observation | None
    ) -> Iterator[Frame]:
        watched = _Watched(self.net)
        sampler = self.make_sampler(choices, watched)
        # With one batch, each call has all images.
        states = sampler.iterate(
            n, condition=condition, observation=observation, generator=generator, batch_size=n, progress=False
        )
        return self._frames(states, watched, len(sampler))

    def _frames(self, states: Iterator[tuple[Tensor, float]], watched: _Watched, calls: int) -> Iterator[Frame]:
        """The frames of a chain, from the states that a sampler yields."""
        shown = -1
        for x, sigma in states:
            if self.stopped.is_set():
                return
            due = watched.calls * FRAMES // calls
            if due > shown or sigma == 0:
                shown = due
                contrast = (1 + (4 * sigma) ** 2) ** -0.5  # images have a standard deviation of about 1/4
                noisy, denoised = (0.5 + contrast * (x - 0.5), watched.denoised) if sigma else (x, x)
                yield Frame(watched.calls, calls, sigma, noisy.clamp(0, 1).cpu(), denoised.clamp(0, 1).cpu())


class _Watched:
    """A score that counts its calls and keeps the denoised images of the last one. Its attributes are those of net."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.device = device_of(net)
        self.calls = 0
        self.denoised = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, x: Tensor, sigma: Any, condition: Tensor | None = None) -> Tensor:
        score: Tensor = self.net(x, sigma, condition)
        return self._seen(x, sigma, score)

    def inference_copy(self, *, compile: bool = False) -> _Watched:  # noqa: A002  (torch's word)
        """Returns this object. By this method samplers recognize a network of this package."""
        return self

    def score_and_variance(self, x: Tensor, sigma: Any, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        score, variance = self.net.score_and_variance(x, sigma, condition)
        return self._seen(x, sigma, score), variance

    def _seen(self, x: Tensor, sigma: Any, score: Tensor) -> Tensor:
        self.calls += 1
        self.denoised = (x + sigma**2 * score).detach()
        return score
