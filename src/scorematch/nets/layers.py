r"""Instance normalization++, the one layer that the NCSN family has to itself.

Instance normalization removes each channel's mean, and with it every difference in brightness or color between
channels. Instance normalization++ puts the means back in standardized form. With :math:`\mu_c, \sigma_c` the spatial
mean and standard deviation of channel c of one image, m and v the mean and variance of :math:`\mu` over the channels,

.. math:: \gamma_c \Bigl( \frac{x_c - \mu_c}{\sigma_c} + \alpha_c \frac{\mu_c - m}{\sqrt{v}} \Bigr) + \beta_c.

The form is that of the published weights: alpha stands inside gamma, v is the unbiased variance, and both variances
carry 1e-5. (The paper writes alpha outside gamma; weights trained on one form do not work in the other.) Everything is
computed within one image, so a network of these layers treats the images of a batch independently.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. A.
    Dumoulin et al., 2017, A Learned Representation for Artistic Style, arXiv:1610.07629 (the conditional form).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPS = 1e-5


def _instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The formula above for x (N, C, H, W) and parameters of shape (C,) or (N, C)."""
    # Half precision has too few digits for sums over thousands of pixels: statistics are accumulated in float32.
    stats = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((2, 3), dtype=stats)  # (N, C)
    # The two-pass variance with its correction (Chan, Golub & LeVeque 1983). A constant channel is multiplied by
    # 1/sqrt(1e-5) below, rounding included; the mean of what is left takes the rounding of the first mean away.
    x = x - mean.to(x.dtype)[..., None, None]
    rest = x.mean((2, 3), dtype=stats)
    var = x.square().mean((2, 3), dtype=stats) - rest.square()
    mean = mean + rest
    v, m = torch.var_mean(mean, dim=1, keepdim=True)  # (N, 1)
    scale = gamma * torch.rsqrt(var + _EPS)
    shift = gamma * alpha * (mean - m) * torch.rsqrt(v + _EPS) + beta - scale * rest
    return torch.addcmul(shift.to(x.dtype)[..., None, None], x, scale.to(x.dtype)[..., None, None])


class InstanceNormPlus(nn.Module):
    """Instance normalization++ with one set of parameters, (N, C, H, W) -> the same shape.

    The second argument of ``forward`` is ignored; it is there so that this layer and the conditional one are called
    alike.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:  # noqa: D102
        return _instance_norm_plus(x, self.gamma, self.alpha, self.beta)


class ConditionalInstanceNormPlus(nn.Module):
    """Instance normalization++ whose parameters depend on the noise level, (N, C, H, W) -> the same shape.

    One table holds a row [gamma | alpha | beta] for each of the ladder's levels. ``position`` is the index of the
    level, () or (N,), and may be fractional: between two levels the rows are interpolated linearly.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(levels, 3 * channels)
        nn.init.normal_(self.embed.weight[:, : 2 * channels].detach(), 1, 0.02)
        nn.init.zeros_(self.embed.weight[:, 2 * channels :].detach())

    def forward(self, x: Tensor, position: Tensor) -> Tensor:  # noqa: D102
        table = self.embed.weight
        lower = position.floor().long().clamp(0, len(table) - 1)
        upper = (lower + 1).clamp(max=len(table) - 1)
        fraction = (position - lower).to(table.dtype)[..., None]
        gamma, alpha, beta = torch.lerp(table[lower], table[upper], fraction).chunk(3, dim=-1)
        return _instance_norm_plus(x, gamma, alpha, beta)
