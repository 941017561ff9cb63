"""Cross layers of DCN-v2: explicit products of all inputs, of a degree that grows with each layer.

Shape suffixes: B samples, I inputs.
"""

import torch
from torch import Tensor, nn

__all__ = ["CrossLayers"]


class CrossLayers(nn.Module):
    """``x <- x0 * (W x + b) + x``, from ``x = x0``; the product is element by element.

    Layer l makes a polynomial of degree l + 1 in the inputs. Source: DCN V2 (arXiv 2008.13535), equation 1.

    Args:
        num_inputs: I.
        num_layers: Number of layers; 0 leaves inputs as they are.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> CrossLayers(3, num_layers=2)(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, num_inputs: int, num_layers: int) -> None:
        super().__init__()
        if num_inputs < 1 or num_layers < 0:
            raise ValueError(f"CrossLayers: num_inputs={num_inputs} must be at least 1, num_layers={num_layers} not negative.")
        self.layers = nn.ModuleList(nn.Linear(num_inputs, num_inputs) for _ in range(num_layers))
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x0_BI: Tensor) -> Tensor:
        """(B, I) to (B, I)."""
        x_BI = x0_BI
        for layer in self.layers:
            x_BI = torch.addcmul(x_BI, x0_BI, layer(x_BI))
        return x_BI
