"""Base of the networks for images: checks the input's shape."""

from torch import Tensor

from zoo.bfn.networks.network import Network

__all__ = ["ImageNetwork"]


class ImageNetwork(Network):
    """Network for images (B, H, W, C), or (B, H, W, C, K) where the flow shows K numbers per element.

    Args:
        image_shape: (channels, height, width).
        num_inputs: numbers per element that the flow shows.
        num_outputs: numbers per element that the head reads.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        if len(self.image_shape) != 3:
            raise ValueError(f"{type(self).__name__}: image_shape={self.image_shape} must be (channels, height, width).")
        self.require_positive(channels=image_shape[0], height=image_shape[1], width=image_shape[2])
        self.require_positive(num_inputs=num_inputs, num_outputs=num_outputs)

    def require_positive(self, **sizes: int) -> None:
        """Refuse sizes below 1.

        Raises:
            ValueError: with the argument's name and value.
        """
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name}={size} must be at least 1.")

    def pixels(self, mu: Tensor, t: Tensor) -> Tensor:
        """The network's input with all numbers of a pixel in the last dimension, (B, H, W, C K).

        Raises:
            ValueError: the input has another shape than the network was built for.
        """
        channels, height, width = self.image_shape
        expected = (height, width, channels, self.num_inputs) if self.num_inputs > 1 else (height, width, channels)
        if tuple(mu.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__} was built for inputs (B, {', '.join(map(str, expected))}), channels last, but was given"
                f" {tuple(mu.shape)}: set image_shape to the data's (channels, height, width), and num_inputs to the numbers"
                " per element that the flow shows (1; the number of classes where there are more than two)."
            )
        if t.shape != mu.shape[:1]:
            raise ValueError(f"{type(self).__name__}: t has shape {tuple(t.shape)}, but must hold one time a sample, (B,).")
        return mu if self.num_inputs == 1 else mu.flatten(-2)
