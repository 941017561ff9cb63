"""A DataModule of your own with any image method: ``zoo fit --model BFN --model.network ResidualMLP --data my_data.Stripes``.

Any LightningDataModule that gives torchvision's ``(image, label)`` does; deriving from ZooDataModule adds loaders that resume in
the middle of an epoch.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from datamodules import ZooDataModule


class Stripes(ZooDataModule):
    """Pictures of 8 x 8 pixels with one bright line, labelled by its direction.

    Args:
        num_images: number of pictures in the training set.
        batch_size: samples in a batch of one process.
    """

    image_shape = (1, 8, 8)
    num_classes = 2

    def __init__(self, num_images: int = 512, batch_size: int = 64) -> None:
        super().__init__(batch_size=batch_size)
        self.num_images = num_images

    def setup(self, stage: str) -> None:
        """Make the pictures."""
        generator = torch.Generator().manual_seed(0)
        label = torch.randint(2, (self.num_images,), generator=generator)
        place = torch.randint(8, (self.num_images,), generator=generator)
        rows = torch.zeros(self.num_images, 1, 8, 8)
        rows[torch.arange(self.num_images), 0, place] = 1.0
        image = torch.where(label[:, None, None, None].bool(), rows.transpose(-1, -2), rows)
        self.pictures = TensorDataset(image, label)

    def train_dataloader(self) -> DataLoader:
        """All pictures, shuffled."""
        return self.train_loader(self.pictures)

    def val_dataloader(self) -> DataLoader:
        """All pictures, in order."""
        return self.eval_loader(self.pictures)
