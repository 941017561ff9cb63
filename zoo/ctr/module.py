"""Lightning modules that predict clicks: wiring only."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC
from typing_extensions import override

from zoo.base.checkpoint import check_weights, read_plain
from zoo.base.hyperparameters import class_path
from zoo.base.random import SampleRandom
from zoo.ctr.click_network import ClickNetwork
from zoo.ctr.dcn import DCNNetwork
from zoo.ctr.dlrm import DLRMNetwork
from zoo.ctr.dlrm_weights import dlrm_arguments
from zoo.ctr.xdeepfm import XDeepFMNetwork
from zoo.metrics.mean_and_error import Mean
from zoo.module import ZooModule
from zoo.nn.row_lookup import LocalRows, places
from zoo.nn.row_optimizers import RowsAndRest, row_groups, takes_sparse
from zoo.strategy_contract import row_link

__all__ = ["DCN", "DLRM", "ClickModule", "XDeepFM"]


class ClickModule(ZooModule):
    """The base of models that predict clicks; a subclass builds the network.

    Batches are dictionaries ``{"sparse": int64 (B, F), "dense": float (B, N), "label": float (B,), "index": int64 (B,)}``;
    ``index``, the number of the row in its data set, seeds its random draws, so that results do not depend on the division of
    rows into batches and among processes (absent: its place in the epoch does). Where there is ``log_odds``, float (B,), it is
    added to the logits of evaluation, to undo the sampling of training rows; rows of index -1 do not count there.

    The loss is the binary cross-entropy, its mean over the batch. Logged are ``train/loss``, and of validation and test
    ``log_loss`` (the same mean over all rows, in nats) and ``auc`` (area under the receiver operating characteristic).

    Args:
        network: Scores rows.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the schedule, stepped each step.
        compile: Compile the network.
        row_optimizer: Makes an optimizer of its own for tables, such as `zoo.nn.row_optimizers.RowAdagrad`. One that takes sparse
            gradients gets them, of the rows of a step only, in meta learning and where the strategy ``hybrid`` divides tables.
    """

    def __init__(
        self,
        network: ClickNetwork,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        row_optimizer: OptimizerCallable | None = None,
    ) -> None:
        both = optimizer if row_optimizer is None else partial(RowsAndRest, rows=row_optimizer, rest=optimizer)
        super().__init__(optimizer=both, lr_scheduler=lr_scheduler, compile=compile)
        self._rows_apart = row_optimizer is not None
        self._sparse_rows = False
        self.network = network
        self.val_auc, self.test_auc = BinaryAUROC(), BinaryAUROC()
        self.val_log_loss, self.test_log_loss = Mean(), Mean()

    @classmethod
    def given(cls, field_dims: list[int] | None) -> list[int]:
        """The fields of categories.

        Raises:
            ValueError: If they are missing.
        """
        if field_dims is None:
            raise ValueError(
                f"{cls.__name__}: field_dims is missing: give the number of ids of each field of categories, which"
                " DataModules such as Flights and Criteo have as field_dims."
            )
        return field_dims

    @override
    def setup(self, stage: str) -> None:
        """Compare the columns of model and data before anything runs.

        Raises:
            ValueError: If they differ.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        dims = getattr(data, "field_dims", None)
        if dims is None:
            return
        num_dense = getattr(data, "num_dense", 0)
        if tuple(dims) != self.network.field_dims or num_dense != self.network.num_dense:
            raise ValueError(
                f"The model is built for field_dims={list(self.network.field_dims)} and num_dense={self.network.num_dense}, but"
                f" {type(data).__name__} has others: give --model.field_dims '{list(dims)}' --model.num_dense {num_dense}."
            )

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check a batch before it leaves the CPU: an id beyond its field would be another field's.

        Raises:
            ValueError: If the batch has other columns than the model, or an id outside of its field.
        """
        if isinstance(batch, Mapping):  # a strategy that gives several batches at once gives each of them to `check`
            self.check(batch)
        return batch

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that does not fit the network.

        Raises:
            ValueError: If it has other columns, or an id outside of its field.
        """
        dims, num_dense = self.network.field_dims, self.network.num_dense
        missing = {"sparse", "dense"} - batch.keys()
        if missing or batch["sparse"].shape[1:] != (len(dims),) or batch["dense"].shape[1:] != (num_dense,):
            found = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
            raise ValueError(
                f"{type(self).__name__} needs batches with sparse (B, {len(dims)}) and dense (B, {num_dense}), as the DataModules"
                f" Flights and Criteo give them, not {found}."
            )
        ids_BF = batch["sparse"]
        outside_F = ((ids_BF < 0) | (ids_BF >= torch.tensor(dims, device=ids_BF.device))).any(dim=0)
        if bool(outside_F.any()):
            field = int(outside_F.nonzero()[0])
            column = ids_BF[:, field]
            raise ValueError(
                f"Field {field} of the batch has ids from {int(column.min())} to {int(column.max())}, the model has"
                f" {dims[field]} for it: build it with the field_dims of the data."
            )

    @override
    def load_official(self, path: str | Path) -> None:
        """Load weights of the network's published code: DLRM's, TorchRec's.

        Raises:
            ValueError: If the network has none, or the file's are not of its shapes.
        """
        weights = self.network.from_official(read_plain(path))
        check_weights(self.network, weights, str(path))
        self.network.load_state_dict(weights)

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """All parameters; tables in a group of their own where they have an optimizer of their own."""
        groups = super().parameter_groups()
        return row_groups(self.row_tables().values(), groups) if self._rows_apart else groups

    @override
    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        optimizer = found["optimizer"] if isinstance(found, dict) else found
        self._sparse_rows = isinstance(optimizer, RowsAndRest) and takes_sparse(optimizer.parts[0])
        return found

    def row_tables(self) -> dict[str, torch.nn.Parameter]:
        """Tables of categories, which a strategy may divide by rows; see `zoo.strategy_contract.HasRows`."""
        return self.network.row_tables()

    def forward(self, batch: Mapping[str, Tensor], drawn: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B,) of a batch."""
        link = LocalRows() if self._trainer is None else row_link(self.trainer.strategy)
        if isinstance(link, LocalRows):
            logit_B: Tensor = self.network(batch["sparse"], batch["dense"], drawn)
            return logit_B
        numbers_BF = self.network.row_numbers(batch["sparse"])
        rows = link.fetch(self.row_tables(), [numbers_BF], self._sparse_rows)
        return self.network.run_on_rows(rows.values, places(rows.ids_U, numbers_BF), batch["dense"], drawn)

    def calibrated(self, logit_B: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (B,), float32, with ``log_odds`` added, for evaluation."""
        return logit_B.float() + batch["log_odds"].float() if "log_odds" in batch else logit_B.float()

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean binary cross-entropy of a batch."""
        logit_B = self(batch, self.network.draw(self._random(batch)))
        loss = binary_cross_entropy_with_logits(logit_B, batch["label"].to(logit_B.dtype))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logit_B))
        return loss

    def _random(self, batch: Mapping[str, Tensor]) -> SampleRandom:
        """Random numbers of the rows of a training batch, whichever process has them."""
        if "index" not in batch:
            return self.train_random(len(batch["label"]))
        epoch = 0 if self._trainer is None else self.trainer.current_epoch
        return SampleRandom(self.random_seed, batch["index"], epoch=epoch)

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """AUC and log loss of a validation batch."""
        self._evaluate("val", batch, self.val_auc, self.val_log_loss)

    @override
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """AUC and log loss of a test batch."""
        self._evaluate("test", batch, self.test_auc, self.test_log_loss)

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor], auc: BinaryAUROC, log_loss: Mean) -> Tensor:
        """Add a batch to the metrics; returns its logits."""
        logit_B = self.calibrated(self(batch), batch)
        counts_B = batch["index"] >= 0 if "index" in batch else torch.ones_like(logit_B, dtype=torch.bool)
        label_B = batch["label"][counts_B]
        auc.update(logit_B[counts_B].sigmoid(), label_B.long())
        log_loss.update(binary_cross_entropy_with_logits(logit_B[counts_B], label_B.float(), reduction="none"))
        self.log_dict({f"{stage}/auc": auc, f"{stage}/log_loss": log_loss}, prog_bar=True, batch_size=len(logit_B))
        return logit_B

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Probability of a click for each row: ``{"index", "probability"}``, and ``"label"`` (0 or 1) if it is known."""
        found = {"index": batch["index"], "probability": self.calibrated(self(batch), batch).sigmoid()}
        return {**found, "label": batch["label"].long()} if "label" in batch else found


