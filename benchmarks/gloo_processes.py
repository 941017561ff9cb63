"""Processes of a benchmark that form a gloo group, with the environment that torchrun would give them."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.multiprocessing.spawn import ProcessException

__all__ = ["run_group"]


def run_group(processes: int, body: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``body(folder, *arguments)`` on each of several processes of one thread; returns what it gave on rank 0.

    Args:
        processes: how many.
        body: a function at the top of a module; ``folder`` is a temporary one, the same for all. What it returns is plain.
        *arguments: plain values.

    Raises:
        RuntimeError: a process failed; the end of what each wrote is in the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_process, (processes, port, folder, body, arguments), nprocs=processes)
        except ProcessException as error:
            wrote = [path.read_text()[-1500:] for path in sorted(Path(folder).glob("*.log"))]
            raise RuntimeError("\n".join([f"a process of the benchmark failed: {error}", *wrote])) from error
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def _process(rank: int, processes: int, port: int, folder: str, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    size = str(processes)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    with (Path(folder) / f"rank{rank}.log").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        if rank:
            os.dup2(log.fileno(), 2)
        dist.init_process_group("gloo")
        result = body(folder, *arguments)
        dist.destroy_process_group()
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
