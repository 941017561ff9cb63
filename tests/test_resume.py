"""An interrupted run continues as if nothing had happened: losses, weights, averages and logs are those of a whole run."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import warm_python
import yaml
from test_cli import CONFIG

from zoo.__main__ import main
from zoo.base.checkpoint import read_checkpoint

INTERRUPT = """
import os
from pathlib import Path
import lightning


class Interrupt(lightning.Callback):
    '''Ends the process once, in the way and at the moment asked for.'''

    def __init__(self, step: int, how: int) -> None:
        self.step = step
        self.how = how

    def _now(self, trainer):
        if trainer.global_step == self.step and not Path("interrupted").exists():
            Path("interrupted").touch()
            if self.how:
                os.kill(os.getpid(), self.how)
            else:
                raise RuntimeError("out of memory, say")

    def on_train_batch_end(self, trainer, *args):
        if self.how:
            self._now(trainer)

    def on_before_backward(self, trainer, *args):
        if not self.how:
            self._now(trainer)
"""


def curve(run: str) -> list[str]:
    return Path(f"runs/{run}/metrics.csv").read_text().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for runs of 2.5 epochs."""
    path = tmp_path_factory.mktemp("resume")
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(path)
    Path("interrupt.py").write_text(INTERRUPT)
    sys.path.insert(0, str(path))
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 20}, "checkpoint": {"every_n_steps": 3}}
    Path("whole.yaml").write_text(yaml.safe_dump(config))
    yield path
    sys.path.remove(str(path))
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)


def uninterrupted(workers: int, accumulate: int) -> str:
    """The name of a whole run, which is made when a test first asks for it."""
    name = f"whole_{workers}_{accumulate}"
    if not Path(f"{name}.yaml").exists():
        Path(f"{name}.yaml").write_text(Path("whole.yaml").read_text())
        assert main(options(name, workers, accumulate)) == 0
    return name


@pytest.mark.slow
def test_an_epoch_without_validation_ends_and_resumes(folder):
    """The last batch of an epoch after which no validation is due: the steps after it keep their numbers."""
    for name, stop in (("sparse_whole", "20"), ("sparse_cut", "8")):
        Path(f"{name}.yaml").write_text(Path("whole.yaml").read_text())
        command = [*options(name, 0, 1), "--trainer.check_val_every_n_epoch", "2", "--checkpoint.every_n_steps", "8"]
        assert main([stop if word == "20" else word for word in command]) == 0
        assert main(command) == 0
    assert curve("sparse_cut") == curve("sparse_whole")


def options(name: str, workers: int, accumulate: int) -> list[str]:
    steps = ["--trainer.max_steps", str(20 // accumulate), "--trainer.accumulate_grad_batches", str(accumulate)]
    return ["fit", "-c", f"{name}.yaml", "--ckpt_path", "last", "--data.num_workers", str(workers), *steps]


@pytest.mark.parametrize(
    ("how", "step", "workers", "accumulate"),
    [
        (signal.SIGKILL, 13, 2, 1),  # in the middle of the second epoch, with worker processes
        (signal.SIGTERM, 11, 0, 1),
        (0, 13, 0, 1),  # an exception inside the step: its batch was fetched and not applied
        pytest.param(0, 5, 0, 2, marks=pytest.mark.slow),  # the same, in an accumulated step
        pytest.param(0, 8, 0, 1, marks=pytest.mark.slow),  # at the start of an epoch
    ],
)
def test_the_curve_continues_as_if_never_interrupted(folder, how, step, workers, accumulate):
    whole = uninterrupted(workers, accumulate)
    name = f"cut_{int(how)}_{step}_{workers}_{accumulate}"
    Path(f"{name}.yaml").write_text(Path("whole.yaml").read_text())
    Path("interrupted").unlink(missing_ok=True)
    command = options(name, workers, accumulate)
    command += ["--trainer.callbacks+", "interrupt.Interrupt", "--trainer.callbacks.step", str(step)]
    command += ["--trainer.callbacks.how", str(int(how))]
    if how:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with Path("wrote").open("w") as file:  # workers of a killed process would hold a pipe for seconds
            process = warm_python.Popen([sys.executable, "-m", "zoo", *command], env=environment, stdout=file, stderr=file)
            status = process.wait(120)
        assert status == (143 if how == signal.SIGTERM else -9), Path("wrote").read_text()[-2000:]
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            main(command)
    cut = read_checkpoint(f"runs/{name}/checkpoints/last.ckpt")
    assert cut["global_step"] == (12 if how == signal.SIGKILL else step)  # saved every 3 steps, and at any other end
    assert main(command) == 0

    assert curve(name) == curve(whole)
    a, b = (read_checkpoint(f"runs/{run}/checkpoints/last.ckpt") for run in (name, whole))
    for key in ("state_dict", "current_model_state"):  # the average and the weights themselves
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][n], b[key][n]) for n in a[key])
    for x, y in zip(a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True):
        assert torch.equal(x["exp_avg_sq"], y["exp_avg_sq"])


def test_a_run_killed_before_its_first_checkpoint_starts_anew(folder):
    Path("early.yaml").write_text(Path("whole.yaml").read_text())
    command = options("early", 0, 1)
    assert main([word if word != "20" else "2" for word in command]) == 0
    shutil.rmtree("runs/early/checkpoints")  # what SIGKILL at this moment leaves: a log
    assert main(command) == 0
    assert curve("early") == curve(uninterrupted(0, 1))


def test_another_seed_is_announced(folder):
    command = [word if word != "20" else "22" for word in options(uninterrupted(0, 1), 0, 1)]
    with pytest.warns(UserWarning, match="was trained with seed 0, this run has seed 5"):
        assert main([*command, "--seed_everything", "5"]) == 0
