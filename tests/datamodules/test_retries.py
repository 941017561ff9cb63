"""Samples that are put back come exactly once more, whatever the ranks, workers, epochs and interruptions."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from sweep import sweep_tuples
from torch.utils.data import Dataset

from datamodules.base.datamodule import ZooDataModule
from datamodules.base.loader import ResumableLoader, epoch_generator
from datamodules.base.retry_queue import RetryQueue


class Rows(Dataset):
    """Batches ``{"index"}``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(index)}


def loader(batch_size=4, rank=0, world=1, num_workers=0, length=42) -> ResumableLoader:
    module = ZooDataModule(batch_size=batch_size, num_workers=num_workers, seed=3)
    module.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        current_epoch=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return module.train_loader(Rows(length), mark_retries=True)


PLAN = {(0, 1): 2, (0, 4): 3, (0, 9): 3, (1, 0): 6, (1, 5): 40, (2, 9): 1}
"""Batches, as (epoch, number of the batch), whose samples are put back, and over how many batches they are scattered."""
EPOCHS = 5

Step = tuple[int, int, list[int], list[bool]]


def train(one: ResumableLoader, start: int = 0, stop: int = EPOCHS * 10, lead: int = 2, put_back: list[Step] | None = None):
    """The steps (epoch, number, ids, which were put back) number ``start`` to ``stop - 1``, and the state behind them.

    Args:
        put_back: The steps of one process, whose batches are put back instead of this rank's, as all ranks do together.
    """
    steps: list[Step] = []
    for epoch in range(start // 10, EPOCHS):
        one.sampler.epoch_counter = lambda epoch=epoch: epoch
        for number, batch in enumerate(one, start=max(0, start - 10 * epoch)):
            steps.append((epoch, number, batch["index"].tolist(), batch["retried"].tolist()))
            if (epoch, number) in PLAN:
                ids = (put_back[10 * epoch + number] if put_back else steps[-1])[2]
                one.requeue(ids, PLAN[epoch, number], seed_key=number, lead=lead)
            if 10 * epoch + number == stop - 1:
                return steps, json.loads(json.dumps(one.state_dict()))
    raise AssertionError(f"the loader ended before step {stop}")


def test_every_sample_comes_once_an_epoch_and_once_for_each_time_it_was_put_back():
    steps, state = train(loader())
    assert len(steps) == EPOCHS * 10, "epochs keep their length, which the training loop was told"
    plain = loader()
    due: Counter[int] = Counter()
    for epoch in range(EPOCHS):
        plain.sampler.set_epoch(epoch)
        plain.sampler.epoch_counter = None
        due.update(index for batch in plain for index in batch["index"].tolist())
    put_back = Counter(index for epoch, number, ids, _ in steps if (epoch, number) in PLAN for index in ids)
    seen = Counter(index for _, _, ids, _ in steps for index in ids)
    retries = Counter(index for _, _, ids, marks in steps for index, mark in zip(ids, marks, strict=True) if mark)
    queue = RetryQueue()
    queue.load_state_dict(state["retries"])
    queue.turn(plain.sampler.order(EPOCHS - 1), state["samples"])
    later = queue.state_dict()
    assert seen + Counter(later["carried"]) + Counter(later["ids"]) == due + put_back
    assert retries + Counter(later["ids"]) == put_back
    assert len(later["ids"]) < sum(put_back.values()), "most have come"


def test_retries_come_in_the_window_behind_the_lead():
    steps, _ = train(loader())
    _, number, ids, _ = steps[1]
    places = [place for place, (_, _, seen, marks) in enumerate(steps[:10]) for i, m in zip(seen, marks, strict=True) if m]
    assert sum(2 + number + 1 <= place < 2 + number + 1 + 2 for place in places) >= len(ids)
    assert min(places) >= 4
    assert not any(any(marks) for _, _, _, marks in steps[:4])


def test_two_ranks_share_what_one_sees():
    one, _ = train(loader(4), stop=30, lead=4)
    ranks = [train(loader(2, rank, 2, num_workers=2 * rank), stop=30, lead=4, put_back=one)[0] for rank in range(2)]
    for (epoch, number, ids, marks), *parts in zip(one, *ranks, strict=True):
        assert {part[:2] for part in parts} == {(epoch, number)}
        assert [index for row in zip(*(part[2] for part in parts), strict=True) for index in row] == ids
        assert [mark for row in zip(*(part[3] for part in parts), strict=True) for mark in row] == marks


@pytest.mark.parametrize(
    ("stop", "workers"),
    sweep_tuples(
        [(stop, (0, 0)) for stop in (1, 2, 7, 10, 13, 20, 29, 30)] + [(7, (2, 0)), (10, (0, 2)), (13, (2, 2))],
        quick=(1, 3, 5, 7, 9),
    ),
)
def test_a_cut_run_goes_on_with_the_retries_that_were_waiting(stop, workers):
    expected, _ = train(loader(), lead=4)
    first, state = train(loader(num_workers=workers[0]), stop=stop, lead=4)
    resumed = loader(num_workers=workers[1])
    resumed.load_state_dict(state)
    iter(resumed)  # Lightning does, before it sets the epoch
    assert resumed.state_dict() == state
    last = 50 if workers[1] == 0 else 30
    second, _ = train(resumed, start=stop, stop=last, lead=4)
    assert first + second == expected[:last]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_the_stream_loses_and_doubles_nothing(data):
    length = data.draw(st.integers(1, 12))
    queue = RetryQueue()
    seen, due, put_back = Counter(), Counter(), Counter()
    for epoch in range(4):
        order = torch.randperm(length, generator=epoch_generator(0, epoch, "test")).tolist()
        given_samples = data.draw(st.integers(0, length))
        for place in range(given_samples):
            seen[queue.at(place, order)] += 1
            ids = data.draw(st.lists(st.integers(0, length - 1), max_size=3))
            first = min(place + 1 + data.draw(st.integers(0, 3)), length)
            queue.insert(ids, first, data.draw(st.integers(1, 20)), torch.Generator().manual_seed(place))
            put_back.update(ids)
        due.update(order[:given_samples])
        queue.turn(order, given_samples)
    state = queue.state_dict()
    assert seen + Counter(state["carried"]) + Counter(state["ids"]) == due + put_back
    assert state["places"] == sorted(set(state["places"]))


def test_places_are_spread_over_the_window():
    counts = torch.zeros(40)
    for key in range(400):
        queue = RetryQueue()
        queue.insert([5, 6], 10, 40, torch.Generator().manual_seed(key))
        counts[torch.tensor(queue.state_dict()["places"]) - 10] += 1
    assert counts.sum() == 800
    assert counts.min() >= 5 and counts.max() <= 45


def test_what_cannot_be_put_back_is_refused():
    ours = loader()
    with pytest.raises(ValueError, match="window is 0 and lead is 2"):
        ours.requeue([1], 0, 0, 2)
    with pytest.raises(ValueError, match=r"sample ids \[42, -1\] are not of the training set, which has the ids 0 to 41"):
        ours.requeue([1, 42, -1], 1, 0)
    with pytest.raises(ValueError, match="Only the training loader"):
        ZooDataModule(4).eval_loader(Rows(8)).requeue([1], 1, 0)
    with pytest.raises(ValueError, match="Only the training loader"):
        ResumableLoader(Rows(8), 4).requeue([1], 1, 0)


def test_positions_without_retries_read_as_before():
    ours = loader()
    next(iter(ours))
    assert ours.state_dict() == {"epoch": 0, "samples": 4, "length": 42}
    assert not ours.retried.any()


class RowData(ZooDataModule):
    def train_dataloader(self):
        return self.train_loader(Rows(22), mark_retries=True)


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[list[int], list[bool]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["index"].tolist(), batch["retried"].tolist()))
        return self.layer(batch["index"].float().unsqueeze(1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Guard(Callback):
    """Puts the batches of some steps back, and saves and ends the run after one."""

    def __init__(self, stop: int | None, path: Path) -> None:
        self.stop, self.path = stop, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in (2, 4, 5, 9):
            trainer.train_dataloader.requeue(batch["index"].tolist(), 3, trainer.global_step, lead=4)
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def fit(path: Path, stop: int | None = None, workers: int = 0, **options) -> list[tuple[list[int], list[bool]]]:
    module = Recorder()
    trainer = L.Trainer(
        default_root_dir=path.parent,
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Guard(stop, path)],
    )
    try:
        trainer.fit(module, datamodule=RowData(4, workers, seed=1), weights_only=True, **options)
    except SystemExit:
        assert stop is not None
    return module.seen


@pytest.mark.parametrize("stop", [3, 5, 10])
def test_lightning_sees_the_retries_and_resumes_with_them(stop, tmp_path):
    expected = fit(tmp_path / "whole.ckpt")
    assert len(expected) == 20
    put_back = Counter(index for step in (2, 4, 5, 9) for index in expected[step - 1][0])
    assert Counter(i for ids, marks in expected for i, mark in zip(ids, marks, strict=True) if mark) == put_back
    path = tmp_path / "cut.ckpt"
    first = fit(path, stop, workers=2 * (stop == 5))
    assert first + fit(path, ckpt_path=path) == expected
