"""Vectors of items on disk, for libraries that search nearest neighbours."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from zoo.llmrec.recommender import Recommender

__all__ = ["ExportItemIndex"]


class ExportItemIndex(Callback):
    """Writes the vectors of all items when ``predict`` ends: ``index/embeddings.npy``, float32 (I, D), and ``index/items.jsonl``.

    A line of ``items.jsonl`` has ``key``, ``title`` and ``domain`` of the row of that number; ``index/config.json`` says how
    vectors are compared (``similarity``, ``temperature``), and of which model and tokenizer they are. Where the folder holds an
    index of the same model, only items that it lacks are encoded, and put behind.

    Args:
        folder: Where it is written; None: ``index`` in the run's folder.

    Raises:
        ValueError: If the folder holds an index of another model.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @override
    @torch.no_grad()
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Recommender)
        config = {
            "model": fingerprint(pl_module),
            "tokenizer": getattr(getattr(trainer.datamodule, "tokenizer", None), "fingerprint", None),  # type: ignore[attr-defined]
            "similarity": pl_module.similarity,
            "temperature": pl_module.temperature,
        }
        catalogue = pl_module.catalogue
        folder = self.folder or Path(trainer.default_root_dir) / "index"
        known = _known(folder, config) if trainer.is_global_zero else []
        known = trainer.strategy.broadcast(known)
        sizes = catalogue.domain_offsets.diff().tolist()
        domains = [name for name, size in zip(catalogue.domains, sizes, strict=True) for _ in range(size)]
        rows = list(zip(catalogue.keys, catalogue.titles, domains, strict=True))
        there = {(row["key"], row["title"], row["domain"]) for row in known}
        new = [number for number, row in enumerate(rows) if row not in there]
        if not trainer.is_global_zero:
            return
        numbers = torch.tensor(new, dtype=torch.int64, device=pl_module.device)
        parts = [pl_module.items(part).float().cpu().numpy() for part in numbers.split(pl_module.item_batch_size) if len(part)]
        old = [np.load(folder / "embeddings.npy")] if known else []
        vectors = np.concatenate(old + parts)
        lines = [*known, *({"key": key, "title": title, "domain": domain} for key, title, domain in (rows[n] for n in new))]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "embeddings.tmp.npy"
        np.save(temporary, vectors)
        (folder / "items.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        temporary.replace(folder / "embeddings.npy")
        rank_zero_info(f"ExportItemIndex: {len(new):,} items encoded, {len(known):,} known, in {folder}.")


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _known(folder: Path, config: dict[str, Any]) -> list[dict[str, str]]:
    """Items of an index that is there."""
    if not (folder / "config.json").is_file():
        return []
    found = json.loads((folder / "config.json").read_text())
    if found != config:
        names = [name for name in config if found.get(name) != config[name]]
        raise ValueError(f"{folder} holds an index of another {names[0]}: give an empty folder, or remove that index.")
    known = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    if len(np.load(folder / "embeddings.npy", mmap_mode="r")) != len(known):
        raise ValueError(f"{folder} holds an index that was cut off: remove it, and write it again.")
    return known
