"""Hidden layers whose dropout is given from outside, so that it can belong to the sample.

Shape suffixes: B samples, I inputs, W width of a hidden layer.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from zoo.base.random import SampleRandom

__all__ = ["DeepLayers"]


class DeepLayers(nn.Module):
    """Linear layers, each followed by ReLU and dropout.

    Args:
        num_inputs: I.
        widths: W of each layer.
        dropout: Probability with which a unit is left out in training; the others are scaled by ``1 / (1 - dropout)``.

    Raises:
        ValueError: A width is less than 1, or ``dropout`` lies outside [0, 1).
    """

    def __init__(self, num_inputs: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        if min(widths, default=1) < 1 or not 0 <= dropout < 1:
            raise ValueError(f"Hidden layers {list(widths)} must be at least 1 wide, and dropout={dropout} lie in [0, 1).")
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise([num_inputs, *widths]))
        self.num_outputs = [num_inputs, *widths][-1]
        self.dropout = dropout
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def draw(self, random: SampleRandom) -> list[Tensor]:
        """Kept units: bool (B, W) of each layer; none without dropout."""
        if not self.dropout:
            return []
        return [
            random.uniform(f"ctr.dropout.{number}", (layer.out_features,)) >= self.dropout  # type: ignore[arg-type]
            for number, layer in enumerate(self.layers)
        ]

    def forward(self, x_BI: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        """Outputs of the last layer (B, W).

        Args:
            x_BI: Inputs (B, I).
            kept: Result of :meth:`draw`; empty: all units are kept.
        """
        for number, layer in enumerate(self.layers):
            x_BI = layer(x_BI).relu()
            if kept:
                x_BI = x_BI * (kept[number].to(x_BI.dtype) / (1 - self.dropout))
        return x_BI
