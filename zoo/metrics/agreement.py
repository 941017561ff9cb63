"""What a classifier of real images makes of generated ones: how sure it is, and which classes it sees.

Shape suffixes: B images, K classes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.metrics.extractors import load_classifier


@dataclass(frozen=True)
class ClassifierAgreement:
    """A classifier's view of a set of images.

    Attributes:
        mean_max_probability: Mean over the images of the largest class probability, in (1/K, 1].
        classes: The classes that are the most probable one of at least one image, ascending.
        accuracy: Fraction of images whose most probable class is their label; None without labels.
    """

    mean_max_probability: float
    classes: tuple[int, ...]
    accuracy: float | None = None


def classifier_agreement(
    images: Tensor, classifier: str | Path, labels: Tensor | None = None, *, batch_size: int = 256
) -> ClassifierAgreement:
    """Mean maximal class probability, the classes seen, and with labels the class accuracy.

    Args:
        images: (N, C, H, W) uint8; on CUDA the classifier runs there.
        classifier: A shipped classifier (`fd_digits_mlp`, `fd_mnist_cnn`, `fd_fashion_cnn`), or the folder of your own.
        labels: (N,) int64, the class that each image was meant to show.
        batch_size: Images per pass.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If there are no images, they do not fit the labels, or the classifier is unknown.

    Example:
        >>> agreement = classifier_agreement(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "fd_digits_mlp")
        >>> len(agreement.classes)
        1
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"`images` must be uint8, got {images.dtype}; round them with zoo.sampling.to_uint8.")
    if not len(images) or (labels is not None and len(labels) != len(images)):
        raise ValueError(
            f"classifier_agreement wants at least one image and one label per image, got {len(images)} images"
            + ("." if labels is None else f" and {len(labels)} labels.")
        )
    network = load_classifier(classifier).double().to(images.device)
    with torch.no_grad():
        logits_BK = torch.cat([network(batch.double() / 255).logits for batch in images.split(batch_size)])
    probability_B, class_B = logits_BK.softmax(dim=1).max(dim=1)
    accuracy = None if labels is None else (class_B == labels.to(class_B)).double().mean().item()
    return ClassifierAgreement(probability_B.mean().item(), tuple(class_B.unique().tolist()), accuracy)
