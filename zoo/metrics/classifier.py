"""Training of the small image classifiers behind the shipped feature extractors, or of your own."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.base.samples import to_uint8
from zoo.metrics.feature_network import FeatureNetwork, random_affine
from zoo.metrics.mean_and_error import Mean
from zoo.module import ZooModule


class FeatureClassifier(ZooModule):
    """A small image classifier whose penultimate activations serve as features for feature distances.

    Trained with cross entropy on images rounded to 8 bits, which is what the metrics will show it, each turned,
    shifted, scaled and mirrored at random by `random_affine`. A second term of the loss holds the mean square of the
    features at 1, the scale that the kernel distance's (x.y / D + 1)^3 is made for; it costs no accuracy, since the
    scale of the last hidden layer can be traded against the logits' layer. A folder written by `save_pretrained` is a
    feature extractor: `feature_distances(samples, reference, "feature-classifier", weights_path=folder)`.

    Args:
        network: The classifier.
        rotation: Augmentation: largest angle in degrees.
        shift: Augmentation: largest shift as a fraction of the side.
        scale: Augmentation: largest relative change of size.
        flip: Augmentation: mirror half of the images.
        optimizer: Optimizer.
        lr_scheduler: Learning rate schedule, stepped each epoch; None for a constant rate.
        compile: Compile the network.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        rotation: float = 0.0,
        shift: float = 0.0,
        scale: float = 0.0,
        flip: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, lr_scheduler_interval="epoch", compile=compile)
        self.network = network
        #: Over all samples of all processes, however many each has.
        self.means = nn.ModuleDict({f"{stage}_{name}": Mean() for stage in ("val", "test") for name in ("loss", "accuracy")})
        self.augment = partial(random_affine, rotation=rotation, shift=shift, scale=scale, flip=flip)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Class scores (B, K) of images (B, C, H, W) in [0, 1], which are rounded to 8 bits first."""
        return self.network(to_uint8(image_BCHW) / 255).logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of an augmented batch `(image_BCHW in [0, 1], label_B)`, plus what holds the features' scale."""
        image_BCHW, label_B = batch
        uniform_B5 = self.train_random(len(label_B)).uniform("augmentation", (5,))
        features_BD, logits_BK = self.network(to_uint8(self.augment(image_BCHW, uniform_B5)) / 255)
        loss = cross_entropy(logits_BK, label_B) + (features_BD.square().mean() - 1).square()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a validation batch."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a test batch."""
        self._log_evaluation("test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Classify the user's own images: `{"index", "label": most probable class, "probability": of that class}`."""
        probability_B, label_B = self(batch["image"]).softmax(dim=1).max(dim=1)
        kept: dict[str, Any] = {key: batch[key] for key in ("index", "path") if key in batch}
        return {**kept, "label": label_B, "probability": probability_B}

    def _log_evaluation(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        image_BCHW, label_B = batch
        logits_BK = self(image_BCHW)
        measures = {
            "loss": cross_entropy(logits_BK, label_B, reduction="none"),
            "accuracy": (logits_BK.argmax(dim=1) == label_B).float(),
        }
        for name, value_B in measures.items():
            metric = self.means[f"{stage}_{name}"]
            assert isinstance(metric, Mean)
            metric.update(value_B)
            self.log(f"{stage}/{name}", metric, prog_bar=True, batch_size=len(label_B))
