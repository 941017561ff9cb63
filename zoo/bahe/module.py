"""BAHE: histories as sequences of stored vectors, read by the upper blocks of a language model; wiring only.

Shape suffixes: B rows, N lists, M behaviours of a list, A atoms, D width.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from zoo.bahe.aggregator import Aggregator, PositionKind, Rescale
from zoo.bahe.atom_store import AtomStore
from zoo.bahe.encode_atoms import AtomEncoder, fill
from zoo.bahe.history_clicks import HistoryClicks
from zoo.lm.backbone import Backbone
from zoo.lm.pooling import Pooling, PoolingKind
from zoo.lm.sources import cached
from zoo.lm.trained_types import settle_types

__all__ = ["BAHE"]


class BAHE(HistoryClicks):
    """Predicts clicks from long textual histories; the lower blocks of a language model read each distinct text once.

    The vectors that they make lie in an `AtomStore`. Each list of a user's behaviours is a sequence of these vectors, which the
    upper, trained blocks read by itself; the candidate is a sequence of one. Source: arXiv 2403.19347.

    Checkpoints hold the upper blocks, the head, and the fingerprint of the store, not the lower blocks and no vectors of texts.

    Args:
        backbone: Language model; of pretrained ones with ``tuning: frozen``, so that its source is known when it is rebuilt.
        n_low: Number of lower blocks, 0 to all.
        store: Folder of the store; None: one in the cache of the zoo, named by its fingerprint.
        atom_pooling: Of the tokens of a text.
        max_tokens: Longest text, in tokens.
        pooling: Of the behaviours of a list, see `Aggregator`.
        positions: Likewise.
        max_behaviors: Likewise.
        causal: Likewise.
        rescale: Likewise.
        train_low: Whether the lower blocks are trained as well, by the candidates' texts; the vectors of behaviours come from the
            store, which the callback `AtomStoreRefresh` makes again.
        kwargs: Arguments of `HistoryClicks`.

    Raises:
        ValueError: If an option is unknown or does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_low: int = 3,
        store: str | None = None,
        atom_pooling: Literal["mean", "last", "cls"] = "mean",
        max_tokens: int = 32,
        pooling: PoolingKind = "mean",
        positions: PositionKind = "auto",
        max_behaviors: int = 64,
        causal: bool | None = None,
        rescale: Rescale = "none",
        train_low: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(width=backbone.hidden_size, **kwargs)
        if not 0 <= n_low <= len(backbone.blocks):
            raise ValueError(f"BAHE: n_low={n_low} must lie in 0 ... {len(backbone.blocks)}, the blocks of the backbone.")
        if backbone.is_pretrained and getattr(backbone, "tuning", "frozen") != "frozen":
            raise ValueError("BAHE: checkpoints name the source of the lower blocks: set the backbone's tuning to frozen.")
        low, high = backbone.split(n_low)
        high.train()
        for parameter in low.parameters():
            parameter.requires_grad_(train_low)
        for parameter in high.parameters():
            parameter.requires_grad_(True)
        self.is_pretrained = backbone.is_pretrained
        self.n_low, self.store, self.train_low = n_low, store, train_low
        self.aggregator = Aggregator(high, backbone.hidden_size, pooling, positions, max_behaviors, causal, rescale)  # type: ignore[arg-type]
        self.encoder = AtomEncoder(low.eval(), backbone.tokenizer, Pooling(atom_pooling, backbone.hidden_size), max_tokens)
        if train_low:
            self.low: nn.Module = low
        self._atoms: AtomStore | None = None
        self._row_A = np.zeros(0, dtype=np.int64)
        self._trained_on: dict[str, Any] | None = None

    # The store

    def fingerprint(self, text_fingerprint: str) -> dict[str, Any]:
        """What the vectors depend on, the texts included."""
        return {"n_low": self.n_low, **self.encoder.fingerprint, "texts": text_fingerprint}

    def fill_store(self, atoms: Sequence[str], text_fingerprint: str) -> AtomStore:
        """Open or make the store, and encode the texts that it lacks; all processes share the work.

        Args:
            atoms: Distinct texts, normalised; the first is empty.
            text_fingerprint: Fingerprint of what makes texts.

        Raises:
            ValueError: If the store has another fingerprint, or the model was trained on one.
        """
        kept = self._trained_on
        if self.train_low and kept is not None and kept["texts"] == text_fingerprint and self._folder(kept).is_dir():
            store = AtomStore.open(self._folder(kept), kept)  # vectors of earlier weights, until the next refresh
            if not store.missing(atoms):
                return store
        own = self.fingerprint(text_fingerprint)
        if kept is not None and not self.train_low:
            self._compare(kept, own)
        folder = self._folder(own)
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first and not folder.is_dir():
            AtomStore.create(folder, self.network.vector_dim, own)
        if dist.is_initialized():
            dist.barrier()
        store = AtomStore.open(folder, own)
        device = self._encoding_device()
        self.encoder.low.to(device)
        mode = self.encoder.low.training
        self.encoder.low.eval()
        with torch.no_grad():
            encoded = fill(store, atoms, lambda texts: self.encoder(texts, device))
        self.encoder.low.train(mode)
        if not self.train_low:
            self.encoder.low.cpu()
        done = f"{encoded:,} texts encoded" if encoded else "encodes nothing"
        if any(atoms):
            rank_zero_info(f"{folder}: {done}, {len(store):,} texts are there.")
        return AtomStore.open(folder, own)

    def _folder(self, fingerprint: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()[:16]
        if self.store is None:
            return cached("atoms", name)
        return Path(f"{self.store}-{name}") if self.train_low else Path(self.store)

    def _encoding_device(self) -> torch.device:
        if self._trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def use_store(self) -> AtomStore:
        """Read the vectors of the data's texts from now on; encode what is missing."""
        atoms = self.data.atoms
        store = self.fill_store(atoms, self.data.text_fingerprint)
        self._atoms, self._row_A, self._trained_on = store, store.rows(atoms), store.fingerprint
        self._texts = atoms
        return store

    def refresh(self) -> Path:
        """Make another store with the lower blocks as they are, then read from it; returns the folder of the one before."""
        assert self._atoms is not None
        old, self._trained_on = self._atoms.folder, None
        self.use_store()
        return old

    @override
    def setup(self, stage: str) -> None:
        """Fill the store.

        Raises:
            ValueError: If the data have other lists, longer ones than there are positions, or the store does not fit.
        """
        super().setup(stage)
        if self.data.history > self.aggregator.max_behaviors:
            raise ValueError(
                f"The data give up to {self.data.history} behaviours of a list, BAHE has {self.aggregator.max_behaviors}"
                " positions: raise --model.max_behaviors, or lower --data.history."
            )
        if stage == "fit":
            settle_types(self.aggregator, self.trainer)
        self.use_store()

    @override
    def check(self, batch: Mapping[str, Any]) -> None:
        super().check(batch)
        for name in ("behaviors", "item"):
            if batch[name].numel() and not 0 <= int(batch[name].min()) <= int(batch[name].max()) < max(1, len(self._row_A)):
                raise ValueError(f"BAHE knows {len(self._row_A)} atoms, the batch has others in {name}: take the data's batches.")

    # Passes

    def vectors(self, number_B: Tensor) -> Tensor:
        """Stored vectors (..., D) of atoms.

        Raises:
            ValueError: If there is no store yet.
        """
        if self._atoms is None:
            raise ValueError("BAHE has no store yet, which a Trainer fills in its setup: call use_store, or run it by one.")
        distinct, place_B = number_B.unique(return_inverse=True)
        vector_UD = self._atoms.read(self._row_A[distinct.cpu().numpy()])
        return vector_UD.to(number_B.device, self.head_dtype)[place_B]

    @override
    def encode(self, behaviors_BNM: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.train_low and self.training:
            distinct, place_B = item_B.unique(return_inverse=True)
            texts = [self._texts[number] for number in distinct.tolist()]
            item_BD = F.embedding(place_B, self.encoder(texts, item_B.device))  # its gradient adds in a fixed order
            behavior_BNMD = self.vectors(behaviors_BNM)
        else:
            both = self.vectors(torch.cat([behaviors_BNM.flatten(), item_B]))
            behavior_BNMD, item_BD = both[: -len(item_B)].unflatten(0, behaviors_BNM.shape), both[-len(item_B) :]
        user_XD = self.aggregator(behavior_BNMD.flatten(0, 1), behaviors_BNM.flatten(0, 1) > 0)
        return user_XD.unflatten(0, behaviors_BNM.shape[:2]), self.aggregator(item_BD[:, None], item_B[:, None] > 0)

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bahe_store"] = self._trained_on

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a store of another fingerprint."""
        super().on_load_checkpoint(checkpoint)
        self._take(checkpoint.get("bahe_store"))

    @override
    def shared_entries(self) -> dict[str, Any]:
        return {"_bahe_store": self._trained_on}

    @override
    def take_shared_entries(self, config: Mapping[str, Any]) -> None:
        self._take(config.get("_bahe_store"))

    def _take(self, fingerprint: dict[str, Any] | None) -> None:
        if fingerprint is None:
            return
        if self._trained_on is not None:
            self._compare(fingerprint, self._trained_on)
        elif not self.train_low:
            self._compare(fingerprint, self.fingerprint(fingerprint["texts"]))
        self._trained_on = fingerprint
        if self.train_low and self._atoms is not None:
            self.use_store()

    def _compare(self, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        left_out = {"weights"} if self.train_low else set()
        names = [name for name in own if stored.get(name) != own[name] and name not in left_out]
        if names:
            then, now = (", ".join(f"{name}={str(each.get(name))[:24]}" for name in names[:3]) for each in (stored, own))
            raise ValueError(
                f"The model was trained on vectors of {then}, but these are of {now}: take the data and backbone it had."
            )
