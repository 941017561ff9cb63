"""A worker that is forked while a finished process group waits to be collected."""

import gc

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch.utils.data import DataLoader, Dataset

import strategies


class Collects(Dataset[int]):
    """Samples whose reading makes Python collect its garbage."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


class Holder:
    """Two references that hold one another."""

    def __init__(self, group: object) -> None:
        self.group, self.itself = group, self


def read_beside_a_dead_group() -> list[int]:
    assert strategies  # whoever makes groups has imported it
    gc.disable()
    try:
        group = dist.new_group([0])
        Holder(group)
        dist.destroy_process_group(group)
        del group
        loader = DataLoader(Collects(), num_workers=1, batch_size=2, multiprocessing_context="fork", timeout=20)
        return torch.cat(list(loader)).tolist()
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:This process")
def test_forked_workers_leave_a_finished_group_of_their_parent_alone(pool: RankPool) -> None:
    assert pool.run(read_beside_a_dead_group, world_size=1) == [[0, 1, 2, 3]]
