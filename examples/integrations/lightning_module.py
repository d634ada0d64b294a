"""Training with Lightning.

    pip install lightning
    python examples/integrations/lightning_module.py

It prints the mean loss of the last epoch, and writes the network with averaged weights into the folder ``lightning``.
"""

import lightning
import torch
from disks import disks
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from scorematch import ScoreNet, dsm_loss
from scorematch.training.levels import levels_for, weighting_for


class Training(lightning.LightningModule):
    """Trains a network on batches of images in [0, 1]."""

    def __init__(self, net: ScoreNet, lr: float = 2e-3) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.levels, self.weighting = levels_for(net, None), weighting_for(net, None, p=2)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        """Returns the loss of a batch, and logs it divided by D/2, for images of D values."""
        sigma = self.levels.quantile(torch.rand(len(x), dtype=torch.float64)).to(x)
        loss = dsm_loss(self.net, x, sigma=sigma, weighting=self.weighting)
        self.log("loss", loss / (x[0].numel() / 2), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0)


lightning.seed_everything(0)
loader = DataLoader(disks(1024), batch_size=32, shuffle=True, drop_last=True)  # batches (32, 1, 16, 16)
training = Training(ScoreNet.unet(channels=1, image_size=16, widths=(16, 32), layers_per_block=1))
trainer = lightning.Trainer(
    max_epochs=3,
    logger=False,
    enable_checkpointing=False,
    gradient_clip_val=128,  # the norm of the gradient; D/2 is 128
    callbacks=[WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.97))],  # trains, and ends with the averaged weights
)
trainer.fit(training, loader)
print(f"loss {trainer.callback_metrics['loss']:.3f}, 2 before the training")
training.net.eval().save_pretrained("lightning")
