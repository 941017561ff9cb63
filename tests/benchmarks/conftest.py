"""Processes of benchmarks are forked from the warm one, too."""

import pytest
import torch.multiprocessing as multiprocessing
from fork_server import start_fork_server


@pytest.fixture(autouse=True)
def warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*arguments: object, **options: object) -> object:
        start_fork_server()
        return multiprocessing.start_processes(*arguments, **options, start_method="forkserver")

    monkeypatch.setattr(multiprocessing, "spawn", spawn)
