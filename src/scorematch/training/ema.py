r"""Averages of the weights over training: power functions of EDM2, and averages of any length after the fact.

After step t the average moves by :math:`\hat\theta \leftarrow \beta_t \hat\theta + (1 - \beta_t)\, \theta_t` with

.. math:: \beta_t = (1 - 1/t)^{\gamma + 1},

so that after T steps the weights of step t have the share :math:`(t^{\gamma+1} - (t-1)^{\gamma+1}) / T^{\gamma+1}`: the
average covers the same part of the run at any time, and forgets the start. Its length is the standard deviation of that
profile relative to T,

.. math:: \sigma_{rel} = \sqrt{\frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}} .

**After the fact.** Each snapshot j of a run is an average with a known profile
:math:`p_j(t) = (\gamma_j + 1)\, t^{\gamma_j} / t_j^{\gamma_j + 1}` on :math:`[0, t_j]`. The average of any other length
is approximated by the combination of the snapshots whose profile is nearest to the profile p wanted. The least squares
problem has the matrix :math:`A_{ij} = \langle p_i, p_j \rangle` and the right side
:math:`b_i = \langle p_i, p \rangle`, with

.. math:: \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)}{\gamma_i + \gamma_j + 1}
          \cdot \frac{(t_i / t_j)^{\gamma_j}}{t_j} \qquad (t_i \le t_j).

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

from scorematch import pretrained
from scorematch.score import ScoreNet

SNAPSHOTS = "snapshots"  # the folder in the folder of a run
LONGEST = 1 / math.sqrt(12)  # the length of the mean over the whole run, gamma = 0

_SHORTEST_DECAY = 0.9  # a value from here to 1 is the decay of an exponential average
# Of the profile that was asked for, how much the snapshots may miss without a warning.
_TOLERATED = 0.1


def exponent(length: float) -> float:
    """The gamma of an average of a length, sigma_rel.

    Args:
        length: above 0 and at most ``LONGEST``, 0.289.

    Raises:
        ValueError: for another length.

    Example:
        >>> round(exponent(0.10), 2)
        6.94
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average must be above 0 and at most {LONGEST:.3f}, got {length!r}.")
    # The definition of the length, solved for gamma; this root is the one that is not negative.
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


