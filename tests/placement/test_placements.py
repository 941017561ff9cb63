"""x"""
import time
from pathlib import Path
from typing import Any
import torch
import pytest
from distributed import RankPool
from placement_runs import STRATEGIES, difference, prompts, run


def many(names, folder: Path, **options: Any):
    found = {}
    for name in names:
        b = time.time()
        found[name] = run(name, folder, **options)
        print(name, time.time() - b, flush=True)
        found[name]["seconds"] = time.time() - b
    return found


def test_x(pool: RankPool, tmp_path: Path) -> None:
    prompts(tmp_path)
    one = run("one", tmp_path, val=True)
    for world in (2, 4):
        names = [n for n in STRATEGIES if n != "one"]
        found = pool.run(many, names, tmp_path, val=True, world_size=world)
        for name in names:
            runs = [each[name] for each in found]
            toks = [r["tokens"] for r in runs if r["tokens"]]
            print(world, name, difference(one, runs[0]), [all(torch.equal(a, b) for a, b in zip(one["tokens"], t)) for t in toks], runs[0]["steps"], [r["ages"] for r in runs], [r["frozen_bytes"] for r in runs], runs[0]["seconds"], runs[0]["metrics"]["val/score"]-one["metrics"]["val/score"])
    assert 0
