"""Evaluation of generated images: features, metrics of features, and statistics of data sets in files.

``evaluate`` measures a network or a folder of images, ``evaluate_restoration`` restored images, and ``tune`` sampler
settings. They measure the metrics of the table ``METRICS``, which are functions of features::

    extractor = inception()                                   # needs the extra evaluate
    reference = statistics_of("faces/", extractor)
    print(frechet_distance(extractor(images), reference))     # images (N, C, H, W), in [0, 1] or uint8

``data_likelihood`` measures the bits per dimension of a data set, and ``memorization_of`` how close samples are to the
training images. Diagnostics show the errors of a network or a sampler. ``level_losses`` measures the loss at each noise
level. ``score_error``, ``sampler_distances`` and ``posterior_calibration`` use distributions with exact scores, from
``scorematch.evaluation.exact``.
"""

from scorematch.evaluation import exact
from scorematch.evaluation.calibration import posterior_calibration
from scorematch.evaluation.data_likelihood import DataLikelihood, data_likelihood
from scorematch.evaluation.diagnostics import level_losses, score_error
from scorematch.evaluation.distances import energy_distance, maximum_mean_discrepancy, sliced_wasserstein_distance
from scorematch.evaluation.estimate import Estimate, values
from scorematch.evaluation.evaluate import Evaluation, evaluate
from scorematch.evaluation.evaluator import Evaluator, image_figures
from scorematch.evaluation.features import EXTRACTORS, Extractor, dinov2, efficientnet_lite0, inception, pixels
from scorematch.evaluation.few_calls import settings_learned, settings_of_paths, settings_with_few_calls
from scorematch.evaluation.frechet import frechet_distance
from scorematch.evaluation.memorization import Memorization, memorization_of
from scorematch.evaluation.metrics import (
    METRICS,
    Metric,
    class_shares,
    density_coverage,
    inception_score,
    kernel_distance,
    precision_recall,
)
from scorematch.evaluation.reference import gaussian_images
from scorematch.evaluation.restored_images import evaluate_restoration
from scorematch.evaluation.sampler_distance import sampler_distances
from scorematch.evaluation.spectrum import power_spectrum, spectrum_error, values_distance
from scorematch.evaluation.statistics import Statistics, statistics_of
from scorematch.evaluation.tune import Tuning, settings_table, tune
from scorematch.evaluation.two_sample import classifier_two_sample_test

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "DataLikelihood",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Extractor",
    "Memorization",
    "Metric",
    "Statistics",
    "Tuning",
    "class_shares",
    "classifier_two_sample_test",
    "data_likelihood",
    "density_coverage",
    "dinov2",
    "efficientnet_lite0",
    "energy_distance",
    "evaluate",
    "evaluate_restoration",
    "exact",
    "frechet_distance",
    "gaussian_images",
    "image_figures",
    "inception",
    "inception_score",
    "kernel_distance",
    "level_losses",
    "maximum_mean_discrepancy",
    "memorization_of",
    "pixels",
    "posterior_calibration",
    "power_spectrum",
    "precision_recall",
    "sampler_distances",
    "score_error",
    "settings_learned",
    "settings_of_paths",
    "settings_table",
    "settings_with_few_calls",
    "sliced_wasserstein_distance",
    "spectrum_error",
    "statistics_of",
    "tune",
    "values",
    "values_distance",
]
