"""Points in the plane: a network of fully connected layers, trained on points of a spiral.

    python examples/integrations/points.py

It prints the mean and the standard deviation of the samples beside those of the data, and their distance from the
spiral.
"""

import torch
from torch import Tensor, nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss


class Backbone(nn.Module):
    """Points (N, 2), and c_noise (N,), a function of the noise level -> vectors (N, 2)."""

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), *hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Returns a tensor of the shape of x."""
        return self.layers(torch.cat([x, c_noise[:, None]], dim=1))


def spiral(n: int) -> Tensor:
    """Draws points (n, 2) of a spiral of one and a half turns."""
    angle = 3 * torch.pi * torch.rand(n).sqrt()
    return torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / 3


torch.manual_seed(0)
data = spiral(2000)
net = ScoreNet(
    Backbone(),
    NoiseSchedule.from_data(data, sigma_min=0.03),
    sample_shape=(2,),
    precondition_options={"sigma_data": data.std().item()},  # of "karras", the default
)
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
for _ in range(1500):
    dsm_loss(net, spiral(256)).backward()
    optimizer.step()
    optimizer.zero_grad()
    decay.step()

samples = AnnealedLangevinSampler(net).sample(2000, generator=0, progress=False)
print(f"mean {samples.mean(0).tolist()}, of the data {data.mean(0).tolist()}")
print(f"standard deviation {samples.std(0).tolist()}, of the data {data.std(0).tolist()}")
distance = torch.cdist(samples, spiral(20_000)).amin(1)
print(f"nine of ten samples are within {distance.quantile(0.9):.2f} of the spiral")
