"""Variants of optimization-based meta learning: which parameters adapt to a task, from where, and at which rates.

Shape suffixes: S samples of support, F fields of categories, K adapted tensors.
"""

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from zoo.gmeta.cluster_gate import ClusterGate

if TYPE_CHECKING:
    from zoo.ctr import ClickNetwork

__all__ = ["Adaptation", "Variant"]

Variant = Literal["maml", "melu", "anil", "rows", "meta_sgd", "reptile", "cbml", "joint"]


class Adaptation(nn.Module):
    """What the inner loop changes; holds what a variant learns beside the network.

    ======== =================================== =================================================
    variant  adapts                              beside the loss of query after adaptation
    ======== =================================== =================================================
    maml     all parameters and the rows         -
    melu     decision layers                     -
    anil     the last layer                      -
    rows     the rows                            -
    meta_sgd as maml                             a learned rate for each tensor
    reptile  as maml, on support and query       the outer gradient is the way that was gone
    cbml     as maml                             `ClusterGate` scales the decision layers at first
    joint    nothing in training, then as maml   the plain loss of support and query
    ======== =================================== =================================================

    Args:
        network: The inner model.
        variant: One of the table.
        rate: Learning rate of the inner loop; with ``meta_sgd`` its initial value.

    Raises:
        ValueError: The variant is unknown, the rate is not positive, or the network has nothing that the variant adapts.
    """

    def __init__(self, network: "ClickNetwork", variant: Variant, rate: float) -> None:
        super().__init__()
        if variant not in get_args(Variant) or rate <= 0:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(get_args(Variant))}, and the inner rate {rate} > 0.")
        tables = network.row_tables()
        dense = {name: parameter for name, parameter in network.named_parameters() if name not in tables}
        decision = network.decision_layers()
        layers = {"melu": decision, "anil": decision[-1:], "rows": ()}.get(variant)
        self.variant = variant
        self.rows_adapt = variant not in ("melu", "anil")
        self.dense = [name for name in dense if layers is None or name.startswith(tuple(f"{layer}." for layer in layers))]
        if not self.dense and not (self.rows_adapt and tables):
            raise ValueError(
                f"variant={variant!r} adapts nothing of {type(network).__name__}: its decision_layers() name no layer."
            )
        self.order = {name: number for number, name in enumerate([*self.dense, *(tables if self.rows_adapt else ())])}
        self.rate = rate
        self.rates_K = nn.Parameter(torch.full((len(self.order),), rate)) if variant == "meta_sgd" else None
        self.gated = [name for name in self.dense if name.startswith(tuple(f"{layer}." for layer in decision))]
        self.table = max(tables, key=lambda name: tables[name].shape[1], default=None)
        self.gate: ClusterGate | None = None
        if variant == "cbml":
            size = 0 if self.table is None else tables[self.table].shape[1] * len(network.field_dims)
            self.gate = ClusterGate(size + network.num_dense, sum(dense[name].numel() for name in self.gated))

    def rate_of(self, name: str) -> Tensor | float:
        """Rate of an adapted tensor."""
        return self.rate if self.rates_K is None else self.rates_K[self.order[name]]

    def start(self, tensors: Mapping[str, Tensor], support: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where a task begins.

        Args:
            tensors: Parameters by name; of each table the rows of the task.
            support: ``places`` (S, F) in these rows, ``dense`` (S, N), ``label`` (S,), ``mask`` (S,).
        """
        if self.gate is None:
            return dict(tensors)
        parts = [support["dense"]]
        if self.table is not None:
            parts.append(embedding(support["places"], tensors[self.table]).flatten(1))
        factors = self.gate(torch.cat(parts, dim=1), support["label"], support["mask"])
        shapes = [tensors[name].shape for name in self.gated]
        gates = factors.split([prod(shape) for shape in shapes])
        scaled = {name: tensors[name] * gate.view(shape) for name, gate, shape in zip(self.gated, gates, shapes, strict=True)}
        return {**tensors, **scaled}
