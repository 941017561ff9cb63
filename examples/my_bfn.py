"""A subclass of BFN with another network and another metric, trained from Python or from the command line.

python examples/my_bfn.py
zoo fit --model my_bfn.MyBFN --model.network my_bfn.ConvNet --data Digits --trainer.max_steps 100   # in this folder
"""

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from datamodules import Digits
from zoo import ZooModule
from zoo.bfn import BFN, Network
from zoo.nn import SinusoidalEmbedding


class ConvNet(Network):
    """A few convolutions that know the time.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(SinusoidalEmbedding(64), nn.Linear(64, channels))
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, mu: Tensor, t: Tensor) -> Tensor:
        """Estimate the noise (B, H, W, C, 1) in ``mu`` (B, H, W, C) at times ``t`` (B,)."""
        dtype = self.first.weight.dtype  # mu and t are float32, also where the weights are not
        time = self.time[1](self.time[0](t).to(dtype))
        h = torch.relu(self.first(mu.movedim(-1, 1).to(dtype)) + time[:, :, None, None])
        h = h + torch.relu(self.second(h))
        return self.last(h).movedim(1, -1)[..., None]


class MyBFN(BFN):
    """BFN that also measures how well half-noised images are denoised.

    Args:
        time: time of the noise, in (0, 1).
    """

    def __init__(self, time: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.denoising_time = time
        self.denoising_error = MeanSquaredError()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the usual loss, and the mean squared error of the denoised images."""
        super().validation_step(batch, batch_idx)
        x = self.encode(batch)
        t = x.new_full((len(x),), self.denoising_time)
        noise = self.eval_random(len(x)).normal("denoising", x.shape[1:], x.dtype)
        mu = self.flow.sample(x, t, noise)
        estimate = self.head(self.network(mu, t), mu, t, self.flow).mean()
        self.denoising_error.update(estimate, x)
        self.log("val_denoising_error", self.denoising_error)


def main(max_steps: int = 100) -> ZooModule:
    """Train, and load what was trained: no argument is needed, not even the network's."""
    trainer = Trainer(max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(MyBFN(network=ConvNet(channels=16), time=0.3), Digits(batch_size=128))
    trainer.save_checkpoint("my_bfn.ckpt")
    return ZooModule.load_from_checkpoint("my_bfn.ckpt")


if __name__ == "__main__":
    # Checkpoints name classes by their module, and this one is called __main__ when it is run: import it by its name.
    import my_bfn

    print(my_bfn.main())
