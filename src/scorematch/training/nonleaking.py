r"""Augmentation without leaking: images are changed, and the network is told how, so that its samples are not changed.

An image is mirrored, scaled, rotated, stretched and moved, with eight random numbers. The network gets nine values c
that say what was done, and c = 0 is an image without a change. They are added to the embedding of the noise level as
W c, with W = 0 before the first step. A network without this layer therefore draws with c = 0: images that are not
changed. The layer is a part of the network in training only.

==================  ===========================================================  =====================================
change              random numbers, otherwise 0                                  values of c
==================  ===========================================================  =====================================
mirror x            :math:`a_0` = 0 or 1                                         :math:`a_0`
mirror y            :math:`a_1` = 0 or 1                                         :math:`a_1`
scale               :math:`2^{0.2 a_2}`, :math:`a_2 \sim N(0, 1)`                :math:`a_2`
rotate              by :math:`a_3`, uniform in :math:`[-\pi, \pi)`               :math:`\cos a_3 - 1, \sin a_3`
stretch             by :math:`2^{0.2 a_5}` in the direction :math:`a_4`, and     :math:`a_5 \cos a_4, a_5 \sin a_4`
                    by its inverse across, :math:`a_5 \sim N(0, 1)`
move                :math:`a_6 / 8` of the width and :math:`a_7 / 8` of the      :math:`a_6, a_7`
                    height, :math:`a_6, a_7 \sim N(0, 1)`
==================  ===========================================================  =====================================

Half of the images are mirrored in x. Each of the other changes takes place with probability 0.12. Mirrored images have
the bits of the original in another order. The other changes are one affine map with bicubic interpolation; the image is
continued beyond its borders by reflection.

References:
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, App. F.2.
    Jun et al., 2020, Distribution Augmentation for Generative Modeling, ICML.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

VALUES = 9  # the number of values of c
_CHANCE = 0.12  # Karras et al. 2022, for CIFAR-10
_SCALE, _STRETCH, _MOVE = 2**0.2, 2**0.2, 1 / 8


def draw(generator: torch.Generator) -> Tensor:
    """The eight random numbers of one image, (8,)."""
    u = torch.rand(9, generator=generator, device="cpu")
    z = torch.randn(4, generator=generator, device="cpu")
    mirrored = (u[:2] < 0.5).float()
    angles = math.pi * (2 * u[2:4] - 1)
    y, scale, rotate, stretch, move = u[4:] < _CHANCE
    a = torch.stack([mirrored[0], mirrored[1], z[0], angles[0], angles[1], z[1], z[2], z[3]])
    return torch.where(torch.stack([torch.ones_like(y), y, scale, rotate, stretch, stretch, move, move]), a, 0.0)


def told(a: Tensor) -> Tensor:
    """What the network is told of random numbers (n, 8): c (n, 9)."""
    x, y, scale, rotation, direction, stretch, right, down = a.unbind(1)
    turned = rotation.cos() - 1, rotation.sin()
    stretched = stretch * direction.cos(), stretch * direction.sin()
    return torch.stack([x, y, scale, *turned, *stretched, right, down], 1)


def changed(x: Tensor, a: Tensor) -> Tensor:
    """Images (n, C, H, W), floating point, changed with random numbers (n, 8)."""
    for axis, mirrored in ((3, a[:, 0]), (2, a[:, 1])):
        x = torch.where(mirrored.view(-1, 1, 1, 1) > 0, x.flip(axis), x)
    rows = a[:, 2:].any(1).nonzero().flatten()
    return x if not len(rows) else x.index_copy(0, rows, _mapped(x[rows], a[rows].double()))


def _mapped(x: Tensor, a: Tensor) -> Tensor:
    """Images after the affine map of the numbers :math:`a_2, ..., a_7`."""
    half = a.new_tensor([x.shape[3] / 2, x.shape[2] / 2])  # of the width and the height, in pixels
    scale = torch.eye(2).to(a) * _SCALE ** a[:, 2].view(-1, 1, 1)
    factors = _STRETCH ** torch.stack([a[:, 5], -a[:, 5]], 1)
    stretch = _rotation(a[:, 4]) @ factors.diag_embed() @ _rotation(-a[:, 4])
    inverse = torch.linalg.inv(stretch @ _rotation(a[:, 3]) @ scale)
    # The value at the pixel p comes from inverse (p - shift). affine_grid measures both in units of ``half``.
    shift = 2 * _MOVE * half * a[:, 6:]
    offset = -(inverse @ shift[:, :, None]) / half[:, None]
    theta = torch.cat([inverse * half / half[:, None], offset], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False).to(x)
    made = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    low, high = x.flatten(1).aminmax(dim=1)  # which bicubic interpolation exceeds
    return made.clamp(low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1))


def _rotation(angle: Tensor) -> Tensor:
    """Counterclockwise rotations (n, 2, 2) of (right, down)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
