"""Positions of tokens: padding that would shift them, and documents that share a row.

Shape suffixes: B rows, T tokens of a row.
"""

import torch
from torch import Tensor, nn

from zoo.lm.backbone import BackboneKind

__all__ = ["check_padding", "counts_own_positions", "document_mask", "pad_right"]


def counts_own_positions(network: nn.Module) -> bool:
    """Whether a model of transformers numbers tokens from the left edge of the batch, whatever the mask says.

    Rotary and relative positions do not mind; OPT counts by the mask, RoBERTa by the id of padding.
    """
    names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    by_itself = network.config.model_type in ("opt", "roberta", "xlm-roberta", "camembert")  # type: ignore[union-attr,operator]
    return bool(names & {"wpe", "position_embeddings"}) and not by_itself


def check_padding(mask_BT: Tensor | None, name: str) -> None:
    """Refuse padding on the left of a model with absolute positions.

    Args:
        mask_BT: 1 for tokens, 0 for padding.
        name: Of the component, for the message.

    Raises:
        ValueError: If a row begins with padding.
    """
    if mask_BT is not None and mask_BT.dim() == 2 and not bool(mask_BT[:, 0].all()):
        raise ValueError(
            f"{name}: a text is padded on the left, but this model numbers positions from the left edge: pad on the right, or"
            " give position_ids that start with the text."
        )


def document_mask(position_ids_BT: Tensor, mask_BT: Tensor | None, kind: BackboneKind) -> Tensor:
    """Mask of rows that hold several documents: a token sees those of its own document, in a causal model the earlier ones.

    A token that would see nothing, such as padding, sees itself.

    Args:
        position_ids_BT: Positions that start at 0 with each document.
        mask_BT: 1 for tokens, 0 for padding; None: no padding.
        kind: Kind of the model.

    Returns:
        bool (B, 1, T, T), true where a query (rows) sees a key.
    """
    document_BT = (position_ids_BT == 0).cumsum(1)
    seen_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    place_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
    if kind == "causal":
        seen_BTT = seen_BTT & (place_T[:, None] >= place_T[None, :])
    if mask_BT is not None:
        seen_BTT = seen_BTT & mask_BT.bool()[:, None, :]
    return (seen_BTT | (place_T[:, None] == place_T[None, :]))[:, None]


def pad_right(ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and their masks with the tokens first, in their order, and all padding behind them, wherever it was.

    Args:
        ids_BT: Ids, or other numbers of tokens.
        mask_BT: 1 for tokens, 0 for padding.

    Example:
        >>> pad_right(torch.tensor([[9, 5, 6, 9]]), torch.tensor([[0, 1, 1, 0]]))
        (tensor([[5, 6, 9, 9]]), tensor([[1, 1, 0, 0]]))
    """
    order_BT = mask_BT.bool().long().argsort(dim=1, descending=True, stable=True)
    return ids_BT.gather(1, order_BT), mask_BT.gather(1, order_BT)
