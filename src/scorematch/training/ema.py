r"""Averages of the weights over training: EDM2's power function averages, and their reconstruction for any length.

After step t, with weights :math:`\theta_t`, the average is updated as
:math:`\hat\theta \leftarrow \beta_t \hat\theta + (1 - \beta_t)\, \theta_t` with

.. math:: \beta_t = (1 - 1/t)^{\gamma + 1},

so that after T steps the weights of step t have the factor :math:`(t^{\gamma+1} - (t-1)^{\gamma+1}) / T^{\gamma+1}`. At
any time the average covers the same fraction of the steps so far, and the initial weights have no influence. The factor
as a function of t is the profile of the average, and its standard deviation relative to T is the length,

.. math:: \sigma_{rel} = \sqrt{\frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}} .

**Reconstruction.** Each snapshot j of a run is an average at time :math:`t_j` with the known profile
:math:`p_j(t) = (\gamma_j + 1)\, t^{\gamma_j} / t_j^{\gamma_j + 1}` on :math:`[0, t_j]`. An average of another length,
with profile p, is approximated by the linear combination of the snapshots whose profile is nearest to p in the least
squares sense, among those whose coefficients c have the sum 1. With :math:`A_{ij} = \langle p_i, p_j \rangle` and
:math:`b_i = \langle p_i, p \rangle`, they solve the linear system

.. math:: A c + \lambda = b, \qquad \sum_i c_i = 1, \qquad
          \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)}{\gamma_i + \gamma_j + 1}
          \cdot \frac{(t_i / t_j)^{\gamma_j}}{t_j} \quad (t_i \le t_j).

The sum is not constrained in EDM2. With a sum of 0.99, all weights would be too small by 1 %, which is more than they
change near the end of a training: in a trial with 20 snapshots of two lengths, the constraint reduced the error of the
weights by a factor of 3 to 60. Weights that are not trained are reconstructed exactly.

References:
    Karras et al., 2024, Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), arXiv:2312.02696,
    Section 3 and Appendix C.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scorematch.core.arguments import argument
from scorematch.pretrained import load, locate
from scorematch.score import ScoreNet

SNAPSHOTS = "snapshots"  # the subfolder of a run's folder
LONGEST = 0.289  # the length of the plain mean over the run, gamma = 0: the root of 1/12, rounded up

_SHORTEST_DECAY = 0.9  # a value from 0.9 to 1 is the decay of an exponential average, not a length
# The largest relative error of the profile of a reconstructed average without a warning.
_TOLERATED = 0.1


def exponent(length: float) -> float:
    """The exponent gamma of the power function average with a given length, sigma_rel.

    Args:
        length: the length, above 0 and at most ``LONGEST``, 0.289.

    Example:
        >>> round(exponent(0.10), 2)
        6.94
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average must be above 0 and at most {LONGEST:.3f}, got {length!r}.")
    # The definition of the length as a cubic equation for gamma; it has one root that is not negative.
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


