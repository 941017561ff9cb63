"""Lightning module that meta-learns click models: wiring only.

Shape suffixes: T tasks, S samples of support, Q of query, F fields of categories, N numbers, E numbers of steps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.ctr import ClickModule, ClickNetwork, DLRMNetwork
from zoo.gmeta.adaptation import Adaptation, Variant
from zoo.gmeta.inner_loop import meta_loss, query_logits
from zoo.gmeta.task_bias import task_bias
from zoo.gmeta.task_rows import task_rows
from zoo.metrics.grouped_auc import GroupedAUC
from zoo.metrics.mean_and_error import Mean
from zoo.nn.row_lookup import Rows
from zoo.strategy_contract import row_link

__all__ = ["GMeta"]

_SMALL = partial(DLRMNetwork, embed_dim=16, bottom=(64,), top=(64, 32), dropout=0.0)
_BIAS = "bias"  # beside the numbers of steps, the name of the adaptation by a constant in closed form


class GMeta(ClickModule):
    """Learns a click model that adapts to a task (a user, a film, an aircraft) from a few of its rows.

    Batches are tasks, as the DataModule `Tasks` gives them: ``{"support": set, "query": set, "task": int64 (T,), "num_tasks":
    tasks of all processes}``, a set ``{"sparse": int64 (T, S, F), "dense": float (T, S, N), "label": (T, S), "mask": bool (T, S),
    "index": int64 (T, S)}``. A process may have no task in a step. All rows of the tables that a step reads are fetched at
    once, through the strategy, which may divide the tables (``hybrid``).

    The loss is the mean over all tasks of the query's mean binary cross-entropy after ``inner_steps`` steps on support. Logged
    are ``train/loss``, and of validation and test, for each of ``eval_steps``, ``auc@1`` (of all rows), ``gauc@1`` (mean over
    tasks of their own, weighted by rows) and ``log_loss@1``; ``@0`` is without adaptation, ``@bias`` with `task_bias` in its
    place. ``auc`` and ``log_loss`` are those of ``inner_steps``.

    Args:
        network: Makes the inner model from field_dims and num_dense; any `ClickNetwork`.
        field_dims: Number of ids of each field of categories; the command line takes it from the data.
        num_dense: Numbers of a row; likewise, and 0 in Python.
        variant: What adapts, see `Adaptation`.
        first_order: Take inner gradients as constants: cheaper, and less exact.
        inner_steps: Steps on support, k.
        inner_lr: Their learning rate.
        eval_steps: Numbers of steps that validation and test report.
        vmap: Run all tasks in one pass; else one after the other, with less memory.
        optimizer: Makes the optimizer.
        **kwargs: Arguments of `ClickModule`.

    Raises:
        ValueError: ``field_dims`` is missing, or a number is out of range.
    """

    def __init__(
        self,
        network: Callable[[Sequence[int], int], ClickNetwork] = _SMALL,
        field_dims: list[int] | None = None,
        num_dense: int | None = None,
        variant: Variant = "maml",
        first_order: bool = False,
        inner_steps: int = 1,
        inner_lr: float = 0.1,
        eval_steps: Sequence[int] = (0, 1, 5),
        vmap: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=2e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(network=network(self.given(field_dims), num_dense or 0), optimizer=optimizer, **kwargs)
        if inner_steps < 1 or min(eval_steps, default=-1) < 0 or self.compile_networks:
            raise ValueError(
                f"GMeta: inner_steps={inner_steps} must be at least 1, eval_steps={list(eval_steps)} at least one number >= 0,"
                " and compile false, since the inner loop differentiates the network itself."
            )
        self.adaptation = Adaptation(self.network, variant, inner_lr)
        self.order: Literal["first", "second"] = "first" if first_order else "second"
        self.inner_steps = inner_steps
        self.eval_steps = sorted({*eval_steps, inner_steps})
        self.vmap = vmap
        names = [*map(str, self.eval_steps), _BIAS]
        kinds = {"auc": BinaryAUROC, "gauc": GroupedAUC, "log_loss": Mean}
        self.by_steps: Any = nn.ModuleDict(
            {f"{stage}_{kind}_{name}": made() for stage in ("val", "test") for kind, made in kinds.items() for name in names}
        )

    # Batches

    @override
    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse tasks that do not fit the network.

        Raises:
            ValueError: If there are no sets, other columns than the network's, ids outside of a field, or an empty set.
        """
        if not {"support", "query"} <= batch.keys():
            raise ValueError(f"{type(self).__name__} needs batches of tasks, as the DataModule Tasks gives them, not of rows.")
        for name in ("support", "query"):
            flat = {
                key: value.flatten(0, 1) for key, value in batch[name].items() if isinstance(value, Tensor) and value.dim() > 1
            }
            super().check(flat)
            if not bool(batch[name]["mask"].any(dim=1).all()):
                raise ValueError(f"A task has no sample in its {name} set: leave out tasks with too few rows.")

    def _prepared(self, batch: Mapping[str, Any], draw: bool = False) -> tuple[Rows, dict[str, Any]]:
        """Rows of all tasks, fetched in one go, and the tasks as the inner loop takes them."""
        sets = {name: dict(batch[name]) for name in ("support", "query")}
        numbers = {name: self.network.row_numbers(each["sparse"]) for name, each in sets.items()}
        masks = {name: each["mask"] for name, each in sets.items()}
        asked = [numbers[name][masks[name]].split(masks[name].sum(1).tolist()) for name in sets]
        groups = [group for pair in zip(*asked, strict=True) for group in pair] or [numbers["support"].flatten()]
        rows = row_link(self.trainer.strategy).fetch(self.row_tables(), groups, self._sparse_rows)
        if draw:
            for each in sets.values():
                random = SampleRandom(self.random_seed, each["index"].flatten(), epoch=self.trainer.current_epoch)
                shape = each["index"].shape
                each["drawn"] = [kept.view(*shape, *kept.shape[1:]) for kept in self.network.draw(random)]
        ready = (
            task_rows(numbers["support"], numbers["query"], masks["support"], masks["query"]) if len(masks["support"]) else None
        )
        return rows, {**sets, "rows": ready}

    # Steps

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean over all tasks of the step, of all processes, of the loss after adaptation."""
        rows, tasks = self._prepared(batch, draw=True)
        if tasks["rows"] is None:
            # A process without tasks takes part in every exchange, with gradients of zero.
            loss = torch.stack(
                [value.sum() * 0 for value in (*rows.values.values(), *self.parameters()) if value.requires_grad]
            ).sum()
        else:
            loss_T = meta_loss(self.network, rows, tasks, self.adaptation, self.inner_steps, self.order, self.vmap)
            # Gradients are means over processes.
            loss = loss_T.sum() * (self.trainer.world_size / batch.get("num_tasks", len(loss_T)))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=self.trainer.world_size > 1)
        return loss

    @override
    def _evaluate(self, stage: str, batch: Mapping[str, Any], auc: BinaryAUROC, log_loss: Mean) -> Tensor:
        rows, tasks = self._prepared(batch)
        logged: dict[str, Any] = {f"{stage}/auc": auc, f"{stage}/log_loss": log_loss}
        found: dict[str, Tensor] = {}
        if tasks["rows"] is not None:
            logit_TEQ = query_logits(self.network, rows, tasks, self.adaptation, self.eval_steps, self.vmap)
            found = {str(steps): logit_TEQ[:, number] for number, steps in enumerate(self.eval_steps)}
            found[_BIAS] = self._unadapted(rows, tasks, "query") + task_bias(
                self._unadapted(rows, tasks, "support"), tasks["support"]["label"], tasks["support"]["mask"]
            )
        query = batch["query"]
        label_B = query["label"][query["mask"]]
        task_B = batch["task"][:, None].expand_as(query["mask"])[query["mask"]]
        for name in (*map(str, self.eval_steps), _BIAS):
            metrics = [self.by_steps[f"{stage}_{kind}_{name}"] for kind in ("auc", "gauc", "log_loss")]
            logged |= {f"{stage}/{kind}@{name}": each for kind, each in zip(("auc", "log_loss"), metrics[::2], strict=True)}
            if found:
                logit_B = found[name].float()[query["mask"]]
                probability_B, loss_B = (
                    logit_B.sigmoid(),
                    binary_cross_entropy_with_logits(logit_B, label_B.float(), reduction="none"),
                )
                metrics[0].update(probability_B, label_B.long())
                metrics[1].update(logit_B, label_B, task_B)
                metrics[2].update(loss_B)
                if name == str(self.inner_steps):
                    auc.update(probability_B, label_B.long())
                    log_loss.update(loss_B)
        self.log_dict(logged, batch_size=1)
        return found.get(str(self.inner_steps), label_B)

    def _unadapted(self, rows: Rows, tasks: Mapping[str, Any], name: str) -> Tensor:
        """Logits of a set before any adaptation."""
        places = tasks["rows"].support_TSF if name == "support" else tasks["rows"].query_TQF
        only = {**tasks, "query": tasks[name], "rows": tasks["rows"]._replace(query_TQF=places)}
        return query_logits(self.network, rows, only, self.adaptation, [0], self.vmap)[:, 0]

    def on_validation_epoch_end(self) -> None:
        """Log the areas inside of tasks."""
        self._log_grouped("val")

    def on_test_epoch_end(self) -> None:
        """Log the areas inside of tasks."""
        self._log_grouped("test")

    def _log_grouped(self, stage: str) -> None:
        for name in (*map(str, self.eval_steps), _BIAS):
            metric = self.by_steps[f"{stage}_gauc_{name}"]
            self.log(f"{stage}/gauc@{name}", metric.compute()["auc"], sync_dist=self.trainer.world_size > 1)
            metric.reset()

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Probability of a click for each row of query, adapted on support: ``{"index", "task", "probability"}``."""
        rows, tasks = self._prepared(batch)
        mask = batch["query"]["mask"]
        found = {"index": batch["query"]["index"][mask], "task": batch["task"][:, None].expand_as(mask)[mask]}
        if tasks["rows"] is None:
            return {**found, "probability": torch.zeros(0, device=mask.device)}
        logit_TQ = query_logits(self.network, rows, tasks, self.adaptation, [self.inner_steps], self.vmap)[:, 0]
        return {**found, "probability": logit_TQ[mask].float().sigmoid()}

    def grown(self, field_dims: Sequence[int]) -> Self:
        """A copy for more ids: rows of known ids stay, those of new ones begin as in a new model.

        Args:
            field_dims: Number of ids of each field, none smaller than now; new ids follow the known ones.

        Raises:
            ValueError: There are other fields, or fewer ids.
        """
        before = self.network.field_dims
        if len(field_dims) != len(before) or any(new < old for new, old in zip(field_dims, before, strict=True)):
            raise ValueError(f"Tables of {list(before)} ids cannot grow to {list(field_dims)}: each field must keep its ids.")
        module = self._build(dict(self.hparams_initial), {"field_dims": list(field_dims)})
        starts = [sum(field_dims[:field]) for field in range(len(before))]
        kept = torch.cat([start + torch.arange(old) for start, old in zip(starts, before, strict=True)])
        weights, tables = module.state_dict(), {f"network.{name}" for name in self.row_tables()}
        for name, value in self.state_dict().items():
            weights[name][kept if name in tables else ...] = value.to(weights[name].device)
        module.load_state_dict(weights)
        return module
