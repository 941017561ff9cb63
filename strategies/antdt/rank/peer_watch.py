"""Watch over the other ranks of a group, which may be lost or hang.

A process that dies breaks the collectives that wait for it, and its launcher ends the group. A process that *hangs*, stopped or
stuck in its kernel, does neither: all wait for it. The service does not hear from it, and so a rank on the same machine ends it.
"""

import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["PeerWatch", "own_address"]


def own_address() -> tuple[str, int]:
    """Machine and process, by which another rank can reach this process."""
    return socket.gethostname(), os.getpid()


class PeerWatch:
    """Looks at the service's list of ranks.

    Args:
        addresses: machine and process of each rank, see `own_address`.
        rank: this one.
        heartbeat_timeout: seconds of silence after which the service holds a rank for lost; a rank that is still connected is
            ended a little before.
        kill: ends a process.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        rank: int,
        heartbeat_timeout: float,
        kill: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGKILL),
    ) -> None:
        self.rank, self.heartbeat_timeout, self._kill = rank, heartbeat_timeout, kill
        self.world_size = len(addresses)
        host = addresses[rank][0]
        self._pids = {other: pid for other, (machine, pid) in enumerate(addresses) if machine == host and other != rank}
        #: Whether this rank looks after those of its machine: the first two do, so that each has another that does.
        self.guards = rank in sorted([*self._pids, rank])[:2] and bool(self._pids)

    def all_there(self, status: Mapping[str, Any]) -> bool:
        """Whether all ranks of the generation are connected.

        Args:
            status: the service's.
        """
        nodes = [self._node(status, rank) for rank in range(self.world_size)]
        return all(node is not None and node["connected"] for node in nodes)

    def end_silent(self, status: Mapping[str, Any]) -> list[int]:
        """End the processes of this machine that are connected, but have been silent for too long.

        Returns:
            Their ranks.
        """
        ended = []
        for rank, pid in self._pids.items():
            node = self._node(status, rank)
            if node is not None and node["connected"] and node["silent"] >= 0.8 * self.heartbeat_timeout:
                try:
                    self._kill(pid)
                except ProcessLookupError:
                    continue
                ended.append(rank)
        return ended

    def _node(self, status: Mapping[str, Any], rank: int) -> Mapping[str, Any] | None:
        node = status["nodes"].get(f"worker:{rank}")
        return node if node is not None and node["gen"] == status["generation"] else None
