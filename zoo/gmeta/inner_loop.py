"""Adaptation of a network to many tasks at once, and the loss of what comes out of it.

Everything is a pure function of parameters by `torch.func`, so that it is differentiable twice, works under Lightning's
inference mode, and runs all tasks in one pass (`torch.vmap`). Rows are adapted as copies of the task's own, so that a table's
size costs nothing.

Shape suffixes: T tasks, S samples of support, Q of query, F fields of categories, N numbers, U fetched rows, R most rows of a
task, D size of a row, E numbers of steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import binary_cross_entropy_with_logits, embedding

from zoo.gmeta.adaptation import Adaptation
from zoo.gmeta.task_rows import TaskRows
from zoo.nn.row_lookup import Rows, places

if TYPE_CHECKING:
    from zoo.ctr import ClickNetwork

__all__ = ["Order", "masked_loss", "meta_loss", "query_logits"]

Order = Literal["first", "second"]
Task = Mapping[str, Any]


def masked_loss(logit_B: Tensor, label_B: Tensor, mask_B: Tensor) -> Tensor:
    """Mean binary cross-entropy over the samples that there are, in float32 at least."""
    logit_B = logit_B if logit_B.dtype == torch.float64 else logit_B.float()
    loss_B = binary_cross_entropy_with_logits(logit_B, label_B.to(logit_B.dtype), reduction="none")
    return (loss_B * mask_B).sum() / mask_B.sum()


def meta_loss(
    network: "ClickNetwork",
    rows: Rows,
    tasks: Task,
    variant: Adaptation,
    steps: int,
    order: Order = "second",
    vmap: bool = True,
) -> Tensor:
    """Loss of each task (T,), whose mean a training step descends.

    ``phi_0 = (theta, rows)``, ``phi_{j+1} = phi_j - rate * grad L(phi_j; support)``, the loss is ``L(phi_steps; query)``; of
    `Adaptation`'s variants ``joint`` and ``reptile`` see its table. In first order inner gradients count as constants.
    Source: MAML (arXiv 1703.03400); Reptile (arXiv 1803.02999).

    Args:
        network: The inner model.
        rows: Rows of its tables, fetched once for support and query.
        tasks: ``support`` and ``query``, each with ``dense`` float (T, S, N), ``label`` (T, S), ``mask`` bool (T, S), and
            optionally ``drawn``, the network's random draws (T, S, ...); and ``rows``, the `TaskRows`.
        variant: What adapts.
        steps: Steps of the inner loop.
        order: Whether the outer gradient passes through inner gradients.
        vmap: All tasks in one pass; else one after the other, which gives the same.
    """

    def loss(tensors: dict[str, Tensor], support: Task, query: Task) -> Tensor:
        both = _joined(support, query)
        if variant.variant == "joint":
            return _loss(network, tensors, both)
        if variant.variant != "reptile":
            return _loss(network, _adapt(network, tensors, support, variant, steps, order), query)
        adapted = _adapt(network, tensors, both, variant, steps, "first")
        way = [(tensors[name] * (tensors[name] - adapted[name]).detach()).sum() for name in variant.order]
        surrogate = torch.stack(way).sum() / variant.rate
        # The value is that of the loss, the gradient (phi_0 - phi_k) / rate.
        return surrogate - surrogate.detach() + _loss(network, adapted, query).detach()

    return _over_tasks(loss, network, rows, tasks, vmap)


def query_logits(
    network: "ClickNetwork", rows: Rows, tasks: Task, variant: Adaptation, steps: Sequence[int], vmap: bool = True
) -> Tensor:
    """Logits of query (T, E, Q) after several numbers of steps on support.

    Args:
        network: As of `meta_loss`, likewise the others.
        rows: Rows of its tables.
        tasks: The tasks; labels of query are not looked at.
        variant: What adapts.
        steps: Rising numbers of steps, E.
        vmap: All tasks in one pass.
    """

    def logits(tensors: dict[str, Tensor], support: Task, query: Task) -> Tensor:
        adapted, found, done = variant.start(tensors, support), [], 0
        for number in steps:
            adapted, done = _descend(network, adapted, support, variant, number - done, "first"), number
            found.append(_run(network, adapted, query))
        return torch.stack(found)

    return _over_tasks(logits, network, rows, tasks, vmap)


def _over_tasks(
    function: Callable[[dict[str, Tensor], Task, Task], Tensor], network: "ClickNetwork", rows: Rows, tasks: Task, vmap: bool
) -> Tensor:
    """Results of a function of (tensors, support, query) for each task."""
    task_rows: TaskRows = tasks["rows"]
    place_TR = places(rows.ids_U, task_rows.numbers_TR)
    own = {name: embedding(place_TR, value_UD) for name, value_UD in rows.values.items()}
    shared = {name: parameter for name, parameter in network.named_parameters() if name not in own}
    sets = [
        {**tasks[name], "places": place, "drawn": tasks[name].get("drawn", [])}
        for name, place in (("support", task_rows.support_TSF), ("query", task_rows.query_TQF))
    ]
    kept = [{name: a_set[name] for name in ("places", "dense", "label", "mask", "drawn")} for a_set in sets]

    def one(own: dict[str, Tensor], support: Task, query: Task) -> Tensor:
        return function({**shared, **own}, support, query)

    # Fused attention has no second derivative, and autocast's cache of weights does not know of functional copies.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            if vmap:
                return torch.vmap(one)(own, *kept)
            return torch.stack([one(*(_one_of(part, task) for part in (own, *kept))) for task in range(len(place_TR))])
    finally:
        torch.set_autocast_cache_enabled(cached)


def _one_of(part: Task, task: int) -> Any:
    return {name: [each[task] for each in value] if isinstance(value, list) else value[task] for name, value in part.items()}


def _joined(support: Task, query: Task) -> Task:
    """The samples of both sets."""
    return {
        name: [torch.cat(pair) for pair in zip(value, query[name], strict=True)]
        if isinstance(value, list)
        else torch.cat([value, query[name]])
        for name, value in support.items()
    }


def _run(network: "ClickNetwork", tensors: Mapping[str, Tensor], samples: Task) -> Tensor:
    return network.run_on_rows(tensors, samples["places"], samples["dense"], samples["drawn"])


def _loss(network: "ClickNetwork", tensors: Mapping[str, Tensor], samples: Task) -> Tensor:
    return masked_loss(_run(network, tensors, samples), samples["label"], samples["mask"])


def _adapt(
    network: "ClickNetwork", tensors: dict[str, Tensor], support: Task, variant: Adaptation, steps: int, order: Order
) -> dict[str, Tensor]:
    """Parameters of a task after its inner loop."""
    return _descend(network, variant.start(tensors, support), support, variant, steps, order)


def _descend(
    network: "ClickNetwork", tensors: dict[str, Tensor], support: Task, variant: Adaptation, steps: int, order: Order
) -> dict[str, Tensor]:
    """Parameters after some steps on support."""

    def loss(adapted: dict[str, Tensor], fixed: dict[str, Tensor]) -> Tensor:
        return _loss(network, {**fixed, **adapted}, support)

    fixed = {name: value for name, value in tensors.items() if name not in variant.order}
    adapted = {name: tensors[name] for name in variant.order}
    for _ in range(steps):
        at = (adapted, fixed)
        if order == "first":  # no graph of what is not differentiated
            at = tuple({name: value.detach() for name, value in part.items()} for part in at)  # type: ignore[assignment]
        gradients = torch.func.grad(loss)(*at)
        adapted = {name: value - variant.rate_of(name) * gradients[name] for name, value in adapted.items()}
    return {**fixed, **adapted}
