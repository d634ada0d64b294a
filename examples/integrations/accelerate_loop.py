"""A training loop with Accelerate, on one device or several.

    pip install accelerate
    accelerate launch examples/integrations/accelerate_loop.py

It prints the mean loss of each epoch, divided by D/2 for images of D values, and writes the network with averaged
weights into the folder ``accelerate``.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from disks import disks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from scorematch import ScoreNet, dsm_loss
from scorematch.training.levels import levels_for, weighting_for

accelerator = Accelerator()
set_seed(0)  # the same weights in every process
net = ScoreNet.unet(channels=1, image_size=16, widths=(16, 32), layers_per_block=1)
levels, weighting = levels_for(net, None), weighting_for(net, None, p=2)
set_seed(0, device_specific=True)  # other noise in every process
loader = DataLoader(disks(1024), batch_size=32, shuffle=True, drop_last=True)  # batches (32, 1, 16, 16)
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0)
model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.97))

losses = []
for _ in range(3):
    for x in loader:
        sigma = levels.quantile(torch.rand(len(x), dtype=torch.float64)).to(x)
        loss = dsm_loss(model, x, sigma=sigma, weighting=weighting)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), x[0].numel() / 2)  # the loss is of the order of D/2
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(net)
        losses.append(accelerator.gather(loss.detach()).mean().item() / (x[0].numel() / 2))
    accelerator.print(f"loss {torch.tensor(losses[-32:]).mean():.3f}, 2 before the training")

if accelerator.is_main_process:
    averaged.module.eval().save_pretrained("accelerate")
