"""A training loop in plain PyTorch, with averaged weights, and samples of the trained network.

    python examples/integrations/plain_loop.py

It prints the mean loss of each epoch, divided by D/2 for images of D values (it is 2 before the training), and writes a
picture of samples, disks.png, and the trained network into the folder ``disks``.
"""

import torch
from disks import disks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from scorematch import ScoreNet, dsm_loss
from scorematch.core.precision import autocast
from scorematch.data import save_grid
from scorematch.sampling import ODESampler
from scorematch.training.levels import levels_for, weighting_for

torch.manual_seed(0)
loader = DataLoader(disks(1024), batch_size=32, shuffle=True, drop_last=True)  # batches (32, 1, 16, 16) in [0, 1]
net = ScoreNet.unet(channels=1, image_size=16, widths=(16, 32), layers_per_block=1)
levels, weighting = levels_for(net, None), weighting_for(net, None, p=2)  # those of EDM, as in train
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0)
averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.97))

losses = []
for _ in range(6):
    for x in loader:
        sigma = levels.quantile(torch.rand(len(x), dtype=torch.float64)).to(x)
        with autocast(x.device):  # bfloat16 on devices where it is fast
            loss = dsm_loss(net, x, sigma=sigma, weighting=weighting)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), x[0].numel() / 2)  # the loss is of the order of D/2
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(net)
        losses.append(loss.item() / (x[0].numel() / 2))
    print(f"loss {torch.tensor(losses[-32:]).mean():.3f}")

trained = averaged.module.eval()
images = ODESampler(trained, levels=10).sample(16, generator=0, progress=False)
save_grid(images, "disks.png")
trained.save_pretrained("disks")
