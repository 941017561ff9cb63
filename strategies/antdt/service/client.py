"""A worker's side of the service: blocking calls that may be repeated until they are answered."""

import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from strategies.antdt.service.address import Address
from strategies.antdt.service.wire import AUTHENTICATED_LIMIT, Decoder, ServiceError, WireError, encode
from strategies.antdt.sharding.ledger import Fetched, Range

__all__ = ["Client", "ServerUnreachable"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class ServerUnreachable(ConnectionError):
    """The server has not answered for as long as the client is patient."""


class Client:
    """Calls of one worker; safe to use from several threads, one call at a time.

    A call that gets no answer is sent again, over a new connection, after 0.1 s, 0.2 s ... 5 s. The server knows a repeated
    call by its number and gives the same answer, so that nothing happens twice, even if it was killed in between.

    Args:
        address: of the server.
        worker: rank, or number of a parameter server or spare.
        role: what it is.
        patience: seconds for which a call is repeated.
        answer_timeout: seconds after which an answer is held for lost.
        resolve: finds the server again when it does not answer, and starts it if it was killed: ``lambda: revive(folder)``.

    Attributes:
        gen: generation, known after `join`.

    Example:
        >>> client = Client(address, worker=0)                                       # doctest: +SKIP
        >>> client.join(world_size=4, barrier=True)["plan"]                          # doctest: +SKIP
        {'version': 0, 'batch': [16, 16, 16, 16], 'cap': [None, None, None, None]}
        >>> client.fetch(epoch=0, share=(16, 64), max=320).ranges                    # doctest: +SKIP
        (Range(sid=0, lo=0, hi=320),)
    """

    def __init__(
        self,
        address: Address,
        worker: int,
        *,
        role: Literal["worker", "server", "spare"] = "worker",
        patience: float = 120.0,
        answer_timeout: float = 30.0,
        resolve: Callable[[], Address] | None = None,
    ) -> None:
        self.address, self.worker, self.role, self.patience = address, worker, role, patience
        self.gen = 0
        self._answer_timeout, self._resolve = answer_timeout, resolve
        self._session = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._decoder = Decoder(AUTHENTICATED_LIMIT)
        self._closed = threading.Event()
        self._pulse: threading.Thread | None = None

    # ---- calls --------------------------------------------------------------------------------------------------------

    def configure(
        self,
        dataset: Mapping[str, Any],
        solution: Mapping[str, Any],
        *,
        world_size: int,
        global_batch: int,
        semantics: str = "exactly_once",
        tail_factor: float = 2.0,
        controller: Mapping[str, Any] | None = None,
        caps: Sequence[int | None] | None = None,
        heartbeat_timeout: float = 60.0,
    ) -> None:
        """Say what the job is; every worker may, if all say the same.

        Args:
            dataset: ``{name, n, seed, shuffle, shard, epochs}``, see `DatasetSpec`.
            solution: ``{class_path, init_args}`` of a `Solution`.
            world_size: W.
            global_batch: B.
            semantics: of the ledger, and
            tail_factor: of the ledger, see `DataShardingService`.
            controller: further arguments of `Controller`.
            caps: most samples of a micro-batch, for each worker.
            heartbeat_timeout: seconds of silence after which a worker is declared lost.

        Raises:
            ServiceError: ``other_dataset``: the ledger is about another data set; ``conflict``: workers of this job are at work
                with other settings; ``bad_request``: the controller cannot be built so.
        """
        self.call(
            "configure",
            dataset=dict(dataset),
            solution=dict(solution),
            world_size=world_size,
            global_batch=global_batch,
            semantics=semantics,
            tail_factor=tail_factor,
            controller=dict(controller or {}),
            caps=None if caps is None else list(caps),
            heartbeat_timeout=heartbeat_timeout,
        )

    def join(
        self,
        world_size: int,
        *,
        barrier: bool,
        device: str = "",
        host: str = "",
        timeout: float = 300.0,
        survived: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Take part, from now on in the generation that is returned.

        Args:
            world_size: workers of the group.
            barrier: wait until all of them have joined, and open a generation together; else others go on as they are.
            device: its name, by which like devices are known.
            host: where this process runs; this machine's name by default.
            timeout: seconds to wait for the others.
            survived: of a worker that goes on where its former group broke: ``{step: optimizer steps that are done, trained:
                [samples that each worker of that group has trained]}``. What the one that is furthest says is committed.

        Returns:
            ``{gen, plan: {version, batch, cap}, epoch, consumed}``.

        Raises:
            ServiceError: ``timeout``: some have not joined; ``not_configured``.
        """
        answer = self.call(
            "join",
            _wait=timeout + self._answer_timeout if barrier else self._answer_timeout,
            world_size=world_size,
            barrier=barrier,
            device=device,
            host=host or socket.gethostname(),
            pid=os.getpid(),
            timeout=timeout,
            survived=None if survived is None else dict(survived),
        )
        self.gen = answer["gen"]
        return answer

    def fetch(self, epoch: int, share: tuple[int, int], max: int) -> Fetched:
        """`DataShardingService.fetch`; on ``wait`` ask again a moment later."""
        answer = self.call("fetch", epoch=epoch, share=list(share), max=max)
        if "ranges" in answer:
            return Fetched(tuple(Range(*item) for item in answer["ranges"]), "ranges")
        return Fetched((), "wait" if "wait" in answer else "end")

    def commit(self, items: Sequence[Sequence[int]]) -> None:
        """`DataShardingService.commit`; may ride on `report` instead."""
        self.call("commit", items=[list(item) for item in items])

    def release(self, sid: int, start: int) -> None:
        """`DataShardingService.release`."""
        self.call("release", sid=sid, **{"from": start})

    def report(
        self,
        step: int,
        samples: Sequence[Sequence[float]],
        *,
        version: int,
        node: Mapping[str, Any] | None = None,
        errors: Sequence[Any] = (),
        items: Sequence[Sequence[int]] = (),
    ) -> dict[str, Any]:
        """Tell what was measured, and hear what was decided.

        Args:
            step: newest step that is done.
            samples: ``[step, n, t_data, t_comp, t_wall]`` of steps not yet reported; seconds.
            version: newest decision that this worker knows.
            node: its state.
            errors: what went wrong.
            items: as in `commit`.

        Returns:
            ``{actions, version}``: all decisions after ``version`` that concern this node.
        """
        return self.call(
            "report",
            step=step,
            samples=[list(sample) for sample in samples],
            version=version,
            node=dict(node or {}),
            errors=list(errors),
            items=[list(item) for item in items],
        )

    def snapshot(self) -> dict[str, Any]:
        """State for a checkpoint: ``{ledger, controller}``."""
        return self.call("snapshot")

    def restore(self, ledger: Mapping[str, Any] | None, controller: Mapping[str, Any] | None = None) -> None:
        """Put the ledger, and with a state the controller, back to a checkpoint; worker 0 does it for all.

        Args:
            ledger: of `snapshot`; None: back to the beginning, as when training starts anew without a checkpoint.
            controller: of `snapshot`; None: it goes on as it is.
        """
        self.call(
            "restore",
            ledger=None if ledger is None else dict(ledger),
            controller=None if controller is None else dict(controller),
        )

    def leave(self, graceful: bool = True) -> None:
        """End taking part: in good order, or (``graceful=False``) as one whose ranges are treated as lost."""
        try:
            self.call("leave", graceful=graceful)
        except ServiceError as refusal:
            if refusal.kind != "stale":  # the answer to the first attempt was lost, or others were quicker
                raise

    def status(self) -> dict[str, Any]:
        """State of the job as the server knows it; changes nothing."""
        return self.call("status")

    def shutdown(self) -> None:
        """End the server: the job is over, and its journal with it."""
        self.call("shutdown")

    # ---- signs of life ------------------------------------------------------------------------------------------------

    def keep_alive(self, every: float = 10.0) -> None:
        """Give signs of life from a thread, as in long validations, until `close`. It does not show that training goes on.

        Args:
            every: seconds.
        """
        if self._pulse is None:
            self._pulse = threading.Thread(target=self._beat, args=(every,), name="antdt-heartbeat", daemon=True)
            self._pulse.start()

    def _beat(self, every: float) -> None:
        while not self._closed.wait(every):
            try:
                self.call("heartbeat")
            except (ServerUnreachable, ServiceError):
                return  # whoever makes the next call will hear of it

    def close(self) -> None:
        """Close the connection."""
        self._closed.set()
        with self._lock:
            self._disconnect()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- transport ----------------------------------------------------------------------------------------------------

    def call(self, op: str, *, _wait: float | None = None, **fields: Any) -> dict[str, Any]:
        """One request and its answer.

        Args:
            op: name of the request.
            _wait: seconds after which the answer is held for lost; None: ``answer_timeout``.
            fields: its content.

        Raises:
            ServiceError: the server refuses; not repeated.
            ServerUnreachable: it has not answered within ``patience`` seconds of trying.
            MessageTooLarge: the request has more bytes than any message may have.
        """
        with self._lock:
            request = {
                "op": op,
                "worker": self.worker,
                "role": self.role,
                "gen": self.gen,
                "session": self._session,
                "seq": next(self._numbers),
                **fields,
            }
            pause, failing_since = _FIRST_PAUSE, None
            lost: OSError | None = None
            while True:
                # The token may be another after a restart, so that the bytes are made anew; the number stays.
                message = encode({**request, "token": self.address.token})
                try:
                    answer = self._exchange(message, self._answer_timeout if _wait is None else _wait)
                    if answer.get("error", {}).get("kind") == "token" and self._resolve is not None:
                        raise ConnectionRefusedError("another job's server is there now")
                    break
                except (OSError, WireError) as failure:
                    self._disconnect()
                    now = time.monotonic()
                    failing_since = now if failing_since is None else failing_since
                    if now - failing_since + pause > self.patience or self._closed.is_set():
                        raise self._unreachable(op, lost or failure) from failure
                    self._closed.wait(pause)
                    if self._resolve is not None:
                        try:
                            self.address, lost = self._resolve(), None
                        except OSError as cause:
                            lost = cause
                    pause = min(2 * pause, _LONGEST_PAUSE)
        if "error" in answer:
            raise ServiceError(answer["error"]["kind"], answer["error"]["message"])
        return answer

    def _unreachable(self, op: str, failure: Exception) -> ServerUnreachable:
        return ServerUnreachable(
            f"{op}: the data-sharding server at {self.address.host}:{self.address.port} has not answered for {self.patience:g} s"
            f" ({failure}). If it has ended, start it again on its folder (zoo serve-data --folder ...), where its journal"
            " goes on; if it runs, see whether this machine reaches that port. Then resume with --ckpt_path last."
        )

    def _exchange(self, message: bytes, wait: float) -> dict[str, Any]:
        if self._socket is None:
            self._socket = socket.create_connection((self.address.host, self.address.port), timeout=5.0)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._decoder = Decoder(AUTHENTICATED_LIMIT)
        self._socket.settimeout(wait)
        self._socket.sendall(message)
        while True:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("the connection was closed")
            for answer in self._decoder.feed(data):
                return answer

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
