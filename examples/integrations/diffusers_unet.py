"""A U-Net of diffusers, trained with the loss of this package and sampled with its samplers.

    pip install diffusers
    python examples/integrations/diffusers_unet.py

It prints how the loss falls, and the difference between the score of the U-Net of diffusers and that of the same
network in this package.
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from disks import disks
from torch import Tensor, nn

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.sampling import ODESampler


class Backbone(nn.Module):
    """A model of diffusers, called as ``backbone(x, c_noise)``; here c_noise is the time step."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Returns the predicted noise."""
        return self.unet(x, c_noise).sample


torch.manual_seed(0)
images = disks(512)
blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
unet = UNet2DModel(16, 1, 1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, **blocks)
scheduler = DDPMScheduler()  # 1000 time steps, betas from 1e-4 to 0.02; the U-Net predicts the noise
schedule = NoiseSchedule.from_betas(scheduler.betas)
net = ScoreNet(Backbone(unet), schedule, precondition="ddpm", sample_shape=(1, 16, 16))

optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
losses = []
for _ in range(128):
    loss = dsm_loss(net, images[torch.randint(len(images), (32,))])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {sum(losses[:16]) / 16:.1f} in the first eighth, {sum(losses[112:]) / 16:.1f} in the last")

unet.eval()
samples = ODESampler(net, levels=10).sample(4, generator=0, progress=False)
print(f"{len(samples)} samples with values from {samples.min():.1f} to {samples.max():.1f}")

# A UNet2DModel also becomes a network of this package, which can be saved, compiled and run in bfloat16.
same = ScoreNet.from_diffusers(unet, scheduler)
print(f"largest difference of the two scores: {(same(images, 0.5) - net(images, 0.5)).abs().max():.1e}")
