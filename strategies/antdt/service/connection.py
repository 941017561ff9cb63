"""Connection of a rank to the service of its job: find, join, leave."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from strategies.antdt.service.address import Address
from strategies.antdt.service.client import Client
from strategies.antdt.service.launch import find_or_start, revive
from strategies.antdt.service.server import TOKEN_VARIABLE, ServerThread
from strategies.antdt.service.wire import ServiceError
from zoo.base.torchrun import is_restarted, is_torchrun, local_world_size

__all__ = ["Connection"]

_FIRST_PATIENCE = 20.0  # seconds for a server that was named; one that runs answers at once


class Connection:
    """A rank's way to the service.

    Args:
        server: ``auto``: a process of its own for a job under torchrun, which outlives restarts of the group, else in rank 0's
            process; ``inprocess``: in rank 0's process; or ``host:port`` of one that runs, with its token in $ANTDT_TOKEN.
        folder: of the run, for a process of its own.
        rank: of this process.
        world_size: number of ranks.
        num_nodes: number of machines.
        patience: seconds for which requests are repeated.

    Raises:
        ValueError: ``auto`` on several machines, or an address that is none.
    """

    def __init__(
        self, server: str, folder: Path, rank: int, world_size: int, num_nodes: int = 1, patience: float = 120.0
    ) -> None:
        own_process = server == "auto" and is_torchrun()
        if own_process and num_nodes > 1:
            raise ValueError(
                "AntDT: server=auto starts the data-sharding server on this machine, where others do not find it: start it once"
                " (zoo serve-data --folder ... --host 0.0.0.0 --port 28777) and give server=host:port and $ANTDT_TOKEN to all."
            )
        self.folder, self.rank, self.world_size, self.patience = folder, rank, world_size, patience
        self.kind = "process" if own_process else "thread" if server in ("auto", "inprocess") else "named"
        self._named = None if self.kind != "named" else Address.parse(server, os.environ.get(TOKEN_VARIABLE, ""))
        self._thread: ServerThread | None = None
        self._client: Client | None = None
        #: What `join` has answered.
        self.joined: dict[str, Any] | None = None

    @property
    def client(self) -> Client:
        """Calls of this rank."""
        assert self._client is not None
        return self._client

    def connect(self) -> None:
        """Find a server that is a process of its own, or start it.

        Raises:
            ServerUnreachable: one that was named does not answer.
            ServerNotStarted: there is none, and none could be started.
        """
        if self.kind == "process":
            address = find_or_start(self.folder)
            self._client = Client(address, self.rank, patience=self.patience, resolve=lambda: revive(self.folder))
        elif self._named is not None:
            self._client = Client(self._named, self.rank, patience=_FIRST_PATIENCE)
            self._client.status()
            self._client.patience = self.patience

    def host(self, event: Callable[[dict[str, Any]], None], broadcast: Callable[[Any], Any]) -> None:
        """Start the server in rank 0's process, if it is to be there; a collective call.

        Args:
            event: takes lines of the log.
            broadcast: gives rank 0's object to all.
        """
        if self.kind != "thread":
            return
        if self.rank == 0:
            # Ranks of other machines must reach it.
            alone = local_world_size(self.world_size) == self.world_size
            self._thread = ServerThread(host="127.0.0.1" if alone else "0.0.0.0", event=event)
            address = self._thread.address
            if not alone:
                address = address._replace(host=socket.gethostname())
        self._client = Client(Address(*broadcast(tuple(address) if self.rank == 0 else None)), self.rank, patience=self.patience)

    def try_join(self, device: str, survived: Mapping[str, Any] | None = None) -> int | None:
        """Join the generation of a group that starts again, before its processes know each other.

        Args:
            device: name of this rank's device.
            survived: see `Client.join`.

        Returns:
            Its number; None if this is the first start, of which the service knows nothing yet.

        Raises:
            RuntimeError: the group was started again after an error that no restart cures.
        """
        failure = self.client.status().get("failure")
        if failure and is_restarted():
            raise RuntimeError(f"AntDT: {failure}")
        try:
            self.joined = self.client.join(self.world_size, barrier=True, device=device, survived=survived)
        except ServiceError as refusal:
            if refusal.kind != "not_configured":
                raise
            return None
        return int(self.joined["gen"])

    def take_part(
        self, settings: Mapping[str, Any], device: str, barrier: Callable[[], None], any_rank: Callable[[bool], bool]
    ) -> dict[str, Any]:
        """Say what the job is, and join; a collective call.

        Args:
            settings: arguments of `Client.configure`.
            device: name of this rank's device.
            barrier: waits for all ranks.
            any_rank: whether any rank says yes.

        Returns:
            ``{gen, plan, epoch, consumed}``.

        Raises:
            ServiceError: ``other_dataset``: the service's ledger is about other data; ``bad_request``: no such controller.
        """
        conflict = False
        try:
            self.client.configure(**settings)
        except ServiceError as refusal:
            if refusal.kind != "conflict":
                raise
            conflict = True
        if any_rank(conflict):  # a job that was stopped goes on with other settings
            if self.joined is not None:
                self.client.leave()
            self.joined = None
            barrier()
            self.client.configure(**settings)
            barrier()
        if self.joined is None:
            self.joined = self.client.join(self.world_size, barrier=True, device=device)
        return self.joined

    def leave(self) -> None:
        """End taking part in good order."""
        self.client.leave()

    def fail(self, errors: list[dict[str, Any]], step: int) -> None:
        """Tell the service, if it listens, that this rank ends by an exception."""
        if self._client is None or self.joined is None:
            return
        self._client.patience = 0.5
        try:
            self._client.report(step, [], version=0, errors=errors, node={"alive": False})
            self._client.leave(graceful=False)
        except (OSError, ServiceError):
            return  # its connection ends with the process, which says enough

    def close(self, job_is_over: bool) -> None:
        """Close the connection, and end the server: if it lives in this process, or if rank 0 knows that the job is over."""
        if self._client is not None:
            if job_is_over and self.rank == 0 and self.kind == "process":
                try:
                    self._client.patience = 1.0
                    self._client.shutdown()
                except (OSError, ServiceError):
                    pass
            self._client.close()
        if self._thread is not None:
            self._thread.stop()
        self._client = self._thread = self.joined = None
