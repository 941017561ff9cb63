"""What BAHE is compared with, behind the same head and on the same data; wiring only.

Shape suffixes: B rows, N lists, M behaviours of a list, X sequences, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from zoo.bahe.history_clicks import ClickHead, HistoryClicks
from zoo.lm.backbone import Backbone
from zoo.lm.pooling import Pooling, PoolingKind
from zoo.lm.trained_types import settle_types

__all__ = ["IDClicks", "TokenCTR"]


class TokenCTR(HistoryClicks):
    """Predicts clicks from all tokens of histories: each list is one text, its behaviours one after another, the oldest first.

    The blocks that are trained, and whether activations are kept for the backward pass, are the backbone's ``tuning``, ``last_n``
    and ``activation_checkpointing``.

    Args:
        backbone: Language model.
        max_tokens: Longest list, in tokens; the oldest are left out.
        pooling: Of the tokens of a list.
        kwargs: Arguments of `HistoryClicks`.

    Raises:
        ValueError: If ``max_tokens`` is more than the backbone's positions.
    """

    def __init__(self, backbone: Backbone, max_tokens: int = 512, pooling: PoolingKind = "mean", **kwargs: Any) -> None:
        super().__init__(width=backbone.hidden_size, **kwargs)
        config: Any = getattr(backbone.network, "config", None)
        most = getattr(config, "max_position_embeddings", max_tokens)
        if not 3 <= max_tokens <= most:
            raise ValueError(f"TokenCTR: max_tokens={max_tokens} must lie in 3 ... {most}, the positions of the backbone.")
        self.backbone, self.max_tokens = backbone, max_tokens
        self.backbone.pooling = Pooling(pooling, backbone.hidden_size)
        self.is_pretrained = backbone.is_pretrained
        self._tokens: list[list[int]] = []

    @override
    def setup(self, stage: str) -> None:
        """Tokenize the texts."""
        super().setup(stage)
        if stage == "fit":
            settle_types(self.backbone, self.trainer)
        self._tokens = self.backbone.tokenizer(list(self.data.atoms), add_special_tokens=False)["input_ids"]

    def sequences(self, atoms_XM: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask (X, T), on the CPU, of sequences of atoms, with the encoder's special tokens around each."""
        tokenizer = self.backbone.tokenizer
        is_encoder = self.backbone.kind == "encoder"
        front, back = (
            [token] if is_encoder and token is not None else [] for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        )
        rows = []
        for numbers in atoms_XM.tolist():
            own = [token for number in numbers if number for token in self._tokens[number]]
            rows.append([*front, *own[-(self.max_tokens - len(front) - len(back)) :], *back] or [self.backbone.pad_id])
        ids_XT = torch.full((len(rows), max(map(len, rows))), self.backbone.pad_id)
        mask_XT = torch.zeros_like(ids_XT)
        for place, row in enumerate(rows):
            ids_XT[place, : len(row)], mask_XT[place, : len(row)] = torch.tensor(row), 1
        return ids_XT, mask_XT

    @override
    def encode(self, behaviors_BNM: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor]:
        vectors = []
        for atoms_XM in (behaviors_BNM.flatten(0, 1), item_B[:, None]):
            ids_XT, mask_XT = (each.to(atoms_XM.device) for each in self.sequences(atoms_XM))
            vectors.append(torch.where((atoms_XM > 0).any(1, keepdim=True), self.backbone.pooled(ids_XT, mask_XT), 0.0))
        return vectors[0].unflatten(0, behaviors_BNM.shape[:2]), vectors[1]


class IDClicks(HistoryClicks):
    """Predicts clicks from the ids of user and item alone.

    Args:
        head: Must have vectors of ids.
        kwargs: Arguments of `HistoryClicks`.

    Raises:
        ValueError: If the head has none.
    """

    def __init__(self, head: ClickHead = ClickHead(id_dim=32), **kwargs: Any) -> None:  # noqa: B008 (read only)
        if not head.id_dim or head.interaction == "product":
            raise ValueError("IDClicks has nothing but ids: set head.id_dim above 0, and head.interaction to none or dcn.")
        super().__init__(width=0, head=head, **kwargs)

    @override
    def encode(self, behaviors_BNM: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor]:
        empty = behaviors_BNM.new_zeros(*behaviors_BNM.shape[:2], 0)
        return empty, empty[:, 0]

    @override
    def score(self, user_BND: Tensor, item_BD: Tensor, batch: Mapping[str, Tensor], drawn: Sequence[Tensor] = ()) -> Tensor:
        return self._logits(batch, drawn, None)
