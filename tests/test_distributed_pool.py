"""The pool of gloo ranks: right results, the real traceback, no hang and no orphan."""

import os
import select
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import lightning
import pytest
import torch
from distributed import MAX_RANKS, RankError, RankPool
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Seen:
    """A class of a test file, to show that it pickles both ways."""

    rank: int
    total: torch.Tensor
    process: int


def reduce_ranks(offset: torch.Tensor) -> Seen:
    total = offset + distributed.get_rank()
    distributed.all_reduce(total)
    return Seen(distributed.get_rank(), total, os.getpid())


def fail_on_rank_1(kind: str) -> None:
    if distributed.get_rank() == 1:
        print("on the way out")
        if kind == "raise":
            raise KeyError("the real reason")
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def hang_on_rank_1() -> None:
    if distributed.get_rank() == 1:
        threading.Event().wait()


def leave_a_mess() -> None:
    os.environ["MESS"] = "left"
    torch.set_default_dtype(torch.float64)


def mess() -> tuple[str | None, torch.dtype, str]:
    return os.environ.get("MESS"), torch.get_default_dtype(), os.environ["FROM_PARENT"]


def make_lock() -> object:
    return threading.Lock()


class Line(lightning.LightningModule):
    """y = w x, fitted to y = 3 x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return ((self.weight - 3.0) * batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_line(folder: Path) -> tuple[str, int, float]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Line()
    trainer.fit(model, DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4))
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    return type(environment).__name__, trainer.global_step, model.weight.item()


def orphan_two_ranks(note: str) -> None:
    """Rank 0 starts a pool of its own and is killed with it still open."""
    if distributed.get_rank() == 0:
        seen = RankPool().run(reduce_ranks, torch.zeros(1))
        Path(note).write_text(" ".join(str(one.process) for one in seen))
        os.kill(os.getpid(), signal.SIGKILL)


def test_all_reduce_over_different_world_sizes_shares_the_processes(pool: RankPool) -> None:
    two = pool.run(reduce_ranks, torch.tensor([10.0]))
    three = pool.run(reduce_ranks, torch.tensor([10.0]), world_size=3)
    one = pool.run(reduce_ranks, offset=torch.tensor([10.0]), world_size=1)
    assert [seen.total.item() for seen in two] == [21.0, 21.0]
    assert [seen.total.item() for seen in three] == [33.0, 33.0, 33.0]
    assert [seen.total.item() for seen in one] == [10.0]
    assert [seen.rank for seen in three] == [0, 1, 2]
    assert [seen.process for seen in two] == [seen.process for seen in three[:2]]
    assert one[0].process == two[0].process


def test_failure_shows_the_traceback_of_the_rank_that_raised(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(fail_on_rank_1, "raise")
    text = str(caught.value)
    assert text.startswith("rank 1 of 2 failed in test_distributed_pool.py::fail_on_rank_1:\nTraceback")
    assert 'raise KeyError("the real reason")' in text
    assert "on the way out" in text
    assert "rank 0" not in text


def test_time_out_names_function_rank_and_stack_and_the_next_call_works(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(hang_on_rank_1, timeout=2.5)  # in which rank 0 has to have answered
    text = str(caught.value)
    assert "test_distributed_pool.py::hang_on_rank_1 did not answer within 2.5 s on rank 1 of 2" in text
    assert "in hang_on_rank_1" in text
    assert "written by rank 0" not in text
    assert [seen.total.item() for seen in pool.run(reduce_ranks, torch.zeros(1))] == [1.0, 1.0]


def test_stopped_rank_cannot_hang_the_run(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[RankPool.__module__], "GRACE_S", 0.5)
    process = pool.run(reduce_ranks, torch.zeros(1))[1].process
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(RankError, match=r"within 0\.5 s on rank 0, 1 of 2"):
        pool.run(reduce_ranks, torch.zeros(1), timeout=0.5)
    assert process not in [seen.process for seen in pool.run(reduce_ranks, torch.zeros(1))]


def test_dead_rank_is_named_and_replaced(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"^rank 1 of 2 died in .*fail_on_rank_1: killed by SIGKILL\.\n.*\non the way"):
        pool.run(fail_on_rank_1, "die")
    seen = pool.run(reduce_ranks, torch.zeros(1))
    os.kill(seen[0].process, signal.SIGKILL)
    for_exit = select.poll()
    for_exit.register(pool._ranks[0].process.sentinel, select.POLLIN)
    assert for_exit.poll(10_000)
    assert [one.total.item() for one in pool.run(reduce_ranks, torch.zeros(1))] == [1.0, 1.0]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="not measured: needs Linux's pidfd to wait for foreign processes")
def test_ranks_exit_when_the_parent_dies(pool: RankPool, tmp_path: Path) -> None:
    note = tmp_path / "processes"
    with pytest.raises(RankError, match="rank 0 of 2 died"):
        pool.run(orphan_two_ranks, str(note))
    processes = [int(word) for word in note.read_text().split()]
    assert len(processes) == 2
    for process in processes:
        try:
            handle = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        for_exit = select.poll()
        for_exit.register(handle, select.POLLIN)
        assert for_exit.poll(10_000), f"rank {process} outlived its parent"
        os.close(handle)


def test_calls_start_clean_and_see_the_environment_of_the_test(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.run(leave_a_mess)
    monkeypatch.setenv("FROM_PARENT", "seen")
    assert pool.run(mess) == [(None, torch.float32, "seen")] * 2


def test_lightning_joins_the_group_and_launches_nothing(pool: RankPool, tmp_path: Path) -> None:
    (name_0, steps_0, weight_0), (name_1, steps_1, weight_1) = pool.run(fit_line, tmp_path)
    assert name_0 == name_1 == "TorchElasticEnvironment"
    assert steps_0 == steps_1 == 1
    # Each rank sees four of x = 0..7; the step follows the mean gradient over both.
    assert weight_0 == weight_1 == pytest.approx(0.1 * 2.0 * 3.0 * torch.arange(8.0).square().mean().item())


def test_bad_calls_are_refused_before_any_rank_is_asked(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="between 1 and 8, got 9"):
        pool.run(reduce_ranks, torch.zeros(1), world_size=MAX_RANKS + 1)
    with pytest.raises(ValueError, match="top of its file"):
        pool.run(lambda: None)
    with pytest.raises(TypeError, match="pickle"):
        pool.run(reduce_ranks, threading.Lock())


def test_result_that_cannot_travel_is_a_clear_error(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)failed in .*make_lock.*cannot pickle '_thread.lock'"):
        pool.run(make_lock)
