"""Residual multilayer perceptron: the small network for the CPU.

Shape suffixes: B samples, E elements of the data times numbers per element, W width, D depth, T time features.
"""

import torch
from torch import Tensor, nn

from zoo.bfn.networks.network import Network
from zoo.nn import SinusoidalEmbedding

__all__ = ["ResidualMLP"]


class ResidualMLP(Network):
    """Residual multilayer perceptron on the flattened data, for small images on a CPU.

    Each block normalizes, scales and shifts by time, and adds a two-layer perceptron. The blocks are passed several
    times: small data are learned better with the same weights used again than with more weights. The output starts at
    zero, so that an untrained network predicts no noise.

    Args:
        num_elements: elements of the data, such as 64 for 8 x 8 grey pixels.
        width: width of the residual stream.
        depth: number of blocks.
        passes: how often the data go through all blocks.
        time_features: number of features of time.
        num_inputs: numbers per element that the flow shows.
        num_outputs: numbers per element that the head reads.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(
        self,
        num_elements: int = 64,
        width: int = 304,
        depth: int = 3,
        passes: int = 3,
        time_features: int = 64,
        num_inputs: int = 1,
        num_outputs: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"num_elements": num_elements, "width": width, "depth": depth, "passes": passes}
        sizes |= {"num_inputs": num_inputs, "num_outputs": num_outputs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"ResidualMLP: {name}={size} must be at least 1.")
        self.num_elements = num_elements
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self.passes = passes
        self.input = nn.Linear(num_elements * num_inputs, width)
        self.time_features = SinusoidalEmbedding(time_features)
        self.time = nn.Linear(time_features, time_features)
        self.modulation = nn.Linear(time_features, 2 * depth * width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, num_elements * num_outputs)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, mu: Tensor, t: Tensor) -> Tensor:
        """See `Network`.

        Raises:
            ValueError: the data has another number of elements.
        """
        x_BE = mu.flatten(1)
        if x_BE.shape[1] != self.num_elements * self.num_inputs:
            raise ValueError(
                f"ResidualMLP was built for {self.num_elements} elements with {self.num_inputs} numbers each, but the"
                f" data gives {tuple(mu.shape[1:])}: set num_elements to the number of pixels times channels."
            )
        data_shape = mu.shape if self.num_inputs == 1 else mu.shape[:-1]
        dtype = self.input.weight.dtype
        time_BT = nn.functional.silu(self.time(self.time_features(t).to(dtype)))
        gain_BDW, shift_BDW = self.modulation(time_BT).unflatten(1, (2, len(self.blocks), -1)).unbind(1)
        gain_BDW = 1 + gain_BDW
        h_BW = self.input(x_BE.to(dtype))
        for _ in range(self.passes):
            for i, block in enumerate(self.blocks):
                h_BW = h_BW + block(h_BW, gain_BDW[:, i], shift_BDW[:, i])
        return self.output(self.norm(h_BW)).view(*data_shape, self.num_outputs)


class _Block(nn.Module):
    """MLP(norm(h) * gain + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, h_BW: Tensor, gain_BW: Tensor, shift_BW: Tensor) -> Tensor:
        """The block's addition to the residual stream; gain and shift depend on time."""
        x_BW = torch.addcmul(shift_BW, self.norm(h_BW), gain_BW)
        return self.output(nn.functional.silu(self.hidden(x_BW)))
