"""Features of time."""

import torch
from torch import Tensor, nn

__all__ = ["SinusoidalEmbedding"]


class SinusoidalEmbedding(nn.Module):
    """Sine and cosine of time at frequencies that fall geometrically.

    Args:
        dim: number of features, even.
        scale: factor on time before the first, highest frequency (radians per unit of time).
        max_period: ratio of the highest and the lowest frequency.

    Raises:
        ValueError: ``dim`` is odd or not positive.
    """

    def __init__(self, dim: int, scale: float = 1000.0, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"SinusoidalEmbedding: dim={dim} must be even and positive.")
        self.dim = dim
        self.scale = scale
        self.max_period = max_period

    def forward(self, t: Tensor) -> Tensor:
        """Features (B, dim) of times (B,), in float32 or finer: half precision cannot hold the phases."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        exponent = torch.linspace(0, 1, self.dim // 2, dtype=dtype, device=t.device)
        phase = t.to(dtype)[:, None] * (self.scale * self.max_period**-exponent)
        return torch.cat((phase.sin(), phase.cos()), dim=-1)
