"""xDeepFM under Lightning: what is learnt, logged and predicted, whatever the batches and processes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.distributed import get_world_size, is_initialized
from torchmetrics.functional.classification import binary_auroc

from datamodules import ZooDataModule
from datamodules.clicks.click_table import ClickRows
from zoo.ctr import DCN, DLRM, XDeepFM

DIMS = [6, 4, 9]


def rows(count: int, seed: int) -> ClickRows:
    """Rows whose label depends on the product of two fields, and on a number."""
    random = np.random.default_rng(seed)
    sparse = np.stack([random.integers(dim, size=count) for dim in DIMS], axis=1).astype(np.int32)
    dense = random.normal(size=(count, 2)).astype(np.float32)
    logit = 3.0 * (sparse[:, 0] % 2 == sparse[:, 1] % 2) - 1.5 + dense[:, 0]
    return ClickRows(sparse, dense, (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.uint8))


class Clicks(ZooDataModule):
    """Drawn rows."""

    field_dims = tuple(DIMS)
    num_dense = 2

    def __init__(self, batch_size: int = 64, train_size: int = 640) -> None:
        super().__init__(batch_size=batch_size)
        self.train, self.held_out = rows(train_size, 0), rows(301, 1)

    def train_dataloader(self) -> Any:
        return self.train_loader(self.train)

    def val_dataloader(self) -> Any:
        return self.eval_loader(self.held_out)

    test_dataloader = predict_dataloader = val_dataloader


def model(**options: Any) -> XDeepFM:
    optimizer = partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-4)
    return XDeepFM(DIMS, 2, embed_dim=4, cin=(6, 5), dnn=(16, 8), **{"dropout": 0.2, "optimizer": optimizer, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{**quiet, "max_epochs": 2, **options})


def run(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Fit, test and predict on the ranks of the present group."""
    ranks = get_world_size() if is_initialized() else 1
    torch.set_default_dtype(dtype)
    seed_everything(3, verbose=False)
    network, data = model(), Clicks(batch_size=64 // ranks)
    precision = "64-true" if dtype == torch.float64 else "32-true"
    fit = trainer(folder, devices=ranks, strategy="ddp" if ranks > 1 else "auto", precision=precision)
    fit.fit(network, data)
    (test,) = fit.test(network, data, verbose=False)
    batches = fit.predict(network, data)
    assert batches is not None
    return {
        "weights": {name: value.detach().clone() for name, value in LightningModule.state_dict(network).items()},
        "test": dict(test),
        "index": torch.cat([batch["index"] for batch in batches]),
        "probability": torch.cat([batch["probability"] for batch in batches]),
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), pytest.param(torch.float32, 1e-4, marks=pytest.mark.slow)],
    ids=["float64", "float32"],
)
def test_two_ranks_equal_one_process(pool: RankPool, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    (one,) = pool.run(run, tmp_path, dtype, world_size=1)
    two = pool.run(run, tmp_path, dtype, world_size=2)
    for rank in two:
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, one["weights"][name], rtol=tolerance, atol=tolerance)
        assert rank["test"] == pytest.approx(one["test"], rel=max(tolerance, 1e-6))
    assert sorted(torch.cat([rank["index"] for rank in two]).tolist()) == list(range(301))
    for rank in two:
        torch.testing.assert_close(rank["probability"], one["probability"][rank["index"]], rtol=tolerance, atol=1e-6)


def test_gradients_weighted_by_sizes_of_uneven_batches_are_those_of_the_whole() -> None:
    """What a strategy that balances load relies on: loss is a mean over samples, and nothing drawn depends on the batch."""
    seed_everything(0, verbose=False)
    network = model(dropout=0.5).double()
    batch: dict[str, Any] = dict(rows(48, 2).batch(list(range(48))))
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    network.training_step(batch, 0).backward()
    whole = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for part in order.split([30, 1, 17]):
        (network.training_step({name: value[part] for name, value in batch.items()}, 0) * len(part) / 48).backward()
    for parameter, expected in zip(network.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-14)


