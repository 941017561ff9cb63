"""The ledger on disk: every change is a line before its answer leaves, so that a killed server goes on where it was.

A folder holds ``journal.jsonl``, the changes, and ``ledger.json``, the state that all changes up to a serial number have led to.
Compaction writes the state beside, renames it, and begins the journal anew; a kill at any point between leaves a pair that
replays to the same ledger. A line reaches the operating system before the answer is sent, which a kill of the process cannot
undo; it reaches the disk (fsync) with snapshots, restores and new generations. What is left of a job that is over is the number
of its last generation, in ``generation``.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService, Semantics

__all__ = ["Journal", "JournalError", "OtherDataset", "RecordedLedger"]

_FORMAT = 1
_WAIT = 0.05  # seconds after which a worker that found nothing asks again
Settings = dict[str, Any]
"""What `RecordedLedger.configure` is given: ``dataset``, ``semantics``, ``tail_factor``, and whatever the server keeps beside."""


class JournalError(RuntimeError):
    """The journal cannot be read, or another server writes it."""


class OtherDataset(RuntimeError):
    """The ledger is about another data set than the one that is asked for."""


class Journal:
    """Lines of one folder, which one process at a time may write.

    Args:
        folder: made if there is none.
        compact_every: changes after which `due` asks for a compaction.

    Attributes:
        state: that was found; None if there is none.
        changes: after it.
        former: last generation of the job that was here before; 0 if there was none.

    Raises:
        JournalError: another process holds the folder, or a file is damaged other than by a kill in the midst of a write.
    """

    def __init__(self, folder: Path, compact_every: int = 10_000) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.compact_every = folder, compact_every
        self._lines, self._state = folder / "journal.jsonl", folder / "ledger.json"
        self._past = folder / "generation"
        self._lock = os.open(folder / "journal.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            os.close(self._lock)
            raise JournalError(
                f"another server writes the journal in {folder}; stop it first, or give this one a folder."
            ) from cause
        self._file = -1
        try:
            self.former = self._read_past()
            self.state, self.changes = self._read()
        except BaseException:
            os.close(self._lock)
            raise
        self._serial = self.changes[-1]["serial"] if self.changes else int(self.state["serial"]) if self.state else 0
        self._written = len(self.changes)
        self._file = os.open(self._lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _read_past(self) -> int:
        content = self._past.read_text() if self._past.exists() else "0"
        if not content.strip().isdigit():
            raise JournalError(f"{self._past} is damaged. Remove {self.folder} to begin anew.")
        return int(content)

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The state, and the changes after it; a line that a kill has cut short is cut off."""
        state: dict[str, Any] | None = None
        if self._state.exists():
            try:
                state = json.loads(self._state.read_text())
            except ValueError as cause:
                raise JournalError(f"{self._state} is damaged: {cause}. Remove {self.folder} to begin anew.") from cause
            if not isinstance(state, dict) or state.get("format") != _FORMAT:
                raise JournalError(f"{self._state} is not of format {_FORMAT}; a server of another version has written it.")
        changes: list[dict[str, Any]] = []
        content = self._lines.read_bytes() if self._lines.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                change = json.loads(line)
            except ValueError as cause:
                raise JournalError(f"{self._lines}, line {number} is damaged. Remove {self.folder} to begin anew.") from cause
            if state is None or change["serial"] > state["serial"]:
                changes.append(change)
        if whole < len(content):
            os.truncate(self._lines, whole)
        return state, changes

    @property
    def due(self) -> bool:
        """Whether the journal is long enough for `compact`."""
        return self._written >= self.compact_every

    def append(self, change: Mapping[str, Any], to_disk: bool = False) -> None:
        """Write a change; with ``to_disk`` it outlives a crash of the machine too."""
        self._serial += 1
        line = json.dumps({"serial": self._serial, **change}, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        self._written += 1
        if to_disk:
            os.fsync(self._file)

    def compact(self, state: Mapping[str, Any]) -> None:
        """Replace all changes so far by the state they have led to."""
        self._replace(
            self._state, json.dumps({"format": _FORMAT, "serial": self._serial, **state}, separators=(",", ":")).encode()
        )
        self._replace(self._lines, b"")
        os.close(self._file)
        self._file = os.open(self._lines, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._written = 0

    def _replace(self, path: Path, content: bytes) -> None:
        beside = path.with_suffix(".new")
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
        directory = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)

    def remove(self, generation: int) -> None:
        """Delete the lines and the state: the job is over.

        Args:
            generation: the last one, after which those of the next job in this folder begin: a process that is left of this job,
                and knows the token, is no member of them.
        """
        self._replace(self._past, str(generation).encode())
        self._lines.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folder."""
        if self._file >= 0:
            os.close(self._file)
            os.close(self._lock)
            self._file = -1


class RecordedLedger:
    """A ledger whose changes are written to a journal, with the last answers that a retry must find again.

    Args:
        journal: whose content is replayed at once; None: nothing is written.

    Attributes:
        settings: of `configure`; None before.
        answers: for each worker and session (one client object) the number and the answer of its last request that changed
            the ledger, or of its last join.
        controller: the controller's state that was recorded last.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._ledger: DataShardingService | None = None
        self.settings: Settings | None = None
        self.answers: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {}
        self.controller: dict[str, Any] | None = None
        if journal is not None:
            if journal.state is not None:
                self._load(journal.state)
            for change in journal.changes:
                self._replay(**change)

    @property
    def ledger(self) -> DataShardingService:
        """The ledger; change it by the methods here only.

        Raises:
            RuntimeError: nobody has configured it.
        """
        if self._ledger is None:
            raise RuntimeError("the ledger has not been configured with a data set.")
        return self._ledger

    @property
    def configured(self) -> bool:
        """Whether it is known what the ledger is about."""
        return self._ledger is not None

    def _replay(self, serial: int, op: str, **arguments: Any) -> None:
        try:
            getattr(self, f"_do_{op}")(**arguments)
        except Exception as cause:
            raise JournalError(f"change {serial} of the journal, {op}, cannot be repeated: {cause!r}") from cause

    def _record(self, op: str, to_disk: bool = False, **arguments: Any) -> Any:
        result = getattr(self, f"_do_{op}")(**arguments)
        self._write(op, to_disk, **arguments)
        return result

    def _write(self, op: str, to_disk: bool = False, **arguments: Any) -> None:
        if self._journal is not None:
            self._journal.append({"op": op, **arguments}, to_disk)
            if self._journal.due:
                self.compact()

    def compact(self) -> None:
        """Make the journal short, and put it on the disk."""
        if self._journal is not None and self._ledger is not None:
            self._journal.compact(
                {
                    "settings": self.settings,
                    "ledger": self._ledger.state_dict(),
                    "answers": [
                        [worker, session, *last] for worker, all_ in self.answers.items() for session, last in all_.items()
                    ],
                    "controller": self.controller,
                }
            )

    def _load(self, state: Mapping[str, Any]) -> None:
        self._do_configure(state["settings"])
        self.ledger.load_state_dict(state["ledger"])
        for worker, session, seq, answer in state["answers"]:
            self._answer(worker, session, seq, answer)
        self.controller = state["controller"]

    def _answer(self, worker: int, session: str, seq: int, answer: dict[str, Any]) -> None:
        self.answers.setdefault(worker, {})[session] = (seq, answer)

    def configure(self, settings: Settings) -> None:
        """Say what the ledger is about, or change how it works.

        Args:
            settings: ``dataset`` (the fields of `DatasetSpec`), ``semantics``, ``tail_factor`` and others of plain types.

        Raises:
            OtherDataset: it is already about another data set.
        """
        self.check_dataset(settings)
        if settings != self.settings:
            former = self._journal.former if self._journal is not None else 0
            self._record("configure", to_disk=True, settings=settings, generation=former)

    def check_dataset(self, settings: Settings) -> None:
        """Raise `OtherDataset` if settings are about another data set than the ledger."""
        if self._ledger is not None:
            ours, theirs = self._ledger.dataset, DatasetSpec(**settings["dataset"])
            if ours.identity != theirs.identity:
                place = f" in {self._journal.folder}" if self._journal is not None else ""
                raise OtherDataset(
                    f"the ledger{place} is about the data set {ours.identity}, and this run asks for {theirs.identity}."
                    " Give the run another folder, or remove this one if its run is over."
                )

    def _do_configure(self, settings: Settings, generation: int = 0) -> None:
        dataset = DatasetSpec(**settings["dataset"])
        fresh = DataShardingService(dataset, cast(Semantics, settings["semantics"]), settings["tail_factor"])
        fresh.generation = generation
        if self._ledger is not None:
            fresh.load_state_dict(self._ledger.state_dict())
        self._ledger, self.settings = fresh, settings

    def begin(self, joined: Mapping[int, tuple[str, int]]) -> int:
        """`DataShardingService.begin` for workers, with session and number of each one's request to join."""
        members = [[worker, session, seq] for worker, (session, seq) in sorted(joined.items())]
        return cast(int, self._record("begin", to_disk=True, members=members))

    def _do_begin(self, members: Sequence[Sequence[Any]]) -> int:
        gen = self.ledger.begin(worker for worker, _, _ in members)
        self.answers.clear()
        for worker, session, seq in members:
            self._answer(worker, session, seq, {"gen": gen})
        return gen

    def join(self, worker: int, session: str, seq: int) -> int:
        """`DataShardingService.join`."""
        return cast(int, self._record("join", to_disk=True, worker=worker, session=session, seq=seq))

    def _do_join(self, worker: int, session: str, seq: int) -> int:
        gen = self.ledger.join(worker)
        self.answers[worker] = {}
        self._answer(worker, session, seq, {"gen": gen})
        return gen

    def fetch(self, worker: int, gen: int, session: str, seq: int, epoch: int, share: Sequence[int], max: int) -> dict[str, Any]:
        """`DataShardingService.fetch`.

        Returns:
            ``{"ranges": [[sid, lo, hi], ...]}``, ``{"wait": seconds}`` or ``{"end": True}``.
        """
        arguments: dict[str, Any] = {"gen": gen, "session": session, "seq": seq, "epoch": epoch, "share": list(share), "max": max}
        answer = self._do_fetch(worker, **arguments)
        if "ranges" in answer:  # else nothing has changed, however often it is asked
            self._write("fetch", worker=worker, **arguments)
        return answer

    def _do_fetch(
        self, worker: int, gen: int, session: str, seq: int, epoch: int, share: Sequence[int], max: int
    ) -> dict[str, Any]:
        fetched = self.ledger.fetch(worker, gen, epoch, (share[0], share[1]), max)
        if fetched.state != "ranges":
            return {"wait": _WAIT} if fetched.state == "wait" else {"end": True}
        answer = {"ranges": [list(item) for item in fetched.ranges]}
        self._answer(worker, session, seq, answer)
        return answer

    def commit(self, worker: int, gen: int, items: Sequence[Sequence[int]]) -> None:
        """`DataShardingService.commit`."""
        if items:
            self._record("commit", worker=worker, gen=gen, items=[list(item) for item in items])

    def _do_commit(self, worker: int, gen: int, items: Sequence[Sequence[int]]) -> None:
        self.ledger.commit(worker, gen, items)

    def settle(self, trained: Mapping[int, int]) -> None:
        """`DataShardingService.settle`."""
        self._record("settle", trained=[list(item) for item in sorted(trained.items())])

    def _do_settle(self, trained: Sequence[Sequence[int]]) -> None:
        self.ledger.settle({int(worker): int(count) for worker, count in trained})

    def release(self, worker: int, gen: int, sid: int, start: int) -> None:
        """`DataShardingService.release`."""
        self._record("release", worker=worker, gen=gen, sid=sid, start=start)

    def _do_release(self, worker: int, gen: int, sid: int, start: int) -> None:
        self.ledger.release(worker, gen, sid, start)

    def leave(self, worker: int, gen: int) -> None:
        """`DataShardingService.leave`."""
        self._record("leave", worker=worker, gen=gen)

    def _do_leave(self, worker: int, gen: int) -> None:
        self.ledger.leave(worker, gen)

    def fail(self, worker: int) -> None:
        """`DataShardingService.fail`."""
        self._record("fail", worker=worker)

    def _do_fail(self, worker: int) -> None:
        self.ledger.fail(worker)

    def restore(self, snapshot: Mapping[str, Any] | None) -> None:
        """`DataShardingService.restore`."""
        self._record("restore", to_disk=True, snapshot=snapshot)

    def _do_restore(self, snapshot: Mapping[str, Any] | None) -> None:
        self.ledger.restore(snapshot)

    def snapshot(self) -> dict[str, Any]:
        """`DataShardingService.snapshot`, when all that led to it is on the disk."""
        self.compact()
        return self.ledger.snapshot()

    def keep_controller(self, state: dict[str, Any]) -> None:
        """Remember what the controller has learned and decided."""
        self._record("controller", state=state)

    def _do_controller(self, state: dict[str, Any]) -> None:
        self.controller = state

    def close(self, job_is_over: bool = False) -> None:
        """Write the compact form and let go of the folder; if the job is over, leave nothing to replay."""
        if self._journal is not None:
            if job_is_over:
                self._journal.remove(self._ledger.generation if self._ledger is not None else self._journal.former)
            else:
                self.compact()
            self._journal.close()
