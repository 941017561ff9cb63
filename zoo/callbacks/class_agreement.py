"""Share of predicted images in which a classifier of real images sees the requested class.

Shape suffixes: B images, C channels, H height, W width.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from zoo.base.samples import to_uint8
from zoo.callbacks.rank_merge import RankMergingWriter
from zoo.metrics.agreement import check_labels
from zoo.metrics.extractors import INCEPTION, OWN_CLASSIFIER, SHIPPED_EXTRACTORS, load_classifier
from zoo.metrics.feature_network import FeatureNetwork

_COLUMNS = ("index", "label", "seen", "probability")


class ClassAgreementWriter(RankMergingWriter):
    """Writes to `predictions/<filename>` in how many predicted images a classifier sees the class asked for.

    The module's predictions hold `images` and, as `label`, the class that each was asked to show. The file holds the
    share of images in which the classifier agrees (`accuracy`), the same for each class, and how sure the classifier is
    (`mean_max_probability`). It judges the pixels that a PNG of the image would hold, in float64.

    Args:
        filename: Name of the file.
        classifier: A shipped classifier (`fd_digits_mlp`, `fd_mnist_cnn`, `fd_fashion_cnn`), or the folder of your own,
            written by `FeatureClassifier.save_pretrained`; None for the DataModule's `feature_extractor`.

    Raises:
        ValueError: If `filename` is not a plain file name. The classifier is loaded before the run starts.
    """

    def __init__(self, filename: str = "class_agreement.json", classifier: str | None = None) -> None:
        super().__init__(filename)
        self.classifier = classifier
        self._network: FeatureNetwork | None = None
        self._found: dict[str, list[Tensor]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the classifier.

        Raises:
            TypeError: If none was given, and the DataModule names none.
            ValueError: If it is no classifier of ours and no folder of one.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            self._network = load_classifier(self._name(trainer)).double()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the classifier."""
        self._network = None

    def open(self, trainer: Trainer) -> None:
        """Begin with no images."""
        self._found = {name: [] for name in _COLUMNS}

    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        """Classify the images of a batch.

        Raises:
            ValueError: If the prediction does not hold an image and a class for each sample id, or the images or the
                classes are not those of the classifier.
        """
        assert self._network is not None
        index_B, image_BCHW, label_B = (prediction.get(name) for name in ("index", "images", "label"))
        for name, value in (("images", image_BCHW), ("label", label_B)):
            if not isinstance(value, Tensor) or not value.ndim or len(value) != len(prediction["index"]):
                raise ValueError(
                    f'ClassAgreementWriter wants predict_step of {type(pl_module).__name__} to return "{name}", one for each '
                    f"sample id, got {sorted(prediction)}: "
                    + (
                        "ask for classes (such as --data.predict_labels), or drop this writer."
                        if name == "label"
                        else "drop this writer."
                    )
                )
        assert isinstance(index_B, Tensor) and isinstance(image_BCHW, Tensor) and isinstance(label_B, Tensor)
        check_labels(label_B, self._network.num_classes)
        network = self._network.to(image_BCHW.device)
        with torch.no_grad():
            logits_BK = network(to_uint8(image_BCHW).double() / 255).logits
        probability_B, seen_B = logits_BK.softmax(dim=1).max(dim=1)
        for name, column in zip(_COLUMNS, (index_B, label_B, seen_B, probability_B), strict=True):
            self._found[name].append(column.cpu())

    def close(self, trainer: Trainer) -> None:
        """Write what this rank found: four numbers an image."""
        columns = {name: torch.cat(found).numpy() if found else np.empty(0) for name, found in self._found.items()}
        with self.part(trainer, trainer.global_rank).open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]
        self._found = {}

    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        """Count over all ranks, an image that two of them predicted once; write and print.

        Raises:
            ValueError: If nothing was predicted.
        """
        joined: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for part in parts:
            with np.load(part) as arrays:
                for name in _COLUMNS:
                    joined[name].append(arrays[name])
        index, label, seen, probability = (np.concatenate(joined[name]) for name in _COLUMNS)
        _, once = np.unique(index, return_index=True)
        if not len(once):
            raise ValueError("ClassAgreementWriter: nothing was predicted, so there is nothing to judge.")
        label, probability = label[once], probability[once]
        agrees = label == seen[once]
        classes = {
            str(int(shown)): {"num_samples": int((label == shown).sum()), "accuracy": float(agrees[label == shown].mean())}
            for shown in np.unique(label)
        }
        result = {
            "classifier": self._name(trainer),
            "num_samples": len(once),
            "accuracy": float(agrees.mean()),
            "mean_max_probability": float(probability.mean()),
            "classes": classes,
        }
        path = self.folder(trainer) / self.filename
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(path)
        print(
            f"ClassAgreementWriter: {result['classifier']} sees the class asked for in {100 * agrees.mean():.1f} % of "
            f"{len(once)} images ({len(classes)} classes; mean maximal probability {probability.mean():.3f})"
        )
        return [path]

    def _name(self, trainer: Trainer) -> str:
        """The classifier's name or folder."""
        if self.classifier is not None:
            return self.classifier
        data = getattr(trainer, "datamodule", None)
        name = getattr(data, "feature_extractor", None)
        if name is None or name in (INCEPTION, OWN_CLASSIFIER):
            found = "this run has no DataModule" if data is None else f"{type(data).__name__} names {name or 'none'}"
            raise TypeError(
                f"ClassAgreementWriter wants a classifier of the images, and {found}: pass `classifier`, "
                f"one of {', '.join(SHIPPED_EXTRACTORS)} or the folder of your own FeatureClassifier."
            )
        return name
