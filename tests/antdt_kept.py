"""A process with a keeper, for tests; imports little, so that it starts quickly."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from strategies.antdt.restart.rank_keeper import RankKeeper


def split_and_run(before: str, code: str, spares: int, out: Path) -> None:
    """Body of a keeper, after work with several threads and some code; what it splits off runs the other."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(4)
    torch.randn(500, 500) @ torch.randn(500, 500)
    torch.randn(4_000_000).sigmoid()
    keeper = RankKeeper(spares, "rank 7")
    first = os.getpid()
    names = {"keeper": keeper, "first": first, "os": os, "signal": signal, "sys": sys, "time": time, "torch": torch}
    exec(before, names)
    keeper.split()
    exec(code, names)
