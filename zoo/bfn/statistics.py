"""Mean and spread of the data, from which the optimal start of the solvers is computed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

__all__ = ["DataStatistics"]


@dataclass
class DataStatistics:
    """Moments of the data, element by element.

    Args:
        mean: mean of the encoded data: continuous (H, W, C), discrete (L, K).
        std: standard deviation, of the same shape.

    Raises:
        ValueError: the shapes differ.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.std.shape:
            raise ValueError(
                f"DataStatistics: mean {tuple(self.mean.shape)} and std {tuple(self.std.shape)} must have one shape."
            )

    @classmethod
    def of(cls, batches: Iterable[Tensor], reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Self:
        """One pass over batches (B, ...) of encoded data, in float64.

        Args:
            batches: this process's share of the data.
            reduce: sums a tensor over all processes.

        Raises:
            ValueError: no data.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            batch = batch.to(torch.float64)
            count += len(batch)
            total, squares = total + batch.sum(0), squares + batch.square().sum(0)
        if count == 0:
            raise ValueError("DataStatistics.of was given no data.")
        total, squares = reduce(total), reduce(squares)
        number = reduce(torch.tensor(float(count), dtype=torch.float64, device=total.device))
        mean = total / number
        return cls(mean, (squares / number - mean.square()).clamp(min=0).sqrt())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of `save`, or of the published code: ``torch.save`` of ``{"mean", "std"}``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it does not hold both.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path} with the data's statistics.")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not {"mean", "std"} <= set(tensors):
            raise ValueError(f"{path} holds {', '.join(tensors) or 'nothing'}; data statistics need `mean` and `std`.")
        return cls(tensors["mean"], tensors["std"])

    def save(self, path: Path) -> None:
        """Write ``{"mean", "std"}``, float32, with ``torch.save``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        torch.save({"mean": self.mean.float().cpu(), "std": self.std.float().cpu()}, temporary)
        temporary.replace(path)
