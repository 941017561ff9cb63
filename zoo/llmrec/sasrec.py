"""Baselines on ids: SASRec, and popularity.

Shape suffixes: B users, M items, H items of a history, D width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.llmrec.recommender import Recommender

__all__ = ["Popularity", "SASRec"]


class SASRec(Recommender):
    """Self-attention over the ids of a history; the last item's vector is the user's.

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781; trained by the losses of
    `Recommender`, on the same examples as `LLMRec`.

    Args:
        num_items: I; the command line takes it from the data if it is left out.
        width: D.
        num_layers: Blocks of attention and a perceptron.
        heads: Of the attention.
        dropout: Probability, on the input and in blocks.
        max_history: Longest history.
        optimizer: Makes the optimizer.
        kwargs: Arguments of `Recommender`.

    Raises:
        ValueError: If the number of items is missing.
    """

    def __init__(
        self,
        num_items: int | None = None,
        width: int = 64,
        num_layers: int = 2,
        heads: int = 1,
        dropout: float = 0.2,
        max_history: int = 10,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if num_items is None:
            raise ValueError("SASRec: num_items is missing: give the number of items, which the DataModule Interactions has.")
        self.embedding = nn.Embedding(num_items, width)
        self.position = nn.Parameter(torch.zeros(max_history, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        block = nn.TransformerEncoderLayer(width, heads, width, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    @override
    def users(self, batch: Mapping[str, Tensor]) -> Tensor:
        unknown_BH, order_BH = (batch["history"] < 0).sort(dim=1, stable=True)  # titles that the catalogue lacks, and padding
        history_BH, length_B = batch["history"].gather(1, order_BH), (~unknown_BH).sum(1)
        from_end_BH = (length_B[:, None] - 1 - torch.arange(history_BH.shape[1], device=length_B.device)).clamp(min=0)
        x_BHD = self.embedding(history_BH.clamp(min=0)) + self.position[from_end_BH.clamp(max=len(self.position) - 1)]
        later_HH = nn.Transformer.generate_square_subsequent_mask(history_BH.shape[1], device=length_B.device)
        x_BHD = self.blocks(self.dropout(x_BHD), mask=later_HH, is_causal=True)
        last_BD = x_BHD[torch.arange(len(x_BHD), device=x_BHD.device), (length_B - 1).clamp(min=0)]
        return last_BD * (length_B > 0)[:, None]

    @override
    def items(self, number_M: Tensor) -> Tensor:
        return self.embedding(number_M)


class Popularity(Recommender):
    """Scores items by the number of training examples whose target they are; nothing is learned, so that only ``validate``,
    ``test`` and ``predict`` make sense.

    Args:
        optimizer: Not used.
        kwargs: Arguments of `Recommender`.
    """

    def __init__(self, optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.0), **kwargs: Any) -> None:
        super().__init__(optimizer=optimizer, **kwargs)

    @override
    def configure_optimizers(self) -> Any:
        raise ValueError("Popularity learns nothing: use zoo validate, test or predict with it.")

    @override
    def users(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.ones(len(batch["history"]), 1, device=self.device)

    @override
    def items(self, number_M: Tensor) -> Tensor:
        return self.catalogue.counts.to(self.device)[number_M, None].float()
