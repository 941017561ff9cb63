"""The README's line for many processes, typed as it stands there: torchrun's own code and the command line, in warm processes."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
import warm_python

from zoo.base.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent
SHORT = ["--trainer.limit_val_batches", "2"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


TERMINATE = """
import os
import signal

import lightning


class Terminate(lightning.Callback):
    # A batch system, or somebody at a terminal, that stops the job: torchrun itself is told to end.

    def __init__(self, name: str) -> None:
        self.number = signal.Signals[name]

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4 and trainer.is_global_zero:
            os.kill(os.getppid(), self.number)
            while not trainer.checkpoint_callback._told_to_stop:  # small models take many steps until they hear of it
                os.sched_yield()
"""


def fit(folder: Path, what: str, launcher: list[str], *options: str, ends_well: bool = True) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", folder))), "OMP_NUM_THREADS": "1"}
    common = ["--trainer.log_every_n_steps", "1", *SHORT, *QUIET]
    command = [sys.executable, "-m", *launcher, "fit", *MODELS[what], *common, *options]
    done = warm_python.run(command, cwd=folder, env=environment, timeout=200)
    assert (done.returncode == 0) is ends_well, done.stderr[-3000:]


def num_losses(folder: Path, what: str) -> int:
    column = {"tiny": "loss", "bfn/digits": "train_loss"}[what]
    with (folder / "runs" / what / "metrics.csv").open() as file:
        return sum(bool(row[column]) for row in csv.DictReader(file))


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "zoo"]
SHARED = ["-c", "strategies/ddp", "--ckpt_path", "last"]
#: What is trained, and the option that halves its batch.
MODELS = {
    "tiny": ["--model", "tiny.Tiny", "--model.net", "tiny.MLP", "--model.net.dropout", "0", "--data", "tiny.TinyData"],
    "bfn/digits": ["-c", "bfn/digits"],
}
HALF = {"tiny": "4", "bfn/digits": "128"}


def stopped_by(folder: Path, what: str, signal: str) -> int:
    """The step at which a run was saved that the signal has stopped."""
    (folder / "terminate.py").write_text(TERMINATE)
    stop = ["--trainer.callbacks+", "terminate.Terminate", "--trainer.callbacks.name", signal]
    never = ["--checkpoint.every_n_steps", "1000", "--checkpoint.minutes", "null"]  # only the signal saves
    half = ["--data.batch_size", HALF[what]]
    fit(folder, what, TORCHRUN, *SHARED, *half, *stop, *never, "--trainer.max_steps", "1000", ends_well=False)
    return read_checkpoint(folder / "runs" / what / "checkpoints/last.ckpt")["global_step"]


@pytest.mark.slow
def test_interrupt_at_the_terminal_saves(tmp_path):
    assert 4 <= stopped_by(tmp_path, "bfn/digits", "SIGINT") < 8


@pytest.mark.parametrize("what", ["tiny", pytest.param("bfn/digits", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_resume_after_sigterm(tmp_path, what):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    fit(one, what, ["zoo"], "--trainer.max_steps", "8")
    assert 4 <= stopped_by(two, what, "SIGTERM") < 8
    fit(two, what, TORCHRUN, *SHARED, "--data.batch_size", HALF[what], "--trainer.max_steps", "8")
    # Lightning logs the loss of rank 0; the sum of steps is compared through the weights.
    assert num_losses(two, what) == num_losses(one, what) == 8
    states = [read_checkpoint(folder / "runs" / what / "checkpoints/last.ckpt") for folder in (one, two)]
    a, b = (state.get("current_model_state", state["state_dict"]) for state in states)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-5), name


OBSERVED = """
import os
import time
from pathlib import Path

import tiny
import zoo.cli.command

archive_run = zoo.cli.command.archive_run


def slowly(folder):
    time.sleep(1)
    return archive_run(folder)


zoo.cli.command.archive_run = slowly


class Observed(tiny.Tiny):
    # Says whether the earlier run lies in the folder when Lightning begins, long before there is a process group.

    def configure_callbacks(self):
        Path(f"seen_{os.environ['RANK']}").write_text(str(Path("runs/observed/metrics.csv").exists()))
        return super().configure_callbacks()
"""


def test_no_process_begins_before_the_earlier_run_is_out_of_the_way(tmp_path):
    (tmp_path / "watch.py").write_text(OBSERVED)
    (tmp_path / "runs/observed").mkdir(parents=True)
    (tmp_path / "runs/observed/metrics.csv").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "zoo"]
    options = ["--model", "watch.Observed", "--model.net", "tiny.MLP", "--data", "tiny.TinyData", "--trainer.max_steps", "1"]
    command = [sys.executable, "-m", *torchrun, "fit", *options, "--trainer.strategy", "ddp", *QUIET]
    done = warm_python.run(command, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"seen_{rank}").read_text() for rank in (0, 1)] == ["False", "False"]
    assert (tmp_path / "runs/observed/earlier/0/metrics.csv").exists()


FAILS = """
import os

import tiny


class Fails(tiny.Tiny):
    # Ends each start by an exception at its first batch, but the first, if it may take a step, without a word.

    def __init__(self, steps: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.steps = steps

    def training_step(self, batch, batch_idx):
        if batch_idx == self.steps or os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
            if self.steps and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(1)
            raise ValueError("wrong data")
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
def test_an_earlier_run_is_put_back_after_the_last_start_if_none_has_trained(tmp_path, steps):
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "runs/fails/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/fails/checkpoints/last.ckpt").write_text("the earlier run")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    torchrun = ["torch.distributed.run", "--nproc-per-node", "1", "--max-restarts", "1", "--standalone", "-m", "zoo"]
    options = ["--model", "fails.Fails", "--model.net", "tiny.MLP", "--data", "tiny.TinyData", "--model.steps", str(steps)]
    command = [sys.executable, "-m", *torchrun, "fit", *options, "--trainer.log_every_n_steps", "1", *QUIET]
    done = warm_python.run(command, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode and done.stderr.count("ValueError: wrong data") >= 1, done.stderr[-3000:]
    moved, back = (
        word in done.stderr for word in ("the earlier one moved to runs/fails/earlier/0", "the earlier run is back in")
    )
    assert moved and back == (steps == 0)
    place = "runs/fails/checkpoints" if back else "runs/fails/earlier/0/checkpoints"
    assert (tmp_path / place / "last.ckpt").read_text() == "the earlier run"
    assert (tmp_path / "runs/fails/earlier").exists() != back
