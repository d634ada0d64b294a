"""torch.compile: for training, and for sampling. It needs a C++ compiler on a CPU, and Triton on CUDA.

    python examples/integrations/compiled.py

It prints how the loss falls, and the difference between samples of the compiled and of the uncompiled network. Most of
the time is spent in the compiler.
"""

import torch
from disks import disks

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.sampling import ODESampler

torch.manual_seed(0)
images = disks(512)
schedule = NoiseSchedule.geometric(10, 0.01, levels=100)
net = ScoreNet.unet(1, 16, widths=(8,), layers_per_block=1, attention=(False,), schedule=schedule)

# Training: the first call compiles the forward and backward passes, later calls run them.
model = torch.compile(net)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
losses = []
for _ in range(64):
    loss = dsm_loss(model, images[torch.randint(len(images), (32,))])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {sum(losses[:16]) / 16:.1f} in the first quarter, {sum(losses[48:]) / 16:.1f} in the last")

# Sampling: inference_copy prepares the trained network and compiles it once, for any number of samplers and calls.
net.eval()
fast = net.inference_copy(compile=True)
samples = ODESampler(fast, levels=10).sample(16, generator=0, progress=False)
plain = ODESampler(net, levels=10, precision="float32").sample(16, generator=0, progress=False)
print(f"root mean square difference from the uncompiled network: {(samples - plain).square().mean().sqrt():.1e}")
