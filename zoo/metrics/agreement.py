"""View of a classifier of real images on generated ones: its confidence, and the classes that it sees.

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
        ValueError: If there are no images, they do not fit the labels, the classifier is unknown, or it does not know a
            label's class.

    Example:
        >>> agreement = classifier_agreement(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "fd_digits_mlp")
        >>> len(agreement.classes)
        1
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"`images` must be uint8, got {images.dtype}; round them with zoo.base.samples.to_uint8.")
    if not len(images) or (labels is not None and len(labels) != len(images)):
        raise ValueError(
            f"classifier_agreement wants at least one image and one label per image, got {len(images)} images"
            + ("." if labels is None else f" and {len(labels)} labels.")
        )
    network = load_classifier(classifier).double().to(images.device)
    with torch.no_grad():
        logits_BK = torch.cat([network(batch.double() / 255).logits for batch in images.split(batch_size)])
    return logits_agreement(logits_BK, labels)


def logits_agreement(logits_BK: Tensor, labels: Tensor | None = None) -> ClassifierAgreement:
    """The same of class scores that are at hand already.

    Args:
        logits_BK: (B, K) floating point, a classifier's scores of B images.
        labels: (B,) int64, the class that each image was meant to show.

    Raises:
        ValueError: If there are no images, they do not fit the labels, or a label is no class of the classifier.

    Example:
        >>> logits_agreement(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1])).accuracy
        0.5
    """
    if not len(logits_BK) or (labels is not None and labels.shape != logits_BK.shape[:1]):
        raise ValueError(
            f"The classifier's agreement wants at least one image and one label per image, got {len(logits_BK)} images"
            + ("." if labels is None else f" and labels of shape {tuple(labels.shape)}.")
        )
    if labels is not None:
        check_labels(labels, logits_BK.shape[1])
    probability_B, class_B = logits_BK.softmax(dim=1).max(dim=1)
    accuracy = None if labels is None else (class_B == labels.to(class_B)).double().mean().item()
    return ClassifierAgreement(probability_B.mean().item(), tuple(class_B.unique().tolist()), accuracy)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Make sure that a classifier knows the classes that images are meant to show.

    Args:
        labels: (N,), the classes.
        num_classes: Number of classes of the classifier.

    Raises:
        ValueError: If a label is not one of 0 to `num_classes` - 1.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"The classifier knows the classes 0 to {num_classes - 1}, and the images are meant to show {low} to {high}: "
            "use a classifier of the same classes."
        )