class Average:
    """An average of the weights, moved along after each step.

    Args:
        parameters: the weights (float32 or float64) at the start.
        length: of a power function, at most ``LONGEST``; or a number from 0.9 to 1, the decay per step of an
            exponential average. The latter is that of the published recipes: its decay begins at
            ``(1 + t) / (10 + t)``, as in the code of Song et al. (2021), so that it forgets the start.

    Attributes:
        tensors: the averaged weights, in the order of ``parameters``.

    Raises:
        ValueError: for another length.
    """

    def __init__(self, parameters: Iterable[Tensor], length: float) -> None:
        self.length = check_length(length)
        self.gamma = exponent(length) if length <= LONGEST else None
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @property
    def name(self) -> str:
        """The length as part of the name of a file, such as "0.050"."""
        return name_of(self.length)

    def decay(self, step: int) -> float:
        """The beta of step t, counted from 1."""
        if self.gamma is None:
            return min(self.length, (1 + step) / (10 + step))
        return float((1 - 1 / step) ** (self.gamma + 1))

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Takes in the weights after a step, counted from 1."""
        torch._foreach_lerp_(self.tensors, list(parameters), 1 - self.decay(step))


def check_length(length: float) -> float:
    """A length or a decay, checked.

    Raises:
        ValueError: for any other number.
    """
    if not (0 < length <= LONGEST or _SHORTEST_DECAY <= length < 1):
        raise ValueError(
            f"ema must hold lengths above 0 and at most {LONGEST:.3f}, or decays per step from {_SHORTEST_DECAY} to 1, "
            f"got {length!r}."
        )
    return float(length)


def name_of(length: float) -> str:
    """A length as part of the name of a file: "0.050"; of a decay all digits, "0.9999"."""
    return f"{length:.3f}" if length <= LONGEST else repr(length)


# -- After the fact ---------------------------------------------------------------------------------------------------


def reconstruct(
    run: str | os.PathLike[str], length: float, *, images: int | None = None, backbone: nn.Module | None = None
) -> ScoreNet:
    """The averaged network of any length, from the snapshots of a run.

    Args:
        run: the folder that ``train`` wrote.
        length: sigma_rel, above 0 and at most 0.289. Lengths near those that the run kept are found most exactly.
        images: the number of images that the run had seen; None is the last snapshot.
        backbone: for a network of your own class, an instance of it, which receives the weights.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        FileNotFoundError: if the run has no snapshots of power-function averages.
        ValueError: for another length, or a number of images outside the snapshots.

    Warns:
        UserWarning: if the snapshots do not determine an average of that length.

    References:
        Karras et al., 2024, arXiv:2312.02696, Algorithm 3.
    """
    gamma = exponent(length)
    folder = Path(run) / SNAPSHOTS
    found = _snapshots(folder)
    end = found[-1][0] if images is None else images
    used = [(seen, own, path) for seen, own, path in found if seen <= end]
    if not used or end > found[-1][0]:
        raise ValueError(
            f"the snapshots in {folder} are of {found[0][0]:,} to {found[-1][0]:,} images, got images={images!r}."
        )
    shares, missed = combination([(seen, exponent(own)) for seen, own, _ in used], (end, gamma))
    if missed > _TOLERATED:
        warnings.warn(
            f"the {len(used)} snapshots in {folder} determine an average of length {length:g} badly: {missed:.0%} of "
            "its profile is missed. Take a length nearer to those of the snapshots, or save snapshots more often.",
            stacklevel=2,
        )
    net = ScoreNet.from_pretrained(used[-1][2], backbone=backbone)
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in net.backbone.state_dict().items()}
    for share, (_, _, path) in zip(shares, used, strict=True):
        for name, tensor in pretrained.load(path).weights.items():
            sums[name].add_(tensor, alpha=share)
    own_values = net.backbone.state_dict()  # integers, such as counts, are not averaged
    net.backbone.load_state_dict(
        {name: total if own_values[name].is_floating_point() else own_values[name] for name, total in sums.items()}
    )
    return net


def combination(averages: Sequence[tuple[float, float]], target: tuple[float, float]) -> tuple[list[float], float]:
    """The combination of averages whose profile is nearest to that of another.

    Args:
        averages: the time and the gamma of each.
        target: the time and the gamma of the average that is wanted.

    Returns:
        The factor of each average, and the relative error of the profile, its norm being 1.
    """
    times, gammas = (np.array(column, dtype=np.float64) for column in zip(*averages, strict=True))
    time, gamma = target
    matrix = _inner(times[:, None], gammas[:, None], times, gammas)
    wanted = np.array(time, dtype=np.float64), np.array(gamma, dtype=np.float64)
    right = _inner(times, gammas, *wanted)
    norms = np.sqrt(np.diag(matrix))  # early snapshots have high profiles: all are scaled to norm 1
    shares = np.linalg.lstsq(matrix / np.outer(norms, norms), right / norms, rcond=1e-12)[0] / norms
    whole = float(_inner(*wanted, *wanted))
    missed = whole - 2 * shares @ right + shares @ matrix @ shares
    return shares.tolist(), math.sqrt(max(0.0, float(missed) / whole))


def _inner(t: np.ndarray, gamma: np.ndarray, other: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """The inner products of two profiles each."""
    earlier, later = np.minimum(t, other), np.maximum(t, other)
    of_later = np.where(t > other, gamma, other_gamma)
    factor = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return np.asarray(factor * (earlier / later) ** of_later / later)


def _snapshots(folder: Path) -> list[tuple[int, float, Path]]:
    """The snapshots of a folder, in the order of time: images, length, and the folder of the network."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        name = re.fullmatch(r"(\d+)-(0\.\d+)", path.name)
        if name is not None and int(name[1]) > 0 and 0 < float(name[2]) <= LONGEST:
            found.append((int(name[1]), float(name[2]), path))
    if not found:
        raise FileNotFoundError(f"{folder} has no snapshots of power-function averages, such as 000100000-0.050.")
    return sorted(found)
