r"""The quality of restored images: Palette's metrics, for networks trained for restoration and for any other score.

Clean images x are degraded to measurements :math:`y = A x + \sigma_y n`, and each is restored K times. The figures
are, under the name "restoration",

===================  ==================================================================================================
rmse                 the root mean square difference between a restored image and the original
rmse of the mean     that of the mean of the K restorations, for K above 1
psnr                 the mean of :math:`-10 \log_{10}` of the mean square difference of an image, in dB, at most 100. A
                     restoration that is sampled is sharper and has a lower PSNR than the mean of all solutions: the
                     figure serves for orientation only
diversity            the root mean square difference between two restorations of the same measurement
consistency          the root mean square of the observed values of :math:`y - A \hat x`. It should be 0, or the noise
                     level of y
===================  ==================================================================================================

with several restorations of each image also the calibration (in brackets: the value of exact draws from the posterior),

=======================  ==============================================================================================
ratio                    the root mean square difference of two restorations over that of a restoration and the
                         original (1). Below 1 the restorations are too alike, or biased
coverage of pixels       the share of pixels in which the original is between the i-th smallest and the i-th largest
                         restoration (the nominal share 1 - 2i / (K + 1) nearest to 90 %, which is in the name).
                         Images are rounded to 8 bits, and pixels in which all are equal are left out
coverage of projections  the same for projections on random directions
rank of pixels           the mean rank of the original among the restorations, from 0 to 1 (0.5); another value shows a
                         bias in the brightness
rank p value             of the test that the ranks of the projections are uniform, with Bonferroni's correction. It
                         needs at least 5 (K + 1) images
=======================  ==============================================================================================

and for each extractor, in addition to the metrics of ``METRICS`` on one restoration of each image,

===================  ==================================================================================================
perceptual           the mean Euclidean distance between the features of a restoration and of the original (Palette's
                     PD)
feature diversity    the mean Euclidean distance between the features of two restorations of the same measurement
accuracy             the share of restorations whose most probable class is the label (Palette's CA)
agreement            the share of restorations whose most probable class is that of the original
===================  ==================================================================================================

Palette computes FID and IS with Inception-v3, PD with Inception-v1, and CA with a ResNet-50; here all come from the
same extractor. Every error is the standard error over the images; the values of the K restorations of an image are
averaged first.

The calibration depends on the method and on the prior, which is the network. ``truth="network"`` restores draws of the
network itself instead of images of the data: then the prior is right, and what remains is the error of the method.

The random numbers of an image depend on the seed and on its pixels only, except that those of equal images differ.

References:
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826, Sec. 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_choice, check_count, check_integer
from scorematch.core.conditions import takes_image, with_image
from scorematch.core.files import delete_unfinished
from scorematch.core.processes import gathered, local_device, process_group, this_process
from scorematch.core.provenance import identity, versions
from scorematch.core.randomness import as_generator, seed_of, standard_normal
from scorematch.core.records import as_stored
from scorematch.core.scores import Score, attribute, device_of
from scorematch.data.images import ImageData
from scorematch.data.pictures import Crop, is_picture, save_grid
from scorematch.evaluation.estimate import Estimate, Figures, mean_of, ratio_of, root_of
from scorematch.evaluation.evaluate import Evaluation, checked_folder
from scorematch.evaluation.evaluator import Evaluator, OneOrMore
from scorematch.evaluation.features import Extracted
from scorematch.evaluation.per_image import ImageBatch, choose, values_per_image
from scorematch.evaluation.ranks import FEWEST_PER_RANK, directions, inside, nearest, nominal, p_value, ranks_among
from scorematch.evaluation.reference import open_for
from scorematch.evaluation.subject import SamplerChoice, name_of, sampler_for
from scorematch.restoration.moments import image_of
from scorematch.restoration.observation import Observation, check_sigma
from scorematch.restoration.operator import Operator
from scorematch.restoration.operators import as_operator
from scorematch.restoration.palette import condition_of
from scorematch.sampling import Sampler, recommended_sampler
from scorematch.sampling.bulk import description_of, prepared

DEFAULT_N_RESTORED = 500  # images, if the number is not given
RESTORATION = "restoration"
RESTORED, DEGRADED, ORIGINAL = "restored", "degraded", "original"
_LEAST_ERROR = 1e-10  # the mean square error of 100 dB
_ON_THE_PICTURE = 8
_DIRECTIONS = 8  # of the random projections
_RANK = "rank"  # the source of the ranks of the projections, which become one figure

Truth = Literal["data", "network"]


def evaluate_restoration(
    what: Any,
    data: Any,
    operator: str | Operator,
    *,
    n: int | None = None,
    draws: int = 2,
    sigma: float = 0.0,
    truth: Truth = "data",
    features: OneOrMore = "inception",
    metrics: Sequence[str] | None = None,
    sampler: SamplerChoice = None,
    labels: bool = False,
    reference: Any = None,
    seed: int = 0,
    batch_size: int = 64,
    out: str | os.PathLike[str] | None = None,
    crop: Crop = "center",
    name: str | None = None,
    cache: bool | str | os.PathLike[str] = True,
    device: torch.device | str | None = None,
    strict: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Degrades images, restores them, and measures the result.

    The method ``restore`` of the sampler makes the restorations agree with the measurement, as in the command
    ``scorematch restore``. A network that was trained for restoration also gets the degraded image as its condition.
    The paper does both for masks and crops, and uses the condition alone for the other tasks; with both, restorations
    are closer to the originals (docs/palette.md).

    Under ``torchrun`` or ``accelerate launch`` every process must call it; each restores a share of the images, and all
    return the same result.

    Args:
        what: a network or any other score; the name or the folder of a network; or a ``Sampler``.
        data: the clean images, as for ``evaluate``. For a network with a sample shape they are cropped and resized as
            in training.
        operator: what degrades the images: an operator for one image, or its text, such as "gray", "pool:4", or "hole"
            for a random hole in each image, as in Palette's training; see ``scorematch.restoration.as_operator``.
        n: the number of images, a random subset of the data; None is 500, or all if there are fewer.
        draws: K, the number of restorations of each image, at least 1.
        sigma: the standard deviation of the noise in the measurements, in units of images in [0, 1].
        truth: what is degraded and restored: "data", or "network", one draw of the network for each image of the data,
            with its recommended sampler.
        features: the extractor, or several, as for ``evaluate``.
        metrics: names from ``METRICS``, as for ``evaluate``.
        sampler: the sampler, as for ``evaluate``; None is ``recommended_sampler(net, restore="auto")``, as for the
            command ``scorematch restore``. To choose the method, pass for example
            ``lambda net: AnnealedLangevinSampler(net, restore="guide-jacobian")``.
        labels: whether to read class labels, for the accuracy. The extractor must have one logit for each class.
        reference: the real images for the Fréchet distance and similar metrics, as for ``evaluate``; None is ``data``.
        seed: the seed of masks, noise and restorations.
        batch_size: the number of images that go through the network at once.
        out: the folder to write to: evaluation.json, evaluation.md and restored.png with the degraded images, their
            restorations and the originals. None writes nothing. An interrupted call starts again from the beginning.

        Rarely needed:

        crop: how the images are cropped before they are resized, as for ``open_images``.
        name: the name of the network for the title; None derives it from ``what``.
        cache: the folder for the statistics of the reference, as for ``evaluate``.
        device: the device of extractors that are given by name, and of networks that are loaded.
        strict: whether a damaged image is an error; otherwise it is left out, and its name is in ``skipped``.
        progress: whether to show progress bars.

    Returns:
        The figures of the sets "restored", "degraded" and "original".

    Raises:
        ImportError, OSError, TypeError, ValueError: if an input does not exist, is damaged or does not fit the others,
            or a file in ``out`` that is not of an evaluation would be replaced.
        RuntimeError: if a restored image has NaN or infinite values.
    """
    n, seed = None if n is None else check_integer("n", n), check_integer("seed", seed)
    draws, batch_size, sigma = check_count("draws", draws), check_count("batch_size", batch_size), check_sigma(sigma)
    text, operator = str(operator), single_operator(operator)
    folder = checked_folder(out, "restored.png", data, reference)
    if sampler is None and not isinstance(what, Sampler):
        sampler = partial(recommended_sampler, restore="auto")
    chosen_sampler = sampler_for(what, sampler, device)
    prior = _prior(chosen_sampler.net, truth, labels)
    device = local_device(device_of(chosen_sampler.net) if device is None else device)
    with process_group(device):
        shape = attribute(chosen_sampler.net, "sample_shape")
        shape = None if shape is None or len(shape) != 3 else shape
        images = open_for(data, shape, "images", crop=crop, labels=labels, strict=strict, progress=progress)
        if not is_picture(images.shape):
            raise ValueError(f"data must be images (C, H, W) with 1 or 3 channels, got {tuple(images.shape)}.")
        if labels and images.classes is None:
            raise ValueError("labels=True needs data with labels, but the ImageData was opened without them.")
        chosen = choose(len(images), min(DEFAULT_N_RESTORED, len(images)) if n is None else n, seed)
        evaluator = Evaluator(
            images if reference is None else reference,
            features=features,
            metrics=metrics,
            shape=images.shape,
            crop=crop,
            cache=cache,
            device=device,
            strict=strict,
            progress=progress,
        )
        left_out = evaluator.check(len(chosen), images.shape)
        classes = images.classes if labels else None
        run = Restoring(chosen_sampler, evaluator, operator, draws, sigma, seed, classes, prior)
        figures = run.measure(images, chosen, batch_size, progress)
        settings = {
            "images": {"n": len(chosen), "content": images.content, "labels": labels},
            "operator": identified(operator),
            "sigma": sigma,
            "draws": draws,
            "truth": truth,
            "seed": seed,
            "batch_size": batch_size,
            **description_of(chosen_sampler),
            **evaluator.settings(),
        }
        result = Evaluation(
            name=f"{name_of(what) if name is None else name}, {text}",
            settings=as_stored(settings),
            versions=versions(device),
            sizes={column: len(chosen) for column in figures},
            figures=figures,
            left_out=left_out,
            sampler=str(chosen_sampler),
            skipped=images.skipped + (() if reference is None or evaluator.data is None else evaluator.data.skipped),
        )
        if folder is not None and this_process().rank == 0:
            result.save(folder)
            save_grid(torch.cat(run.shown), folder / "restored.png", columns=draws + 2)
            delete_unfinished(folder)
    return result


