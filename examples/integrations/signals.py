"""One-dimensional signals: a convolutional network for data (N, C, L).

    python examples/integrations/signals.py

It prints the correlation of values at several distances, in the samples and in the data.
"""

import torch
from torch import Tensor, nn

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.sampling import ODESampler


class Backbone(nn.Module):
    """Periodic convolutions of growing dilation; c_noise (N,), a function of the noise level, scales the features."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 5, padding=2, padding_mode="circular")
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * d, dilation=d, padding_mode="circular") for d in (1, 2, 4)
        )
        self.last = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Returns a tensor of the shape of x (N, 1, L)."""
        x = self.first(x)
        for layer, scale in zip(self.layers, self.level(c_noise[:, None]).chunk(3, dim=1), strict=True):
            x = x + scale[:, :, None] * nn.functional.silu(layer(x))
        return self.last(x)


# Periodic random signals of unit variance, whose values at a distance k have the correlation exp(-(k / 4)^2).
distance = torch.arange(64).minimum(64 - torch.arange(64))
correlation = torch.exp(-((distance / 4) ** 2))
amplitude = torch.fft.rfft(correlation).real.clamp(min=0).sqrt()


def signals(n: int) -> Tensor:
    """Draws signals (n, 1, 64)."""
    return torch.fft.irfft(amplitude * torch.fft.rfft(torch.randn(n, 1, 64)))


torch.manual_seed(0)
schedule, options = NoiseSchedule.geometric(10, 0.02, levels=100), {"sigma_data": 1.0}  # the data's deviation
net = ScoreNet(Backbone(), schedule, sample_shape=(1, 64), precondition_options=options)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
for _ in range(400):
    dsm_loss(net, signals(64)).backward()
    optimizer.step()
    optimizer.zero_grad()
    decay.step()

samples = ODESampler(net.eval(), levels=18).sample(500, generator=0, progress=False)
found = torch.stack([(samples * samples.roll(k, -1)).mean() for k in range(9)])
for k in (0, 2, 4, 6, 8):
    print(f"correlation at the distance {k}: {found[k]:.3f} of the samples, {correlation[k]:.3f} of the data")
