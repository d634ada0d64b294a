"""Evaluation of generated images: features, metrics of features, and statistics of data sets in files.

``evaluate`` measures a network or a folder of images, ``evaluate_restoration`` restored images, and ``tune`` sampler
settings. They are built from the parts below.

An ``Extractor`` computes features of images. Each metric is a function of features, and a class of the same name that
accepts features in batches and combines the processes of ``torch.distributed``::

    extractor = as_extractor("inception")                     # needs the extra evaluate
    reference = statistics_of("faces/", extractor)
    distance = FrechetDistance(reference)
    for images in batches:                                    # (N, C, H, W), in [0, 1] or uint8
        distance.update(extractor(images))
    print(distance.compute())

``data_likelihood`` measures the bits per dimension of a data set, and ``memorization_of`` how close samples are to the
training images. Diagnostics show the errors of a network or a sampler. ``level_losses`` measures the loss at each noise
level. ``score_error``, ``sampler_distances`` and ``posterior_calibration`` use distributions with exact scores, from
``scorematch.evaluation.exact``.
"""

from scorematch.evaluation.accumulate import Moments
from scorematch.evaluation.calibration import Calibration, calibration_chart, calibration_table, posterior_calibration
from scorematch.evaluation.diagnostics import LevelLoss, ScoreError, level_chart, level_losses, level_table, score_error
from scorematch.evaluation.evaluate import Evaluation, evaluate, gaussian_images
from scorematch.evaluation.features import (
    EXTRACTORS,
    Extracted,
    Extractor,
    as_extractor,
    dinov2,
    efficientnet_lite0,
    inception,
    pixels,
)
from scorematch.evaluation.figures import MEASURES, Evaluator, Figure, image_figures, values
from scorematch.evaluation.likelihood import DataLikelihood, data_likelihood
from scorematch.evaluation.memorization import Memorization, Nearest, Neighbors, memorization_of
from scorematch.evaluation.metrics import (
    METRICS,
    Accumulator,
    DensityCoverage,
    Estimate,
    Extrapolation,
    FrechetDistance,
    FrechetExtrapolation,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    density_coverage,
    frechet_distance,
    frechet_estimate,
    frechet_extrapolation,
    inception_score,
    kernel_distance,
    precision_recall,
)
from scorematch.evaluation.restored_images import evaluate_restoration
from scorematch.evaluation.sampler_distance import SamplerDistances, sampler_distances, sampler_variants
from scorematch.evaluation.statistics import Statistics, cache_folder, content_key, statistics_of
from scorematch.evaluation.tune import Row, Tuning, compare, settings_table, tune

__all__ = [
    "EXTRACTORS",
    "MEASURES",
    "METRICS",
    "Accumulator",
    "Calibration",
    "DataLikelihood",
    "DensityCoverage",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Extracted",
    "Extractor",
    "Extrapolation",
    "Figure",
    "FrechetDistance",
    "FrechetExtrapolation",
    "InceptionScore",
    "KernelDistance",
    "LevelLoss",
    "Memorization",
    "Moments",
    "Nearest",
    "Neighbors",
    "PrecisionRecall",
    "Row",
    "SamplerDistances",
    "ScoreError",
    "Statistics",
    "Tuning",
    "as_extractor",
    "cache_folder",
    "calibration_chart",
    "calibration_table",
    "compare",
    "content_key",
    "data_likelihood",
    "density_coverage",
    "dinov2",
    "efficientnet_lite0",
    "evaluate",
    "evaluate_restoration",
    "frechet_distance",
    "frechet_estimate",
    "frechet_extrapolation",
    "gaussian_images",
    "image_figures",
    "inception",
    "inception_score",
    "kernel_distance",
    "level_chart",
    "level_losses",
    "level_table",
    "memorization_of",
    "pixels",
    "posterior_calibration",
    "precision_recall",
    "sampler_distances",
    "sampler_variants",
    "score_error",
    "settings_table",
    "statistics_of",
    "tune",
    "values",
]