def _prior(net: Score, truth: Truth, labels: bool) -> Sampler | None:
    """The sampler whose draws are restored; None for images of the data."""
    check_choice("truth", truth, get_args(Truth))
    if truth == "data":
        return None
    if labels:
        raise ValueError(f"{argument('labels', True)} is for images of the data: draws of the network have no labels.")
    if takes_image(net):
        raise ValueError(f"{argument('truth', truth)} needs a network that draws images, but this one restores them.")
    return prepared(recommended_sampler(net))


def single_operator(operator: str | Operator) -> Operator:
    """The operator, which must be for one image."""
    operator = as_operator(operator)
    if len(operator) > 1:
        raise ValueError(f"the operator must be for one image, got one mask for each of {len(operator)} images.")
    return operator


def identified(operator: Operator) -> str:
    """The text of an operator; for one without, such as a mask, its representation and a hash of its content."""
    return operator.text() or f"{operator!r} {identity(operator)}"


# -- The values of each image -----------------------------------------------------------------------------------------


class Restoring:
    """Restores images, and measures the restorations.

    Args:
        sampler: the sampler.
        evaluator: the extractors, the metrics and the reference.
        operator: what degrades the images.
        draws: the number of restorations of each image.
        sigma: the standard deviation of the noise in the measurements.
        seed: the seed of masks, noise and restorations.
        classes: the classes of the images, for the accuracy; None does not measure it.
        prior: a sampler, with one draw of which each image is replaced; None restores the images.

    Attributes:
        shown: the degraded images, restorations and originals of the first batch of this process, for the picture.
    """

    def __init__(
        self,
        sampler: Sampler,
        evaluator: Evaluator,
        operator: Operator,
        draws: int,
        sigma: float,
        seed: int,
        classes: Sequence[str] | None = None,
        prior: Sampler | None = None,
    ) -> None:
        self._sampler, self._conditional = prepared(sampler), takes_image(sampler.net)
        self._evaluator, self._operator, self._prior = evaluator, operator, prior
        self._classes, self._draws, self._sigma, self._seed = classes, draws, sigma, seed
        self._sets = {
            RESTORED: evaluator.collect(),
            DEGRADED: evaluator.collect(),
            ORIGINAL: evaluator.collect([name for name in evaluator.metrics if name == "inception-score"]),
        }
        self._names: list[tuple[str, str, str]] = []  # the set, the source and the name of each value
        self.shown: list[Tensor] = []

    def measure(
        self, images: ImageData, chosen: Tensor, batch_size: int = 64, progress: bool = True
    ) -> dict[str, Figures]:
        """The figures of the sets "restored", "degraded" and "original", over all processes.

        Args:
            images: the clean images.
            chosen: the indices of the images to restore.
            batch_size: the number of images that go through the network at once.
            progress: whether to show a progress bar.
        """
        classes = self._classes
        if classes is not None and not any(
            _classifies(each, classes) for each in self._evaluator.extract(torch.zeros(1, *images.shape, device="cpu"))
        ):
            raise ValueError(
                f"{argument('labels', True)} needs an extractor with one logit for each of the {len(classes)} "
                f"classes of the data. Leave it out, or pass a classifier of these classes as {argument('features')}."
            )
        values = values_per_image(
            self._measured, images.read, chosen, batch_size=batch_size, title="restoring", progress=progress
        )
        result: dict[str, Figures] = {
            column: {RESTORATION: {}, **seen.figures(strict=column == RESTORED)} for column, seen in self._sets.items()
        }
        names = gathered(self._names)[0]  # those of the first batch: other processes may have none
        columns = dict(zip(names, values.unbind(1), strict=True))
        ranks = [columns.pop(key) for key in names if key[1] == _RANK]
        for (column, source, name), each in columns.items():
            figure = mean_of(each)
            result[column][source][name] = root_of(figure) if name in _ROOTS else figure
        if self._draws > 1:
            apart, error = (columns[RESTORED, RESTORATION, name] for name in ("diversity", "rmse"))
            if error.any():
                result[RESTORED][RESTORATION]["ratio"] = root_of(ratio_of(apart, error))
            if len(values) >= FEWEST_PER_RANK * (self._draws + 1):
                uniform = p_value(torch.stack(ranks, 1).long(), self._draws)
                result[RESTORED][RESTORATION]["rank p value"] = Estimate(uniform)
        del result[ORIGINAL][RESTORATION]
        return result

    def _measured(self, batch: ImageBatch) -> Tensor:
        """The values of each image (n, K)."""
        if self._prior is not None:
            batch = batch._replace(x=self._drawn(batch))
        x, operator = batch.x, self._operator.drawn(batch.x, batch.seeds(self._seed, "mask"))
        y = operator.measure(x)
        if self._sigma:
            y = y + self._sigma * standard_normal(y.shape, as_generator(batch.seeds(self._seed, "noise")), y.device)
        restored = [self._restore(operator, y, batch, draw) for draw in range(self._draws)]
        degraded = image_of(operator, y, x.shape[1:]).clamp(0, 1)
        if not self.shown:
            rows = [images[:_ON_THE_PICTURE] for images in (degraded, *restored, x)]
            self.shown = [torch.stack(rows, 1).flatten(0, 1)]
        values = _in_pixels(restored, degraded, x, operator, y)
        if len(restored) > 1:
            values |= _calibration(torch.stack(restored, 1), x, self._seed, batch.seeds(self._seed, "ties"))
        sets = {RESTORED: restored, DEGRADED: [degraded], ORIGINAL: [x]}
        # By set, draw and extractor. The metrics of sets of images are those of the first draws.
        features = {column: [self._evaluator.extract(images) for images in drawn] for column, drawn in sets.items()}
        for column, seen in self._sets.items():
            seen.add(sets[column][0], features[column][0])
        for i, extractor in enumerate(self._evaluator.extractors):
            found = {column: [each[i] for each in drawn] for column, drawn in features.items()}
            labels = batch.labels if _classifies(found[ORIGINAL][0], self._classes) else None
            in_features = _in_features(found, labels)
            values |= {(column, extractor.name, name): each for (column, name), each in in_features.items()}
        self._names = list(values)
        return torch.stack([each.double().cpu() for each in values.values()], 1)

    def _drawn(self, batch: ImageBatch) -> Tensor:
        """One draw of the network for each image of a batch."""
        assert self._prior is not None  # noqa: S101
        return self._prior.sample(
            len(batch.x),
            shape=batch.x.shape[1:],
            generator=[number % 2**32 for number in batch.seeds(self._seed, "truth")],
            batch_size=len(batch.x),
            progress=False,
        ).cpu()

    def _restore(self, operator: Operator, y: Tensor, batch: ImageBatch, draw: int) -> Tensor:
        seeds = batch.seeds(self._seed, "fill", draw)
        condition = with_image(condition_of(operator, y, seeds), None, self._sampler.net) if self._conditional else None
        return self._sampler.sample(
            len(batch.x),
            shape=batch.x.shape[1:],
            condition=condition,
            observation=Observation(operator, y, self._sigma),
            generator=[number % 2**32 for number in batch.seeds(self._seed, "restoration", draw)],
            batch_size=len(batch.x),
            progress=False,
        ).cpu()