def test_it_learns_the_interaction_and_logs_what_it_is_worth(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    network, data = model(dropout=0.0), Clicks(train_size=4096)
    fit = trainer(tmp_path, max_epochs=5)
    fit.fit(network, data)
    (test,) = fit.test(network, data, verbose=False)
    batches: Any = fit.predict(network, data)
    probability, label = (torch.cat([batch[name] for batch in batches]) for name in ("probability", "label"))
    assert test["test/auc"] == pytest.approx(binary_auroc(probability, label).item(), abs=1e-6)
    log_loss = torch.nn.functional.binary_cross_entropy(probability.double(), label.double()).item()
    assert test["test/log_loss"] == pytest.approx(log_loss, abs=1e-5)
    assert test["test/auc"] > 0.8
    assert set(test) == {"test/auc", "test/log_loss"}


@pytest.mark.parametrize("kind", [DCN, DLRM])
def test_the_others_learn_it_too_and_are_rebuilt(kind: type[DCN | DLRM], tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = kind(DIMS, 2, embed_dim=4, optimizer=partial(torch.optim.Adam, lr=1e-2))
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, Clicks(train_size=4096))
    assert fit.test(module, Clicks(), verbose=False)[0]["test/auc"] > 0.75
    batch = rows(5, 3).batch(list(range(5)))
    assert torch.equal(kind.from_pretrained(module.save_pretrained(tmp_path / "shared"))(batch), module(batch))


def test_log_odds_move_logits_of_evaluation_alone_and_rows_that_fill_up_do_not_count(tmp_path: Path) -> None:
    network, batch = model(dropout=0.0).eval(), dict(rows(40, 3).batch(list(range(40))))
    sampled = {**batch, "log_odds": torch.full((40,), -1.5)}
    torch.testing.assert_close(network.predict_step(sampled, 0)["probability"], (network(batch) - 1.5).sigmoid())
    assert torch.equal(network(sampled), network(batch))
    blank = {name: torch.cat([value, value[:1]]) for name, value in sampled.items()} | {"index": torch.tensor([*range(40), -1])}
    found = []
    for some in (sampled, blank):
        network.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
        network.test_step(some, 0)
        found.append((network.test_auc.compute(), network.test_log_loss.compute()))
        network.test_auc.reset(), network.test_log_loss.reset()
    assert found[0] == found[1]


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_run_that_is_continued_inside_an_epoch_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    ends = []
    for path in (None, tmp_path / "4.ckpt"):
        seed_everything(0, verbose=False)
        network = model(dropout=0.5)
        torch.manual_seed(len(ends))  # nothing may depend on the global generator
        callbacks = [] if path else [SaveAt(4, tmp_path / "4.ckpt")]
        fit = trainer(tmp_path, max_epochs=-1, max_steps=13, callbacks=callbacks)
        fit.fit(network, Clicks(), ckpt_path=path, weights_only=True)
        ends.append(LightningModule.state_dict(network))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_checkpoint_holds_everything(tmp_path: Path) -> None:
    network = model()
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(network, Clicks())
    fit.save_checkpoint(tmp_path / "one.ckpt")
    again = XDeepFM.load_from_checkpoint(tmp_path / "one.ckpt")
    shared = XDeepFM.from_pretrained(network.save_pretrained(tmp_path / "shared"))
    batch = rows(5, 3).batch(list(range(5)))
    for other in (again, shared):
        assert torch.equal(other(batch), network(batch))
        assert other.network.dnn.dropout == 0.2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sparse": torch.tensor([[0, 4, 0]])}, r"Field 1 of the batch has ids from 4 to 4, the model has 4"),
        ({"sparse": torch.tensor([[-1, 0, 0]])}, r"Field 0 of the batch has ids from -1 to -1"),
        ({"sparse": torch.tensor([[0, 0]])}, r"needs batches with sparse \(B, 3\)"),
        ({"dense": torch.zeros(1, 3)}, r"dense \(B, 2\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    batch = {**rows(1, 0).batch([0]), **changed}
    with pytest.raises(ValueError, match=message):
        model().on_before_batch_transfer(batch, 0)


def test_data_with_other_columns_are_refused_before_the_first_step(tmp_path: Path) -> None:
    network = XDeepFM([6, 4], 0, embed_dim=2, cin=(2,), dnn=(2,))
    with pytest.raises(ValueError, match=r"--model\.field_dims '\[6, 4, 9\]' --model\.num_dense 2"):
        trainer(tmp_path).fit(network, Clicks())
