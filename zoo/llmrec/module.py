"""LLM-Rec: one language model encodes users and items, both as titles.

Shape suffixes: B users, M items, L tokens of titles, T tokens with the special one, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

from zoo.base.checkpoint import read_plain
from zoo.llmrec.recommender import Recommender
from zoo.llmrec.state_dict_adapter import load_official
from zoo.lm.backbone import Backbone
from zoo.lm.pooling import Pooling
from zoo.lm.tuned_backbone import TunedBackbone

__all__ = ["LLMRec", "add_special"]


def add_special(ids_BL: Tensor, mask_BL: Tensor, special: int, in_front: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) with a special token in front of each text, or behind its last token.

    Args:
        ids_BL: Ids, padded on the right.
        mask_BL: 1 for tokens, 0 for padding.
        special: The id.
        in_front: Where it stands.

    Raises:
        ValueError: If a text has padding before a token.

    Example:
        >>> add_special(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]]), 2, in_front=False)[0].tolist()
        [[5, 6, 2], [7, 2, 0]]
    """
    if bool((mask_BL[:, 1:] > mask_BL[:, :-1]).any()):
        raise ValueError("Texts are padded on the left, and their last token would be another: pad them on the right.")
    column_B1 = ids_BL.new_full((len(ids_BL), 1), special)
    mask_BT = torch.cat([mask_BL.new_ones(len(mask_BL), 1), mask_BL], 1)
    if in_front:
        return torch.cat([column_B1, ids_BL], 1), mask_BT
    ids_BT = torch.cat([ids_BL * mask_BL, torch.zeros_like(column_B1)], 1)
    return ids_BT.scatter(1, mask_BL.sum(1, keepdim=True), column_B1), mask_BT


class LLMRec(TunedBackbone, Recommender):
    """Recommends by titles alone: a user is the titles that she took, an item is its title; their product is the score.

    An encoder with a ``cls`` token reads it first, and its vector stands for the text; other models read ``eos`` last. Batches
    are those of the DataModule Interactions, whose tokenizer must be the model's. Source: arXiv 2310.14304.

    Args:
        backbone: Encoder, causal model, or the encoder of an encoder-decoder model; what of it is trained is its ``tuning``.
        pooling: ``auto`` as above, or another of the special tokens' places, or the ``mean`` of all tokens.
        dedup_candidates: Whether a title that several candidates have is encoded once; the same loss, but for dropout.
        optimizer: Makes the optimizer; matrices decay, gains and biases do not.
        kwargs: Arguments of `Recommender`.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: Literal["auto", "cls", "last", "mean"] = "auto",
        dedup_candidates: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, weight_decay=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.backbone = backbone
        self.is_pretrained = backbone.is_pretrained
        self.pooling, self.dedup_candidates = pooling, dedup_candidates
        if pooling != "auto":
            self.backbone.pooling = Pooling(pooling, backbone.hidden_size)
        self._special: tuple[int, bool] | None = None

    @override
    def setup(self, stage: str) -> None:
        """Find the special token, in the data's tokenizer.

        Raises:
            ValueError: If the data have no tokenizer.
        """
        super().setup(stage)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("LLMRec reads titles: give the data the tokenizer of the model (data.tokenizer).")
        self.use_tokenizer(tokenizer)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Take the special token of texts from a tokenizer of `datamodules.load_tokenizer`; under a Trainer it is the data's."""
        in_front = tokenizer.cls_id is not None and self.backbone.kind == "encoder"
        self._special = (tokenizer.cls_id if in_front else tokenizer.eos_id, in_front)
        if self.pooling == "auto":
            self.backbone.pooling = Pooling("cls" if in_front else "last", self.backbone.hidden_size)

    @override
    def load_official(self, path: str | Path) -> None:
        """Load a checkpoint of the published code, ``valid_best.pth``.

        Raises:
            ValueError: If its weights are not those that this model trains.
        """
        load_official(self.backbone, read_plain(path), Path(path).name)

    def encode(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Vectors (B, D) of titles, (B, L) ids without special tokens.

        Raises:
            ValueError: If no tokenizer has been seen.
        """
        if self._special is None:
            raise ValueError("LLMRec.encode does not know the special token of texts yet: call use_tokenizer first.")
        return self.backbone.pooled(*add_special(ids_BL, mask_BL, *self._special))

    @override
    def users(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.encode(batch["input_ids"], batch["attention_mask"])

    @override
    def items(self, number_M: Tensor) -> Tensor:
        """Vectors (M, D) of items, encoded by length, so that little of a batch is padding."""
        ids_ML, mask_ML = self.catalogue.tokens(number_M.cpu())
        length_M, order_M = mask_ML.sum(1).sort()
        parts = [
            self.encode(ids_ML[rows, :longest].to(self.device), mask_ML[rows, :longest].to(self.device))
            for rows, longest in _stretches(order_M, length_M)
        ]
        return torch.cat(parts)[order_M.argsort().to(self.device)]

    @override
    def candidates(self, number_BC: Tensor) -> Tensor:
        if self.dedup_candidates:
            return super().candidates(number_BC)
        return self.items(number_BC.flatten()).unflatten(0, number_BC.shape)


def _stretches(order_M: Tensor, length_M: Tensor) -> list[tuple[Tensor, int]]:
    """Texts that are encoded together, about a quarter of all, and the length of the longest of each stretch."""
    size = max(16, -(-len(order_M) // 4))
    return [(rows, max(1, int(length.max()))) for rows, length in zip(order_M.split(size), length_M.split(size), strict=True)]