# The figures whose value for an image is a mean square; the root is taken after averaging over the images.
_ROOTS = {"rmse", "rmse of the mean", "diversity", "consistency"}


def _in_pixels(
    restored: Sequence[Tensor], degraded: Tensor, x: Tensor, operator: Operator, y: Tensor
) -> dict[tuple[str, str, str], Tensor]:
    """The values of the pixels by set, source and figure."""
    values = {}
    for column, sets in ((RESTORED, restored), (DEGRADED, [degraded])):
        errors = torch.stack([_mean_square(images - x) for images in sets])
        values[column, RESTORATION, "rmse"] = errors.mean(0)
        values[column, RESTORATION, "psnr"] = (-10 * errors.clamp(min=_LEAST_ERROR).log10()).mean(0)
    if len(restored) > 1:
        values[RESTORED, RESTORATION, "rmse of the mean"] = _mean_square(torch.stack(list(restored)).mean(0) - x)
        apart = [_mean_square(a - b) for a, b in combinations(restored, 2)]
        values[RESTORED, RESTORATION, "diversity"] = torch.stack(apart).mean(0)
    mask = operator.mask_of(y)
    mask = torch.ones_like(y) if mask is None else mask.expand_as(y).to(y)
    residuals = [((operator.measure(images) - y) * mask).square().flatten(1).sum(1) for images in restored]
    consistency = torch.stack(residuals).mean(0) / mask.flatten(1).sum(1).clamp(min=1)
    values[RESTORED, RESTORATION, "consistency"] = consistency
    return values