class XDeepFM(ClickModule):
    """Predicts clicks from categories and numbers: linear term, compressed interaction network (CIN), hidden layers (DNN).

    Args:
        field_dims: Number of ids of each field of categories, ``list(data.field_dims)``. The command line takes it from the
            data if it is left out.
        num_dense: Numbers of a row; likewise, and 0 in Python.
        embed_dim: Size of a field's vector.
        cin: Feature maps of each layer of the CIN.
        dnn: Width of each hidden layer.
        dropout: Dropout after each hidden layer; published without.
        optimizer: Makes the optimizer; the published L2 penalty of 1e-4 is Adam's ``weight_decay``.
        **kwargs: Arguments of `ClickModule`.

    Raises:
        ValueError: If ``field_dims`` is missing, a size is less than 1, or dropout outside [0, 1).
    """

    def __init__(
        self,
        field_dims: list[int] | None = None,
        num_dense: int | None = None,
        embed_dim: int = 10,
        cin: Sequence[int] = (200, 200, 200),
        dnn: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        network = XDeepFMNetwork(self.given(field_dims), num_dense or 0, embed_dim, cin, dnn, dropout)
        super().__init__(network=network, optimizer=optimizer, **kwargs)


class DCN(ClickModule):
    """Predicts clicks from categories and numbers with DCN-v2: cross layers, then hidden layers.

    Args:
        field_dims: As of `XDeepFM`.
        num_dense: As of `XDeepFM`.
        embed_dim: Size of a field's vector.
        num_cross: Number of cross layers.
        dnn: Width of each hidden layer.
        dropout: Dropout after each hidden layer.
        optimizer: Makes the optimizer.
        **kwargs: Arguments of `ClickModule`.

    Raises:
        ValueError: If ``field_dims`` is missing, or a size is out of range.
    """

    def __init__(
        self,
        field_dims: list[int] | None = None,
        num_dense: int | None = None,
        embed_dim: int = 10,
        num_cross: int = 3,
        dnn: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        network = DCNNetwork(self.given(field_dims), num_dense or 0, embed_dim, num_cross, dnn, dropout)
        super().__init__(network=network, optimizer=optimizer, **kwargs)


class DLRM(ClickModule):
    """Predicts clicks from categories and numbers with DLRM: products of all pairs of vectors, the numbers' among them.

    Args:
        field_dims: As of `XDeepFM`.
        num_dense: As of `XDeepFM`.
        embed_dim: Size of a field's vector.
        bottom: Width of each hidden layer between the numbers and their vector.
        top: Width of each hidden layer behind the products.
        dropout: Dropout after each hidden layer of ``top``; published without.
        optimizer: Makes the optimizer.
        **kwargs: Arguments of `ClickModule`.

    Raises:
        ValueError: If ``field_dims`` is missing, or a size is out of range.
    """

    def __init__(
        self,
        field_dims: list[int] | None = None,
        num_dense: int | None = None,
        embed_dim: int = 16,
        bottom: Sequence[int] = (512, 256, 64),
        top: Sequence[int] = (512, 256),
        dropout: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        **kwargs: Any,
    ) -> None:
        network = DLRMNetwork(self.given(field_dims), num_dense or 0, embed_dim, bottom, top, dropout)
        super().__init__(network=network, optimizer=optimizer, **kwargs)

    @classmethod
    @override
    def infer_official_config(cls, path: str | Path) -> dict[str, Any] | None:
        """The model of a checkpoint of DLRM's published code, or of TorchRec's DLRM."""
        found = read_plain(path) if Path(path).is_file() else None
        arguments = dlrm_arguments(found) if isinstance(found, Mapping) else None
        return None if arguments is None else {"class_path": class_path(cls), "init_args": arguments}
