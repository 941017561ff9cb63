"""A rank is killed under real torchrun: the group starts again, and goes on where it was."""

import json
import os
import sys
from pathlib import Path

import pytest
import warm_python

from zoo.base.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent

KILL = """
import os
import signal

import lightning


class Kill(lightning.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5 and trainer.global_rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_rank_costs_what_was_not_saved_and_no_sample(tmp_path: Path) -> None:
    (tmp_path / "kill.py").write_text(KILL)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone", "-m", "zoo"]
    options = {
        "--trainer.accelerator": "cpu", "--trainer.callbacks+": "kill.Kill", "--trainer.max_steps": "8",
        "--checkpoint.every_n_steps": "3", "--data.batch_size": "128", "--trainer.enable_progress_bar": "false",
    }  # fmt: skip
    words = [word for pair in options.items() for word in pair]
    command = [sys.executable, "-m", *torchrun, "fit", "-c", "bfn/digits", "-c", "strategies/antdt", *words]
    done = warm_python.run(command, cwd=tmp_path, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "bfn" / "digits"
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 8
    batch = checkpoint["antdt"]["global_batch"]
    steps = -(-checkpoint["antdt"]["ledger"]["n"] // batch)
    assert checkpoint["antdt"]["ledger"]["consumed"] == (8 % steps) * batch
    events = [json.loads(line) for line in (run / "antdt" / "events.jsonl").read_text().splitlines()]
    assert {event["gen"] for event in events if event["kind"] == "generation"} >= {1, 2}
    restored = [event["consumed"] for event in events if event["kind"] == "restore"]
    assert restored == [0, 3 * batch], "it goes on from the checkpoint of the third step, though none was asked for"
