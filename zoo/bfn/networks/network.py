"""Base class of the networks of a Bayesian flow network."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from zoo.base.hyperparameters import Configurable

__all__ = ["Network"]


class Network(Configurable, nn.Module, ABC):
    """Maps what a flow shows of the data, and the time, to the output that a head reads."""

    @abstractmethod
    def forward(self, mu: Tensor, t: Tensor) -> Tensor:
        """Predict.

        Args:
            mu: the flow's network input, (B, *data shape) for continuous data, channels last for images. It is float32 (float64
                in a model of that type), also where the weights are in half precision: cast it where they are used.
            t: times (B,) in [0, 1].

        Returns:
            Output (B, *data shape, numbers per element that the head reads).
        """

    def parameter_groups(self, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: one, decayed; networks whose recipe spares some weights override it.

        Args:
            weight_decay: that of the decayed group; None leaves it to the optimizer.
        """
        return parameter_groups(list(self.parameters()), [], weight_decay)


def parameter_groups(decayed: list[nn.Parameter], spared: list[nn.Parameter], weight_decay: float | None) -> list[dict[str, Any]]:
    """Groups for the optimizer, without empty ones.

    Args:
        decayed: parameters that weight decay shrinks.
        spared: parameters that it does not.
        weight_decay: that of the decayed group; None leaves it to the optimizer.
    """
    own = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [{"params": decayed, **own}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
