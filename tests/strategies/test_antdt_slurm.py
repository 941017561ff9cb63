"""Processes that SLURM has started, without torchrun: they train together, and end together when one cannot."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from warm_python import Popen

from strategies.antdt.service.server import TOKEN_VARIABLE, ServerThread

ROOT = Path(__file__).parents[2]
JOB = """
import sys
from pathlib import Path

import torch
from antdt_job import Noisy, RowsData, StaticBSP
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import SLURMEnvironment

from strategies import AntDTStrategy

seed_everything(3, verbose=False)
torch.set_default_dtype(torch.float64)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy=AntDTStrategy(StaticBSP(), server=sys.argv[1], global_batch_size=8), max_epochs=1,
    limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    precision="64-true", default_root_dir=Path(sys.argv[2]),
)
assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
module = Noisy()
trainer.fit(module, RowsData(rows=45))
print("seen", *[index for _, _, indices in module.seen for index in indices])
"""


def srun(folder: Path, server: str, tokens: list[str]) -> list[tuple[int, str, str]]:
    """How each task has ended, with what it has printed."""
    (folder / "job.py").write_text(JOB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = []
    for rank, token in enumerate(tokens):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
        environment |= {
            "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "train", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", TOKEN_VARIABLE: token,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        }  # fmt: skip
        command = [sys.executable, str(folder / "job.py"), server, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        tasks.append(Popen(command, cwd=folder, env=environment, **pipes))
    ended = []
    try:
        for task in tasks:
            out, err = task.communicate(timeout=100)
            ended.append((task.returncode, out, err))
    finally:
        for task in tasks:
            task.kill()
    return ended


def samples(ended: list[tuple[int, str, str]]) -> list[int]:
    """What the tasks have trained on."""
    return sorted(int(number) for _, out, _ in ended for number in out.partition("seen")[2].split())


def test_tasks_of_slurm_train_on_each_sample_once_and_end_together_if_one_finds_no_server(tmp_path: Path) -> None:
    server = ServerThread()
    try:
        address, token = f"{server.address.host}:{server.address.port}", server.address.token
        ended = srun(tmp_path, address, [token, token])
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert samples(ended) == list(range(45))
        ended = srun(tmp_path, address, [token, "another"])
    finally:
        server.stop()
    assert [code for code, _, _ in ended] == [1, 1], ended
    assert "AntDTStrategy: rank 1 could not connect to the service, so all end. ServiceError: the token is wrong" in ended[0][2]
    assert "could not connect" not in ended[1][2] and "ServiceError: the token is wrong" in ended[1][2]  # its own error
