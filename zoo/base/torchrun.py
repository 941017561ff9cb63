"""The environment that torchrun (torch elastic) gives its processes: restarts, local processes, the agent's store."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = [
    "agent_store",
    "has_agent_store",
    "is_restarted",
    "is_torchrun",
    "local_world_size",
    "num_nodes",
    "restart_count",
    "restarts_left",
    "run_id",
    "wait_for_rank_zero",
]


def is_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_id() -> str:
    """Name of the job.

    Raises:
        KeyError: If torchrun did not start this process.
    """
    return os.environ["TORCHELASTIC_RUN_ID"]


def restart_count() -> int:
    """Number of times that torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them was lost."""
    return restart_count() > 0


def restarts_left() -> int:
    """Number of times that torchrun would still start the processes again."""
    return max(0, int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - restart_count())


def local_world_size(default: int | None = None) -> int | None:
    """Number of processes on this machine, where a launcher has set it.

    Args:
        default: Value without a launcher.
    """
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return default if size is None else int(size)


def num_nodes() -> int:
    """Number of machines of a job in which each has as many processes as this one.

    Raises:
        KeyError: If no launcher has set the sizes.
    """
    return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])


def has_agent_store() -> bool:
    """Whether torchrun's agent keeps a store for its processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agent_store() -> "TCPStore | None":
    """Connect to the store of torchrun's agent, which outlives restarts of the processes; None without one."""
    if not has_agent_store():
        return None
    from torch.distributed import TCPStore  # the data-sharding server reads this file without torch
    from torch.distributed.constants import default_pg_timeout

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=default_pg_timeout)


def wait_for_rank_zero(key: str) -> None:
    """Block the other processes of torchrun until rank 0 has called this; works before a process group exists.

    Args:
        key: Entry of the agent's store that says so.
    """
    store = agent_store()
    if store is None:
        return
    if os.environ["RANK"] == "0":
        store.set(key, "")
    store.wait([key])
