"""What every network of a Bayesian flow network is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from zoo.hyperparameters import Configurable

__all__ = ["Network"]


class Network(Configurable, nn.Module, ABC):
    """Maps what a flow shows of the data, and the time, to the output that a head reads."""

    @abstractmethod
    def forward(self, mu: Tensor, t: Tensor) -> Tensor:
        """Predict.

        Args:
            mu: the flow's network input, (B, *data shape) for continuous data, channels last for images.
            t: times (B,) in [0, 1].

        Returns:
            Output (B, *data shape, numbers per element that the head reads).
        """
