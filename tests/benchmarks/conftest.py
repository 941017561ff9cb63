"""Cheap substitutes for two steps of benchmarks that no test is about: starting processes, reading shipped classifiers."""

from copy import deepcopy
from functools import cache

import pytest
import torch.multiprocessing as multiprocessing
from fork_server import start_fork_server

from zoo.metrics import load_classifier

read_once = cache(load_classifier)


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork processes from the warm one, and copy classifiers that were read before."""

    def spawn(*arguments: object, **options: object) -> object:
        start_fork_server()
        return multiprocessing.start_processes(*arguments, **options, start_method="forkserver")

    monkeypatch.setattr(multiprocessing, "spawn", spawn)
    for module in ("agreement", "extractors"):
        monkeypatch.setattr(f"zoo.metrics.{module}.load_classifier", lambda name: deepcopy(read_once(name)))