def _calibration(restored: Tensor, x: Tensor, seed: int, seeds: Sequence[int]) -> dict[tuple[str, str, str], Tensor]:
    """The values of the ranks of the originals x (n, ...) among the restorations (n, K, ...)."""
    draws = restored.shape[1]
    i = nearest(draws, 0.9)
    expected = f"nominal {nominal(draws, i):.1%}"
    bits, truth = ((images.flatten(images.ndim - 3) * 255).round() for images in (restored, x))
    pixels = ranks_among(bits, truth, as_generator(seeds))
    differ = (bits != truth[:, None]).any(1)
    count = differ.sum(1).clamp(min=1)
    # An image of which every pixel is known has the values of exact draws.
    covered = torch.where(differ, inside(pixels, draws, i), 0).sum(1) / count
    rank = torch.where(differ, pixels / draws, 0).sum(1) / count
    w = directions(x[0].numel(), _DIRECTIONS, seed)
    along = [images.double().flatten(images.ndim - 3) @ w for images in (restored, x)]
    projections = ranks_among(along[0], along[1], as_generator([seed_of(number, "projections") for number in seeds]))
    values = {
        f"coverage of pixels, {expected}": torch.where(differ.any(1), covered, nominal(draws, i)),
        f"coverage of projections, {expected}": inside(projections, draws, i).double().mean(1),
        "rank of pixels": torch.where(differ.any(1), rank, 0.5),
    }
    ranks = {(RESTORED, _RANK, str(j)): each for j, each in enumerate(projections.unbind(1))}
    return {(RESTORED, RESTORATION, name): each for name, each in values.items()} | ranks