class Average:
    """An average of the weights, updated after each step.

    Args:
        parameters: the initial weights, float32 or float64.
        length: the length of a power function average, above 0 and at most ``LONGEST``; or a number from 0.9 to below
            1, the decay per step of an exponential average, as in the published recipes. While ``(1 + t) / (10 + t)``
            is smaller than this decay, it is used instead, as in the code of Song et al. (2021), so that the initial
            weights have little influence.

    Attributes:
        tensors: the averaged weights, in the order of ``parameters``.
    """

    def __init__(self, parameters: Iterable[Tensor], length: float) -> None:
        self.length = check_length(length)
        self.gamma = exponent(length) if length <= LONGEST else None
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @property
    def name(self) -> str:
        """The length or decay as text for file names, such as "0.050"; see ``name_of``."""
        return name_of(self.length)

    def decay(self, step: int) -> float:
        """The factor beta of the old average at a step; the first step is 1."""
        if self.gamma is None:
            return min(self.length, (1 + step) / (10 + step))
        return float((1 - 1 / step) ** (self.gamma + 1))

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Updates the average after a step.

        Args:
            parameters: the weights after the step.
            step: the number of the step, from 1.
        """
        torch._foreach_lerp_(self.tensors, list(parameters), 1 - self.decay(step))


def check_length(length: float) -> float:
    """Returns a length or a decay as a float."""
    if not (0 < length <= LONGEST or _SHORTEST_DECAY <= length < 1):
        raise ValueError(
            f"{argument('ema')} must contain lengths above 0 and at most {LONGEST:.3f}, or decays per step of at least "
            f"{_SHORTEST_DECAY} and below 1, got {length!r}."
        )
    return float(length)


def name_of(length: float) -> str:
    """A length as text for file names, with at least three digits, "0.050" or "0.0125"; a decay as it is, "0.9999"."""
    return np.format_float_positional(length, min_digits=3) if length <= LONGEST else repr(length)


# -- Reconstruction ---------------------------------------------------------------------------------------------------


def reconstruct(
    run: str | os.PathLike[str],
    length: float,
    *,
    images: int | None = None,
    backbone: nn.Module | None = None,
    condition_encoder: nn.Module | None = None,
) -> ScoreNet:
    """Reconstructs the averaged network of any length from the snapshots of a run.

    Args:
        run: the folder that ``train`` wrote.
        length: the length sigma_rel, above 0 and at most 0.289. The reconstruction is most accurate for lengths near
            those of the snapshots.
        images: the number of images seen at which the average ends; None is that of the last snapshot.
        backbone: for a network with a backbone of your own: a module of the same class, into which the weights are
            loaded.
        condition_encoder: the same for a network that was built with one.

    Returns:
        The network in eval mode, on the CPU, in float32.

    Raises:
        FileNotFoundError: if there is no such folder, or the run has no snapshots of power function averages; those
            of a run with exponential averages cannot be used.
        ValueError: if the length is out of range, or ``images`` is below the first or above the last snapshot.

    Warns:
        UserWarning: if the relative error of the reconstructed profile is above 10 %.

    References:
        Karras et al., 2024, arXiv:2312.02696, Algorithm 3.
    """
    gamma = exponent(length)
    folder = Path(run).expanduser() / SNAPSHOTS
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.parent}.")
    found = _snapshots(folder)
    end = found[-1][0] if images is None else images
    used = [(seen, own, path) for seen, own, path in found if seen <= end]
    if not used or end > found[-1][0]:
        raise ValueError(
            f"{argument('images')} must be from {found[0][0]:,} to {found[-1][0]:,}, the snapshots in {folder}, got "
            f"{images!r}."
        )
    shares, missed = combination([(seen, exponent(own)) for seen, own, _ in used], (end, gamma))
    if missed > _TOLERATED:
        warnings.warn(
            f"the {len(used)} snapshots in {folder} give an inaccurate average of length {length:g}: the relative "
            f"error of its profile is {missed:.0%}. Choose a length nearer to those of the snapshots, or save "
            "snapshots more often.",
            stacklevel=2,
        )
    net = ScoreNet.from_pretrained(used[-1][2], backbone=backbone, condition_encoder=condition_encoder)
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in net.backbone.state_dict().items()}
    for share, (_, _, path) in zip(shares, used, strict=True):
        for name, tensor in load(locate(path)).weights.items():
            sums[name].add_(tensor, alpha=share)
    own_values = net.backbone.state_dict()  # integer buffers, such as counters, are not averaged
    net.backbone.load_state_dict(
        {name: total if own_values[name].is_floating_point() else own_values[name] for name, total in sums.items()}
    )
    return net


def combination(averages: Sequence[tuple[float, float]], target: tuple[float, float]) -> tuple[list[float], float]:
    """The linear combination with coefficients of sum 1 whose profile is nearest to that of another average.

    Args:
        averages: (time, gamma) of each average.
        target: (time, gamma) of the wanted average.

    Returns:
        The coefficient of each average, and the norm of the error of the profile, relative to the norm of the profile.
    """
    times, gammas = (np.array(column, dtype=np.float64) for column in zip(*averages, strict=True))
    time, gamma = target
    matrix = _inner(times[:, None], gammas[:, None], times, gammas)
    wanted = np.array(time, dtype=np.float64), np.array(gamma, dtype=np.float64)
    right = _inner(times, gammas, *wanted)
    system = np.pad(matrix, (0, 1), constant_values=1)
    system[-1, -1] = 0
    norms = np.sqrt(np.diag(matrix))  # all profiles are scaled to norm 1, since those of early snapshots are large
    scales = np.append(norms, 1 / norms.min())
    solution = np.linalg.lstsq(system / np.outer(scales, scales), np.append(right, 1) / scales, rcond=1e-12)[0]
    shares = (solution / scales)[:-1]
    whole = float(_inner(*wanted, *wanted))
    missed = whole - 2 * shares @ right + shares @ matrix @ shares
    return shares.tolist(), math.sqrt(max(0.0, float(missed) / whole))


def _inner(t: np.ndarray, gamma: np.ndarray, other: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """The inner products of profiles with times and gammas (t, gamma) and (other, other_gamma), elementwise."""
    earlier, later = np.minimum(t, other), np.maximum(t, other)
    of_later = np.where(t > other, gamma, other_gamma)
    factor = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return np.asarray(factor * (earlier / later) ** of_later / later)


def _snapshots(folder: Path) -> list[tuple[int, float, Path]]:
    """The snapshots in a folder as (images, length, folder of the network), in ascending order."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        name = re.fullmatch(r"(\d+)-(0\.\d+)", path.name)
        if name is not None and int(name[1]) > 0 and 0 < float(name[2]) <= LONGEST:
            found.append((int(name[1]), float(name[2]), path))
    if not found:
        raise FileNotFoundError(
            f"{folder} has no snapshots of power function averages, such as 000100000-0.050. Pass the folder of a run; "
            "it has them after a twentieth of its length, or of the stage since it has grown. Runs with exponential "
            "averages, such as those of ncsnv2-cifar10, have none of them."
        )
    return sorted(found)
