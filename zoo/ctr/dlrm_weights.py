"""Weights of DLRM's published code, and of TorchRec's DLRM, by the names of `DLRMNetwork`.

Shape suffixes: K vectors of a row, P pairs of them.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["dlrm_arguments", "from_dlrm"]

#: Patterns of tables, layers below and layers above; of both codes.
_REFERENCE = (r"emb_l\.(\w+)\.weight", r"bot_l\.(\d+)\.(weight|bias)", r"top_l\.(\d+)\.(weight|bias)")
_TORCHREC = (
    r"sparse_arch\.embedding_bag_collection\.embedding_bags\.(\w+)\.weight",
    r"dense_arch\.model\._mlp\.(\d+)\._linear\.(weight|bias)",
    r"over_arch\.model\.(0\._mlp\.\d+\._linear|1)\.(weight|bias)",
)


def _tables(weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Tensors whose name fits a pattern, by the part of the name in its first group, in the order of the file."""
    return {found[1]: value for name, value in weights.items() if (found := re.fullmatch(pattern, name))}


def from_dlrm(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of `DLRMNetwork`: tables one below the other in the order of the file, which is that of the features.

    Args:
        weights: Of ``dlrm_s_pytorch.py`` (the whole checkpoint, or its ``state_dict``) or of ``torchrec``'s ``DLRM``.

    Raises:
        ValueError: If they are neither.
    """
    weights = weights.get("state_dict", weights)
    patterns = _TORCHREC if any(name.startswith("sparse_arch.") for name in weights) else _REFERENCE
    rest = set(weights) - {name for name in weights if any(re.fullmatch(pattern, name) for pattern in patterns)}
    tables = _tables(weights, patterns[0])
    if rest or not tables:
        held = ", ".join(sorted(rest)[:3]) if tables else "no tables"
        raise ValueError(f"These are no weights of DLRM, by dlrm_s_pytorch.py or by torchrec: they hold {held}.")
    ours = {"embedding.table.weight": torch.cat(list(tables.values()))}
    layers = [
        [weights[name] for name in weights if re.fullmatch(pattern, name) and name.endswith(kind)]
        for pattern in patterns[1:]
        for kind in ("weight", "bias")
    ]
    bottom, top = (list(zip(*layers[first : first + 2], strict=True)) for first in (0, 2))
    names = [f"bottom.layers.{number}" for number in range(len(bottom))]
    names += [*(f"top.layers.{number}" for number in range(len(top) - 1)), "output"]
    for name, (weight, bias) in zip(names, [*bottom, *top], strict=True):
        ours |= {f"{name}.weight": weight, f"{name}.bias": bias}
    if patterns is _TORCHREC:
        first = "top.layers.0.weight" if len(top) > 1 else "output.weight"
        ours[first] = _by_lower_triangle(ours[first], len(tables) + 1)
    return ours


def _by_lower_triangle(weight: Tensor, count: int) -> Tensor:
    """Columns of pairs of the upper triangle (0, 1), (0, 2), ... in the order of the lower one (1, 0), (2, 0), (2, 1), ..."""
    pairs = count * (count - 1) // 2
    place_KK = torch.zeros(count, count, dtype=torch.int64)
    place_KK[*torch.triu_indices(count, count, 1)] = torch.arange(pairs)
    order_P = place_KK.T[*torch.tril_indices(count, count, -1)]
    vector, products = weight.split([weight.shape[1] - pairs, pairs], dim=1)
    return torch.cat([vector, products[:, order_P]], dim=1)


def dlrm_arguments(weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of `DLRM` for weights of either code; None if they are neither."""
    state = weights.get("state_dict", weights)
    tables = _tables(state, _REFERENCE[0]) or _tables(state, _TORCHREC[0])
    if not tables:
        return None
    ours = from_dlrm(weights)
    widths = {part: [len(ours[n]) for n in ours if re.fullmatch(rf"{part}\.layers\.\d+\.bias", n)] for part in ("bottom", "top")}
    return {
        "field_dims": [len(table) for table in tables.values()],
        "num_dense": ours["bottom.layers.0.weight"].shape[1],
        "embed_dim": ours["embedding.table.weight"].shape[1],
        "bottom": widths["bottom"][:-1],
        "top": widths["top"],
    }
