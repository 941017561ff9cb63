"""A worker's side of the parameter servers: fetch weights, send gradients, meet the other workers."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from strategies.antdt.ps.clock import Decision
from strategies.antdt.ps.frames import Connection, Frame, pack, unpack
from strategies.antdt.ps.partition import Layout
from strategies.antdt.ps.remote_optimizer import OptimizerSpec
from strategies.antdt.ps.slices import Gradient
from strategies.antdt.service.address import Address
from strategies.antdt.service.wire import ServiceError, WireError

__all__ = ["Outcome", "ParameterClient", "ServersUnreachable"]

_FIRST_PAUSE, _LONGEST_PAUSE, _FIRST_PULSE = 0.05, 2.0, 1.0
_LOOK_AGAIN = 30.0
"""Seconds after which a request that may take long is sent again, in case that the connection has died silently."""


class ServersUnreachable(ConnectionError):
    """A parameter server has not answered for as long as the worker is patient."""


class Outcome:
    """What became of a gradient.

    Attributes:
        accepted: whether it counts.
        version: steps done.
    """

    def __init__(self, accepted: bool, version: int) -> None:
        self.accepted, self.version = accepted, version


class ParameterClient:
    """One worker's connections to all servers.

    A request that gets no answer is sent again over a new connection; servers know a gradient by its number and take it once.

    Args:
        addresses: of the servers, in order; the first is the clock.
        worker: rank.
        world_size: W.
        resolve: finds a server again, by number, when it does not answer, and starts it if nobody has.
        find: finds a server that runs, by number; None: it is always where it was.
        patience: seconds for which a request is repeated.
        frame_limit: largest message, in bytes.
        pulse_every: seconds between signs of life; 0: none.
        group: name of the processes that were started together, and end together; those of another group are dead.
        joins: name of the run that this process is to join while others train; empty: any.

    Attributes:
        version: steps done, as far as this worker knows.
        late: whether the others were training already when it came.
        requests: how often all workers were asked to ``stop`` or ``save``.
        plan: newest decision of the controller about batches, ``[version, action]``.
        present: ranks that take part.

    Raises:
        ServersUnreachable: a server does not answer.
        ServiceError: a server refuses.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        worker: int,
        world_size: int,
        *,
        resolve: Callable[[int], Address] | None = None,
        find: Callable[[int], Address] | None = None,
        patience: float = 120.0,
        frame_limit: int = 2**32,
        pulse_every: float = 10.0,
        group: str = "",
        joins: str = "",
    ) -> None:
        self.worker, self.world_size, self.patience = worker, world_size, patience
        self._addresses, self._resolve, self._find, self._frame_limit = list(addresses), resolve, find, frame_limit
        self._session = secrets.token_hex(8)
        self.run, self._group, self._joins = "", group, joins
        self._connections: list[Connection | None] = [None] * len(self._addresses)
        self.version, self.late, self.epoch = 0, False, -1
        self.requests: dict[str, int] = {"stop": 0, "save": 0}
        self.plan: list[Any] = [0, None]
        self.present: list[int] = []
        self._process = ""
        self._meeting = 0
        self._gathered: Frame | None = None
        self._number = 0
        self._last: Decision | None = None
        self._closed = threading.Event()
        self.traffic = {"sent": 0, "received": 0, "reconnects": 0}
        end = time.monotonic() + min(patience, 15.0)
        while True:
            try:
                self._exchange(range(self.num_servers), lambda server: ({"op": "look"}, []))
                break
            except ServiceError as refusal:  # the run before has not quite ended
                if refusal.kind != "ending" or time.monotonic() > end:
                    raise
                time.sleep(_FIRST_PAUSE)
        if pulse_every:
            threading.Thread(target=self._pulse, args=(pulse_every,), name="antdt-ps-pulse", daemon=True).start()

    @property
    def num_servers(self) -> int:
        """S."""
        return len(self._addresses)

    # ---- transport ----------------------------------------------------------------------------------------------------

    def _connect(self, server: int) -> Connection:
        connection = self._connections[server]
        if connection is None:
            address = self._addresses[server]
            connection = Connection(address.host, address.port, self._frame_limit)
            try:
                connection.send({
                    "op": "hello", "token": address.token, "worker": self.worker, "world_size": self.world_size,
                    "session": self._session, "run": self.run, "group": self._group,
                    "joins": "" if self.run else self._joins,
                })  # fmt: skip
                about = connection.receive().header
                if server == 0:
                    if self.run and not self.late and about["process"] != self._process:
                        self._remind(connection)
                    self._process = about["process"]
            except BaseException:
                connection.close()
                raise
            if about["server"] != server:
                raise ServiceError("bad_request", f"{address.host}:{address.port} is server {about['server']}, not {server}.")
            self._connections[server] = connection
            if server == 0 and not self.run:
                self.run, self.late, self.epoch = about["run"], about["late"], about["epoch"]
        return connection

    def _remind(self, connection: Connection) -> None:
        """Tell a clock that was started again what the process before may have told this worker only, and others wait for."""
        header: dict[str, Any] = {"op": "remember", "epoch": self.epoch, "requests": self.requests, "meeting": self._meeting - 1}
        last = self._gathered
        for key in ("ranks", "values", "counts"):
            header[key] = [] if last is None else last.header[key]
        connection.send(header, [] if last is None else last.tensors)
        connection.receive()

    def _disconnect(self, server: int) -> None:
        connection, self._connections[server] = self._connections[server], None
        if connection is not None:
            self.traffic["sent"] += connection.sent
            self.traffic["received"] += connection.received
            connection.close()

    def _exchange(
        self,
        servers: Sequence[int],
        request: Callable[[int], tuple[dict[str, Any], Sequence[Tensor]]],
        wait: float = 30.0,
        patient: bool = False,
    ) -> list[Frame]:
        """One request to each of some servers, all sent before the first answer is read.

        Args:
            servers: whom.
            request: makes the request of a server; called again when it must be sent again.
            wait: seconds for the answer.
            patient: the answer may take as long as it takes.
        """
        answers: dict[int, Frame] = {}
        failing_since, pause = None, _FIRST_PAUSE
        while len(answers) < len(servers):
            failure: Exception | None = None
            asked = []
            for server in servers:
                if server in answers:
                    continue
                try:
                    self._connect(server).send(*request(server), wait=wait)
                    asked.append(server)
                except (OSError, WireError) as cause:
                    self._disconnect(server)
                    failure = self._describe(server, cause)
            slow = False
            for server in asked:
                try:
                    connection = self._connections[server]
                    assert connection is not None
                    answers[server] = connection.receive(_LOOK_AGAIN if patient else wait)
                except TimeoutError as cause:
                    self._disconnect(server)
                    slow, failure = patient, self._describe(server, cause)
                except (OSError, WireError) as cause:
                    self._disconnect(server)
                    failure = self._describe(server, cause)
                except BaseException:  # a refusal, or Ctrl-C: answers that come now must not be taken for those of the next
                    for other in asked:
                        if other not in answers and other != server:
                            self._disconnect(other)
                    raise
            if failure is None:
                break
            self.traffic["reconnects"] += 1
            if slow and len(asked) == len(servers):
                continue  # it lives, and has nothing to say yet
            now = time.monotonic()
            failing_since = failing_since or now
            if now - failing_since > self.patience or self._closed.is_set():
                raise failure
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            for server in servers:
                if server not in answers and self._resolve is not None:
                    try:
                        self._addresses[server] = self._resolve(server)
                    except OSError as cause:
                        failure = cause
        for server, answer in answers.items():
            self._note(server, answer.header)
        return [answers[server] for server in servers]

    def _describe(self, server: int, cause: Exception) -> ServersUnreachable:
        address = self._addresses[server]
        return ServersUnreachable(
            f"parameter server {server} at {address.host}:{address.port} has not answered for {self.patience:g} s ({cause!r})."
            " Its log, in the folder of the run, says why; start it again on the same folder and resume with --ckpt_path last."
        )

    def _note(self, server: int, header: Mapping[str, Any]) -> None:
        if server:
            return
        self.version = max(self.version, int(header.get("version", 0)))
        if header.get("last") is not None:
            self._last = Decision.from_json(header["last"])
        self.requests = header.get("requests", self.requests)
        self.plan = header.get("plan", self.plan)

    def _clock(self, header: dict[str, Any], tensors: Sequence[Tensor] = (), patient: bool = False) -> Frame:
        return self._exchange([0], lambda server: (header, tensors), patient=patient)[0]

    def _pulse(self, every: float) -> None:
        """Signs of life, over a connection of their own, also to a clock that was started again while this worker computes."""
        connection: Connection | None = None
        while not self._closed.wait(every if connection is not None else min(every, _FIRST_PULSE)):
            try:
                if connection is None:
                    address = self._addresses[0]
                    connection = Connection(address.host, address.port, 2**20)
                    hello = {"op": "hello", "token": address.token, "worker": self.worker, "session": self._session}
                    connection.send({**hello, "role": "pulse"})
                    connection.receive()
                connection.send({"op": "pulse"})
                connection.receive()
            except (OSError, ServiceError, WireError):
                if connection is not None:
                    connection.close()
                connection = None
                if self._find is not None:
                    with suppress(OSError):
                        self._addresses[0] = self._find(0)
        if connection is not None:
            connection.close()

    # ---- setting up ---------------------------------------------------------------------------------------------------

    def configure(
        self,
        layout: Layout,
        optimizer: OptimizerSpec,
        settings: Mapping[str, Any],
        values: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]] = (),
        *,
        row_update: str = "exact",
        version: int = 0,
    ) -> None:
        """Give the servers what they keep from now on; one worker does it for all.

        Args:
            layout: where everything goes.
            optimizer: how it learns.
            settings: ``mode``, ``staleness``, ``backup``, ``clip`` and so on, see the server's.
            values: of all parameters, in the layout's order.
            states: for each parameter, what the optimizer keeps of it (torch's names); empty: it begins.
            row_update: see `Slices`.
            version: steps done before.
        """
        flat = flatten(layout, values)
        states = states or [{}] * len(layout.entries)

        def request(server: int) -> tuple[dict[str, Any], list[Tensor]]:
            dense = [flat[dtype][slice(*layout.span(dtype, server))] for dtype in layout.dtypes]
            tables = [values[table].detach()[server :: layout.num_servers] for table in layout.tables]
            packed, tensors = pack(_server_states(layout, server, states))
            header = {
                "op": "configure",
                "layout": layout.to_json(),
                "optimizer": optimizer.to_json(),
                "settings": dict(settings),
                "states": packed,
                "row_update": row_update,
                "version": version,
            }
            return header, [*dense, *tables, *tensors]

        # The clock last: it is what others wait for.
        self._exchange(range(self.num_servers - 1, -1, -1), request)
        self.version, self._last = version, None

    # ---- steps --------------------------------------------------------------------------------------------------------

    def pull(self, layout: Layout, kind: str, *, clip_norm: float = 0.0, gate: bool = True) -> dict[str, Tensor]:
        """Dense parameters, once this worker may begin its next step.

        Args:
            layout: where they are.
            kind: ``asp``, ``ssp`` or ``bsp``; in the last, this worker passes on which gradients make the step before.
            clip_norm: largest 2-norm of the gradient of a synchronous step; 0: any.
            gate: whether to wait until the step may begin; else just look.

        Returns:
            For each dtype, all dense parameters flattened, one after another.
        """
        header: dict[str, Any] = {"op": "pull", "known": self.version, "gate": gate}
        if kind == "bsp":
            if self._last is None or not gate:
                self.look()
            if self._last is not None:
                decision = self._last.to_json()
                header |= {"decision": decision, "scale": self._scale(decision, clip_norm) if clip_norm else None}
            # A server that was started again learns from it how far the others are.
            header["known"] = self.version
        if self.num_servers > 1 and gate and kind == "ssp":
            first = self._clock(header, patient=True)
            others = self._exchange(range(1, self.num_servers), lambda server: (header, []))
            answers = [first, *others]
        else:
            answers = self._exchange(range(self.num_servers), lambda server: (header, []), patient=gate)
        return {
            dtype: torch.cat([answer.tensors[number] for answer in answers]) if len(answers) > 1 else answers[0].tensors[number]
            for number, dtype in enumerate(layout.dtypes)
        }

    def _scale(self, decision: list[Any], limit: float) -> float:
        answers = self._exchange(range(self.num_servers), lambda server: ({"op": "norm", "decision": decision}, []))
        norm = sum(answer.header["square"] for answer in answers) ** 0.5
        scale = limit / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_, which keeps NaN
        return 1.0 if scale > 1.0 else scale

    def rows(self, layout: Layout, wanted: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Rows of tables.

        Args:
            layout: where they are.
            wanted: for each table, numbers of rows, int64 on the CPU.

        Returns:
            For each table, ``(len(rows), dim)``.
        """
        masks = {table: layout.split_rows(rows) for table, rows in wanted.items()}
        tables = list(wanted)
        asked = [s for s in range(self.num_servers) if any(bool(masks[table][s].any()) for table in tables)]

        def request(server: int) -> tuple[dict[str, Any], list[Tensor]]:
            local = [wanted[table][masks[table][server]] // layout.num_servers for table in tables]
            return {"op": "rows", "tables": tables}, local

        answers = self._exchange(asked, request)
        found = {}
        for number, table in enumerate(tables):
            entry = layout.entries[table]
            result = torch.empty(len(wanted[table]), entry.shape[1], dtype=getattr(torch, entry.dtype))
            for server, answer in zip(asked, answers, strict=True):
                result[masks[table][server]] = answer.tensors[number]
            found[table] = result
        return found

    def push(
        self,
        layout: Layout,
        gradient: Gradient,
        hyperparameters: Sequence[Mapping[str, Any]],
        *,
        version: int,
        items: Sequence[Sequence[int]] = (),
        gen: int = 0,
    ) -> Outcome:
        """Send a gradient, and with it the word that its samples are trained.

        The servers but the clock get theirs first, and the clock, when all have it, takes its part and commits the samples in
        one: with one server a worker that dies leaves both or nothing, with several at most a part of a gradient whose samples
        come again.

        Args:
            layout: where it goes.
            gradient: of all parameters: whole ranges, and global numbers of rows.
            hyperparameters: of the optimizer's groups, now.
            version: steps that the weights had seen.
            items: ``(sid, upto)`` to be committed.
            gen: generation of this worker at the data-sharding server.
        """
        self._number += 1
        masks = {table: layout.split_rows(rows) for table, (rows, _) in gradient.rows.items()}

        def request(server: int) -> tuple[dict[str, Any], list[Tensor]]:
            dense = [gradient.dense[dtype][slice(*layout.span(dtype, server))] for dtype in layout.dtypes]
            rows = []
            for table, (numbers, values) in gradient.rows.items():
                mask = masks[table][server]
                rows += [numbers[mask] // layout.num_servers, values[mask]]
            header = {
                "op": "push",
                "number": self._number,
                "version": version,
                "samples": gradient.samples,
                "hyperparameters": [dict(group) for group in hyperparameters],
                "absent": sorted(gradient.absent),
                "tables": list(gradient.rows),
                "items": [list(item) for item in items] if server == 0 else [],
                "gen": gen,
            }
            return header, [*dense, *rows]

        if self.num_servers > 1:
            self._exchange(range(1, self.num_servers), request)
        answer = self._exchange([0], request, patient=True)[0].header
        return Outcome(bool(answer["accepted"]), int(answer["version"]))

    def idle(self) -> None:
        """Say that there is nothing to train now, so that nobody waits for this worker."""
        self._clock({"op": "idle"})

    def look(self) -> None:
        """Learn how far the others are."""
        self._clock({"op": "look"})

    # ---- together -----------------------------------------------------------------------------------------------------

    def enter(self, epoch: int) -> int:
        """Begin an epoch with all others; one that came late begins with the one that is going on, when it may.

        Returns:
            The epoch.
        """
        answer = self._clock({"op": "enter", "epoch": epoch}, patient=True).header
        if self.late:
            self.late, self._meeting = False, int(answer["meeting"])
        self.present = [int(rank) for rank in answer["present"]]
        self.epoch = int(answer["epoch"])
        return self.epoch

    def gather(self, value: Any) -> dict[int, Any]:
        """What each worker that takes part has brought, by rank; all must come.

        Args:
            value: numbers, text, tensors, and lists and dictionaries of them.
        """
        packed, tensors = pack(value)
        header = {"op": "bring", "meeting": self._meeting, "value": packed}
        frame = self._gathered = self._clock(header, tensors, patient=True)
        self._meeting += 1
        found, start = {}, 0
        for rank, own, count in zip(frame.header["ranks"], frame.header["values"], frame.header["counts"], strict=True):
            found[int(rank)] = unpack(own, frame.tensors[start : start + count])
            start += count
        self.present = list(found)
        return found

    def ask(self, request: str, seen: int) -> None:
        """Want all workers to do something; they learn of it with their next answer of the clock."""
        self._clock({"op": "ask", "request": request, "seen": seen})

    def leave(self, over: bool = False) -> None:
        """End taking part, and close the connections.

        Args:
            over: nobody may come to this run any more.
        """
        try:
            self._exchange(range(self.num_servers), lambda server: ({"op": "leave", "over": over}, []), wait=5.0)
        finally:
            self.close()

    def shutdown(self, restart: bool = False) -> None:
        """End the servers."""
        self._exchange(range(self.num_servers - 1, -1, -1), lambda server: ({"op": "shutdown", "restart": restart}, []), wait=5.0)

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        for server in range(self.num_servers):
            self._disconnect(server)

    # ---- everything ---------------------------------------------------------------------------------------------------

    def export(self, layout: Layout, states: bool) -> tuple[dict[int, Tensor], list[dict[str, Any]]]:
        """Whole tables, and what the optimizer keeps of all parameters.

        Args:
            layout: where everything is.
            states: whether that is wanted; else empty.

        Returns:
            Tables by number; and for each parameter, in the layout's order, torch's dictionary.
        """
        answers = self._exchange(range(self.num_servers), lambda server: ({"op": "export", "states": states}, []))
        tables = {}
        for number, table in enumerate(layout.tables):
            entry = layout.entries[table]
            tables[table] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            for server, answer in enumerate(answers):
                tables[table][server :: layout.num_servers] = answer.tensors[number]
        found = [unpack(answer.header["states"], answer.tensors[len(layout.tables) :]) for answer in answers]
        return tables, _join_states(layout, found) if states else []

    def status(self, server: int = 0) -> dict[str, Any]:
        """What a server knows, for people and tests."""
        return self._exchange([server], lambda server: ({"op": "status"}, []))[0].header


def flatten(layout: Layout, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Dense parameters one after another, for each dtype, on the CPU."""
    flat: dict[str, Tensor] = {}
    for dtype in layout.dtypes:
        own = [values[number] for number in layout.dense if layout.entries[number].dtype == dtype]
        flat[dtype] = torch.cat([value.detach().flatten() for value in own]).cpu()
    return flat


def unflatten(layout: Layout, flat: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Views of the dense parameters in what `ParameterClient.pull` has given."""
    return {
        number: flat[entry.dtype][start : start + entry.numel].view(entry.shape)
        for number, start in layout.starts.items()
        for entry in [layout.entries[number]]
    }


def _server_states(layout: Layout, server: int, states: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The part of optimizer states that belongs to a server's pieces; what is no tensor of the parameter's shape goes to all."""
    found: dict[str, dict[str, Any]] = {}
    for number, piece in enumerate(layout.pieces(server)):
        shape = torch.Size(layout.entries[piece.entry].shape)
        found[str(number)] = {
            key: value.flatten()[piece.offset : piece.offset + piece.length]
            if isinstance(value, Tensor) and value.shape == shape and (shape or key != "step")
            else value
            for key, value in states[piece.entry].items()
        }
    for table in layout.tables:
        shape = torch.Size(layout.entries[table].shape)
        found[f"table:{table}"] = {
            key: value[server :: layout.num_servers] if isinstance(value, Tensor) and value.shape == shape else value
            for key, value in states[table].items()
        }
    return {name: state for name, state in found.items() if state}


def _join_states(layout: Layout, found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Undo `_server_states`."""
    joined: list[dict[str, Any]] = [{} for _ in layout.entries]
    for server, states in enumerate(found):
        for number, piece in enumerate(layout.pieces(server)):
            entry = layout.entries[piece.entry]
            for key, value in states.get(str(number), {}).items():
                if isinstance(value, Tensor) and value.shape == (piece.length,) and key != "step":
                    whole = joined[piece.entry].setdefault(key, torch.zeros(entry.numel, dtype=value.dtype).view(entry.shape))
                    whole.view(-1)[piece.offset : piece.offset + piece.length] = value
                else:
                    joined[piece.entry].setdefault(key, value)
        for table in layout.tables:
            entry = layout.entries[table]
            for key, value in states.get(f"table:{table}", {}).items():
                if isinstance(value, Tensor) and value.shape == (layout.rows(table, server), entry.shape[1]):
                    whole = joined[table].setdefault(key, torch.zeros(entry.shape, dtype=value.dtype))
                    whole[server :: layout.num_servers] = value
                else:
                    joined[table].setdefault(key, value)
    return joined