def _classifies(extracted: Extracted, classes: Sequence[str] | None) -> bool:
    """Whether the logits are those of the classes."""
    return classes is not None and extracted.logits is not None and extracted.logits.shape[1] == len(classes)


def _mean_square(values: Tensor) -> Tensor:
    return values.double().square().flatten(1).mean(1)


def _in_features(extracted: Mapping[str, Sequence[Extracted]], labels: Tensor | None) -> dict[tuple[str, str], Tensor]:
    """The values of one extractor by set and figure."""
    (original,) = extracted[ORIGINAL]
    values: dict[tuple[str, str], Tensor] = {}

    def mean(found: Iterable[Tensor]) -> Tensor:
        return torch.stack([each.cpu().double() for each in found]).mean(0)

    for column in (RESTORED, DEGRADED):
        values[column, "perceptual"] = mean(_distance(each, original) for each in extracted[column])
    if len(extracted[RESTORED]) > 1:
        pairs = combinations(extracted[RESTORED], 2)
        values[RESTORED, "feature diversity"] = mean(_distance(a, b) for a, b in pairs)
    if original.logits is not None:
        best = {column: [each.class_logits.argmax(1) for each in found] for column, found in extracted.items()}
        for column in (RESTORED, DEGRADED):
            values[column, "agreement"] = mean(each == best[ORIGINAL][0] for each in best[column])
        if labels is not None:
            for column in (RESTORED, DEGRADED, ORIGINAL):
                values[column, "accuracy"] = mean(each.cpu() == labels for each in best[column])
    return values


def _distance(a: Extracted, b: Extracted) -> Tensor:
    return (a.features - b.features).norm(dim=1)
