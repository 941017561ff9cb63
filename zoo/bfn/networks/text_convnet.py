"""Convolutional network on sequences of class probabilities: the small network for text on a CPU.

Shape suffixes: B samples, L positions, K classes, W width, T time features.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from zoo.bfn.networks.network import Network
from zoo.nn import SinusoidalEmbedding

__all__ = ["TextConvNet"]

#: Probabilities below this count as this one where their logarithms are taken.
_LEAST = 1e-8


class TextConvNet(Network):
    """Residual blocks of a depthwise convolution along the text and a perceptron, for short trainings on a CPU.

    The output is what the blocks compute from the surroundings, plus the logarithm of the belief itself. That is Bayes'
    rule: the messages about one character are independent of all others given that character, so
    p(x_i = k | all messages) is proportional to theta_ik p(messages about the others | x_i = k), and only the second
    factor has to be learned. The blocks see the belief and its logarithm; an untrained network repeats the belief.

    Args:
        num_classes: number of classes K, at least 3.
        width: channels of the residual stream.
        depth: number of blocks; each lets a position see ``kernel_size // 2`` more positions on either side.
        kernel_size: width of the convolutions, odd.
        expansion: width of the perceptrons' hidden layer, in units of ``width``.
        time_features: number of features of time, even.

    Raises:
        ValueError: a size out of range.
    """

    def __init__(
        self,
        num_classes: int = 27,
        width: int = 192,
        depth: int = 5,
        kernel_size: int = 11,
        expansion: int = 4,
        time_features: int = 64,
    ) -> None:
        super().__init__()
        if num_classes < 3:
            raise ValueError(f"TextConvNet: num_classes={num_classes} must be at least 3; for two classes use BFNTransformer.")
        for name, size in {"width": width, "depth": depth, "expansion": expansion}.items():
            if size < 1:
                raise ValueError(f"TextConvNet: {name}={size} must be at least 1.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"TextConvNet: kernel_size={kernel_size} must be odd and positive.")
        self.num_classes = num_classes
        self.input = nn.Linear(2 * num_classes, width)
        self.time_features = SinusoidalEmbedding(time_features)
        self.time = nn.Sequential(nn.Linear(time_features, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width, kernel_size, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, num_classes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, mu: Tensor, t: Tensor) -> Tensor:
        """See `Network`: (B, L, K) and (B,) -> (B, L, K), in the belief's float type.

        Raises:
            ValueError: the sequences show another number of classes.
        """
        if mu.dim() != 3 or mu.shape[2] != self.num_classes:
            raise ValueError(
                f"TextConvNet was built for inputs (B, L, {self.num_classes}), but was given {tuple(mu.shape)}:"
                " set num_classes to the number of classes of the flow."
            )
        dtype = self.input.weight.dtype
        log_belief_BLK = mu.clamp(min=_LEAST).log()
        # Both forms: differences of small probabilities show in the logarithms only, certainty in the probabilities.
        features = torch.cat((2 * mu - 1, (log_belief_BLK + math.log(self.num_classes)) / 4), dim=-1)
        h_BLW = self.input(features.to(dtype)) + self.time(self.time_features(t).to(dtype))[:, None]
        for block in self.blocks:
            h_BLW = block(h_BLW)
        return log_belief_BLK + self.output(self.norm(h_BLW)).to(log_belief_BLK.dtype)


class _Block(nn.Module):
    """h + perceptron(norm(convolution(h)))."""

    def __init__(self, width: int, kernel_size: int, expansion: int) -> None:
        super().__init__()
        # Two-dimensional with a height of 1, so that the channels may stay last in memory: no copies on a CPU.
        self.conv = nn.Conv2d(width, width, (1, kernel_size), padding=(0, kernel_size // 2), groups=width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, expansion * width)
        self.output = nn.Linear(expansion * width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, h_BLW: Tensor) -> Tensor:
        """(B, L, W) -> (B, L, W)."""
        mixed_BLW = self.conv(h_BLW.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return h_BLW + self.output(gelu(self.hidden(self.norm(mixed_BLW)), approximate="tanh"))
