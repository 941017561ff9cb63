"""Weights of rationales on disk: the artefact that KPOD reads, and a page to look at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from zoo.callbacks.line_merge import LineMergingWriter
from zoo.kpod.artefacts import TokenWeights
from zoo.kpod.token_heatmap import heatmap
from zoo.kpod.weighter_module import TokenWeighter

__all__ = ["TokenWeightsWriter"]


class TokenWeightsWriter(LineMergingWriter):
    """Writes the weights that a `TokenWeighter` predicts to ``predictions/<filename>``, and some as a heat map beside it.

    Args:
        filename: Name of the safetensors file; that of the page ends with ``.html``.
        rows: Rationales on the page, evenly spaced.

    Raises:
        ValueError: If the masks have collapsed and ``on_collapse`` is ``error``, when all are predicted.
    """

    def __init__(self, filename: str = "token_weights.safetensors", rows: int = 50) -> None:
        super().__init__(filename)
        self.rows = rows

    @override
    def add(self, trainer: Trainer, pl_module: LightningModule, prediction: Mapping[str, Any]) -> None:
        for index, *row in zip(prediction["index"].tolist(), prediction["weights"], prediction["tokens"], strict=True):
            self.keep(index, row)

    @override
    def merge(self, trainer: Trainer, parts: list[Path]) -> list[Path]:
        module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
        assert isinstance(module, TokenWeighter)
        rows: dict[int, list[float]] = {}
        shown: list[tuple[str, list[str], list[float]]] = []
        for index, line in self.merged(parts):
            rows[index], tokens = json.loads(line)
            shown.append((f"example {index}", tokens, rows[index]))
        options = {"alpha": str(module.alpha), "keep_ratio": str(module.keep_ratio), "fold": str(module.fold)}
        weights = TokenWeights.of_rows(rows, {**getattr(data, "fingerprint", {}), **options})
        if module.is_collapsed(float(weights.values.mean())):
            weights.values.fill_(1.0)
        path = self.folder(trainer) / self.filename
        weights.save(path)
        page = path.with_suffix(".html")
        page.write_text(heatmap(shown[:: max(1, len(shown) // self.rows)][: self.rows]))
        return [path, page]
