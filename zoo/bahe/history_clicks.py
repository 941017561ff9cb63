"""Base of models that predict clicks from histories: the head, checks, metrics and predictions; wiring only.

Shape suffixes: B rows, N lists, M behaviours of a list, D width of vectors, V vectors of the head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from typing_extensions import override

from zoo.bahe.click_rates import ClickRates
from zoo.ctr import ClickModule, DCNNetwork
from zoo.metrics.grouped_auc import GroupedAUC
from zoo.metrics.mean_and_error import Mean

__all__ = ["ClickHead", "HistoryClicks"]

Interaction = Literal["none", "product", "dcn"]


@dataclass
class ClickHead:
    """Map of vectors of lists and candidate, and of ids, to a logit.

    Attributes:
        interaction: Inputs are ``[S_1 .. S_N, q]``; ``product`` appends ``S_n * q``, ``dcn`` has cross layers
            before the hidden ones.
        dnn: Width of each hidden layer.
        dropout: Dropout after each hidden layer.
        num_cross: Cross layers of ``dcn``.
        id_dim: Size of the vectors of the ids of user and item; 0: ids have none.
    """

    interaction: Interaction = "none"
    dnn: Sequence[int] = (256, 64)
    dropout: float = 0.1
    num_cross: int = 2
    id_dim: int = 0

    def __post_init__(self) -> None:
        if self.interaction not in get_args(Interaction) or self.id_dim < 0:
            raise ValueError(
                f"ClickHead: interaction={self.interaction!r} must be one of {', '.join(get_args(Interaction))}, and"
                f" id_dim={self.id_dim} not negative."
            )


class HistoryClicks(ClickModule):
    """The base; a subclass gives the vectors of lists and candidates.

    Batches are those of the DataModule TextHistories. Beside what `ClickModule` logs there are ``gauc``, the mean over users of
    their areas under the curve weighted by their rows, ``gauc_users``, whose number that is, and ``gauc_left_out``, the number of
    users with one class; ``test`` has ``rates_auc`` as well, of the popularity of items and the mean of users in training.

    Args:
        width: D of the vectors; 0: there are none.
        num_features: N. The command line takes this and the next two from the data if they are left out.
        num_users: Largest number of a user; only ids need it.
        num_items: Largest number of an item; likewise.
        head: Behind the vectors.
        encoder_lr: Rate of learning of what makes the vectors; the optimizer's own is that of the head.
        ids_from: Checkpoint of `IDClicks` with the same head, whose predictions training starts from: ids need many more rows
            than a language model reads in the same time.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the schedule, stepped each step.
        compile: Compile the networks.

    Raises:
        ValueError: If a number is missing.
    """

    def __init__(
        self,
        width: int,
        num_features: int | None = None,
        num_users: int | None = None,
        num_items: int | None = None,
        head: ClickHead = ClickHead(),  # noqa: B008 (read only)
        encoder_lr: float = 5e-5,
        ids_from: Path | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
    ) -> None:
        missing = [name for name, value in (("num_features", num_features), ("num_users", num_users), ("num_items", num_items))
                   if value is None and (name == "num_features" or head.id_dim)]  # fmt: skip
        if missing:
            raise ValueError(f"{type(self).__name__}: {missing[0]} is missing: give that of the DataModule TextHistories.")
        num_lists = num_features or 0
        num_vectors = (num_lists + 1 + (num_lists if head.interaction == "product" else 0)) if width else 0
        dims = [(num_users or 0) + 1, (num_items or 0) + 1] if head.id_dim else []
        num_cross = head.num_cross if head.interaction == "dcn" else 0
        network = DCNNetwork(dims, 0, head.id_dim, num_cross, head.dnn, head.dropout, num_vectors, width)
        super().__init__(network=network, optimizer=optimizer, lr_scheduler=lr_scheduler, compile=compile)
        self.num_features, self.head, self.encoder_lr, self.ids_from = num_lists, head, encoder_lr, ids_from
        self.val_gauc, self.test_gauc = GroupedAUC(), GroupedAUC()
        self.rates_auc = BinaryAUROC()
        self._rates: ClickRates | None = None

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """The head, and with a rate of its own what makes the vectors."""
        head = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        own = {id(parameter) for parameter in head}
        others = [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in own]
        return [{"params": head}, *([{"params": others, "lr": self.encoder_lr}] if others else [])]

    @torch.no_grad()
    def _start_from_ids(self, path: Path) -> None:
        """Take all weights of a head of ids; those of the texts' vectors in its first layer are 0."""
        own, theirs = self.network.state_dict(), HistoryClicks.load_from_checkpoint(path).network.state_dict()
        wide = "dnn.layers.0.weight"
        if own.keys() != theirs.keys() or any(own[name].shape != value.shape for name, value in theirs.items() if name != wide):
            raise ValueError(f"ids_from: the head of {path} is another one: train IDClicks with the same head (none or product).")
        own[wide].zero_()
        for name, value in theirs.items():
            own[name][tuple(map(slice, value.shape))] = value

    # Passes

    def encode(self, behaviors_BNM: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of lists (B, N, D) and of candidates (B, D).

        Args:
            behaviors_BNM: Numbers of atoms, 0 for padding.
            item_B: Numbers of atoms.
        """
        raise NotImplementedError

    @property
    def head_dtype(self) -> torch.dtype:
        """Floating-point type of the head."""
        return next(self.network.parameters()).dtype

    def score(self, user_BND: Tensor, item_BD: Tensor, batch: Mapping[str, Tensor], drawn: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B,) of vectors, which may have been kept from before.

        Args:
            user_BND: Vectors of lists.
            item_BD: Vectors of candidates.
            batch: Has ``user_id`` and ``item_id``, of which the head may have vectors.
            drawn: Result of the head's ``draw``.
        """
        parts = [user_BND, item_BD[:, None]]
        if self.head.interaction == "product":
            parts.append(user_BND * item_BD[:, None])
        return self._logits(batch, drawn, torch.cat(parts, dim=1).to(self.head_dtype))

    def _logits(self, batch: Mapping[str, Tensor], drawn: Sequence[Tensor], vectors_BVD: Tensor | None) -> Tensor:
        ids_BF = torch.stack([batch["user_id"], batch["item_id"]], dim=1)
        logit_B: Tensor = self.network(ids_BF, ids_BF.new_zeros(len(ids_BF), 0), drawn, vectors_BVD)
        return logit_B

    @override
    def forward(self, batch: Mapping[str, Tensor], drawn: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B,) of a batch."""
        return self.score(*self.encode(batch["behaviors"], batch["item"]), batch, drawn)

    # Checks

    @property
    def data(self) -> Any:
        """The DataModule.

        Raises:
            ValueError: If it has no texts.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "atoms"):
            raise ValueError(f"{type(self).__name__} reads histories of texts: give it the DataModule TextHistories.")
        return data

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if len(self.data.features) != self.num_features:
            raise ValueError(
                f"The model is built for num_features={self.num_features}, but the data have the {len(self.data.features)} lists"
                f" {', '.join(self.data.features)[:100]}: give --model.num_features {len(self.data.features)}."
            )
        if stage == "fit" and self.ids_from is not None and self.trainer.ckpt_path is None:
            self._start_from_ids(self.ids_from)

    @override
    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that does not fit.

        Raises:
            ValueError: If it has other lists, an id that the head lacks, or a label that is not 0 or 1.
        """
        name = type(self).__name__
        missing = {"behaviors", "item", "user_id", "item_id", "index"} - batch.keys()
        if missing or batch["behaviors"].dim() != 3 or batch["behaviors"].shape[1] != self.num_features:
            found = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
            raise ValueError(
                f"{name} needs batches with behaviors (B, {self.num_features}, M), item, user_id, item_id and index, as the"
                f" DataModule TextHistories gives them, not {found}."[:300]
            )
        for key, size in zip(("user_id", "item_id"), self.network.field_dims, strict=False):
            if bool(((batch[key] < 0) | (batch[key] >= size)).any()):
                raise ValueError(
                    f"{name} has {size} rows for {key}, the batch has {int(batch[key].max())}: build it of the data."
                )
        label_B = batch.get("label")
        if label_B is not None and bool(((label_B != 0) & (label_B != 1)).any()):
            wrong = label_B[(label_B != 0) & (label_B != 1)][0]
            raise ValueError(f"{name}: the label {float(wrong):g} of a batch is not 0 or 1: correct the data.")

    # Evaluation

    @override
    def on_test_start(self) -> None:
        """Count the clicks of users and items in training."""
        rows = self.data.dataset("train") if hasattr(self.data, "dataset") else None
        self._rates = None
        if rows is not None and len(rows):
            self._rates = ClickRates(*(rows.column(name) for name in ("user_id", "item_id", "label")))

    @override
    def _evaluate(self, stage: str, batch: Mapping[str, Tensor], auc: BinaryAUROC, log_loss: Mean) -> Tensor:
        logit_B = super()._evaluate(stage, batch, auc, log_loss)
        counts_B = batch["index"] >= 0
        label_B = batch["label"][counts_B].long()
        gauc = self.test_gauc if stage == "test" else self.val_gauc
        gauc.update(logit_B[counts_B], label_B, batch.get("user", batch["user_id"])[counts_B])
        if stage == "test" and self._rates is not None:
            score_B = self._rates(batch["user_id"], batch["item_id"])[counts_B]
            self.rates_auc.update(score_B.sigmoid(), label_B)
        return logit_B

    def _log_groups(self, stage: str, gauc: GroupedAUC) -> None:
        found = gauc.compute()
        names = {"auc": "gauc", "groups": "gauc_users", "left_out": "gauc_left_out"}
        self.log_dict({f"{stage}/{names[key]}": value for key, value in found.items()}, sync_dist=False)
        gauc.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_groups("val", self.val_gauc)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_groups("test", self.test_gauc)
        if self._rates is not None:
            rates = self.rates_auc.compute()
            self.log("test/rates_auc", rates)
            rank_zero_info(f"AUC of the popularity of items and the mean of users alone: {float(rates):.4f}.")
            self.rates_auc.reset()

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Probability of a click for each row, and the vectors that :meth:`score` makes it of.

        ``{"index", "probability", "user_id", "item_id", "user_vectors" (B, N, D), "item_vector" (B, D)}``, ``"label"`` if known.
        """
        user_BND, item_BD = self.encode(batch["behaviors"], batch["item"])
        logit_B = self.calibrated(self.score(user_BND, item_BD, batch), batch)
        found = {**{key: batch[key] for key in ("index", "user_id", "item_id")}, "probability": logit_B.sigmoid()}
        if user_BND.shape[-1]:
            found |= {"user_vectors": user_BND.float(), "item_vector": item_BD.float()}
        if "label" in batch:
            found["label"] = batch["label"].long()
        return {key: value[batch["index"] >= 0] for key, value in found.items()}
