"""A data set of Hugging Face: with the training of this package, and in a DataLoader.

    pip install datasets accelerate pillow
    python examples/integrations/hugging_face_dataset.py

It prints how the loss falls, and the loss of the trained network.
"""

import numpy as np
import torch
from datasets import Dataset, Features, Image
from disks import disks
from torch.utils.data import DataLoader

from scorematch import ScoreNet, dsm_loss
from scorematch.data import open_images
from scorematch.training import Settings, train_steps

# In place of load_dataset("owner/name", split="train"): rows with a column of pictures.
pixels = (255 * disks(256)[:, 0]).round().to(torch.uint8).numpy()
dataset = Dataset.from_dict({"image": list(pixels)}, features=Features({"image": Image()}))

# train and train_steps take what open_images returns. It finds the column of images, and resizes and decodes them.
torch.manual_seed(0)
net = ScoreNet.unet(channels=1, image_size=16, widths=(16, 32), layers_per_block=1)
settings = Settings(images=2048, batch_size=32, lr=2e-3)
losses = [float(step.loss) for step in train_steps(net, open_images(dataset), settings)]
first, last = torch.tensor(losses).view(4, 16).mean(1)[[0, -1]]
print(f"loss {first:.1f} in the first quarter, {last:.1f} in the last")


# A loop of your own takes a DataLoader of the data set, whose transform returns tensors in [0, 1].
def to_tensors(rows: dict) -> dict:
    """Converts the pictures of some rows to tensors (1, H, W)."""
    return {"x": [torch.from_numpy(np.array(picture))[None] / 255 for picture in rows["image"]]}


loader = DataLoader(dataset.with_transform(to_tensors), batch_size=64)
with torch.no_grad():
    own = torch.stack([dsm_loss(net, batch["x"]) for batch in loader]).mean()
print(f"loss of the trained network at the levels of its schedule {own:.1f}, {256 / 2:g} for a score of zero")
