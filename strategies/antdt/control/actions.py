"""Actions that a controller may ask of a job, numbered, and their form as plain data (section 2.3).

A *global* action concerns all workers, who apply it at the same step; a *node* action concerns the one it is addressed to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

__all__ = ["Action", "AdjustBatch", "AdjustLR", "BackupWorkers", "KillRestart", "NoAction", "Versioned"]


@dataclass(frozen=True)
class NoAction:
    """Nothing is done; a reason in the log says why.

    Attributes:
        reason: In words.
    """

    kind: ClassVar[str] = "NONE"
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class AdjustBatch:
    """New local batches of all workers, from the same step on everywhere.

    Attributes:
        batch: B_i, samples of worker i in a step; they sum to the global batch.
        cap: Most samples of worker i in one micro-batch, so that it runs ceil(B_i / cap_i) of them; None for no limit.
        reason: Why, in words.

    Raises:
        ValueError: Lengths that differ, a negative batch, or a cap below 1.
    """

    kind: ClassVar[str] = "ADJUST_BS"
    batch: tuple[int, ...]
    cap: tuple[int | None, ...]
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", tuple(self.batch))
        object.__setattr__(self, "cap", tuple(self.cap))
        if len(self.batch) != len(self.cap) or not self.batch:
            raise ValueError(f"AdjustBatch: batch for {len(self.batch)} workers and cap for {len(self.cap)} must be as many.")
        if min(self.batch) < 0 or any(cap is not None and cap < 1 for cap in self.cap):
            raise ValueError(f"AdjustBatch: batch={self.batch} must not be negative, cap={self.cap} at least 1 or None.")


@dataclass(frozen=True)
class AdjustLR:
    """Another learning rate, because steps average over another number of samples than B.

    Attributes:
        factor: What the learning rate of the schedule is multiplied with from now on; 1 undoes earlier ones.
        reason: Why, in words.

    Raises:
        ValueError: A factor that is not positive.
    """

    kind: ClassVar[str] = "ADJUST_LR"
    factor: float
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"AdjustLR: factor={self.factor} must be positive.")


@dataclass(frozen=True)
class BackupWorkers:
    """A step takes the first W - count gradients and drops the others (parameter servers only).

    Attributes:
        count: b, gradients of a step that are not waited for.
        reason: Why, in words.

    Raises:
        ValueError: A negative count.
    """

    kind: ClassVar[str] = "BACKUP_WORKERS"
    count: int
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"BackupWorkers: count={self.count} must not be negative.")


@dataclass(frozen=True)
class KillRestart:
    """End a worker or server after a checkpoint and start it elsewhere.

    Attributes:
        node: Whom: ``worker:3``, ``server:0``.
        reason: Why, in words.
    """

    kind: ClassVar[str] = "KILL_RESTART"
    node: str
    reason: str = field(default="", compare=False)


Action = NoAction | AdjustBatch | AdjustLR | BackupWorkers | KillRestart

_KINDS: dict[str, type[Action]] = {each.kind: each for each in (NoAction, AdjustBatch, AdjustLR, BackupWorkers, KillRestart)}


@dataclass(frozen=True)
class Versioned:
    """An action with its number.

    Attributes:
        version: Counts all decisions of a job, from 1.
        action: The decision.
        reason: Why, in words.

    Example:
        >>> decision = Versioned(3, AdjustBatch((6, 2), (None, 2)), "worker:1 is slow")
        >>> Versioned.from_json(decision.to_json()) == decision
        True
    """

    version: int
    action: Action
    reason: str = ""

    @property
    def kind(self) -> str:
        """Name of the action: ``ADJUST_BS``, ``KILL_RESTART`` and so on."""
        return self.action.kind

    @property
    def node(self) -> str | None:
        """Whom it is addressed to; None for all workers."""
        return self.action.node if isinstance(self.action, KillRestart) else None

    def to_json(self) -> dict[str, Any]:
        """As plain data: ``{version, action, payload, reason}``."""
        found = {each.name: getattr(self.action, each.name) for each in fields(self.action) if each.name != "reason"}
        payload = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        return {"version": self.version, "action": self.kind, "payload": payload, "reason": self.reason}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Versioned":
        """Read the result of `to_json`.

        Raises:
            ValueError: An action or field that is unknown, or one that is missing.
        """
        try:
            return cls(int(data["version"]), _KINDS[data["action"]](**data["payload"], reason=data["reason"]), data["reason"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{dict(data)} is no decision of a controller (version, action, payload, reason;"
                f" actions: {', '.join(_KINDS)}): {error!r}."
            ) from error
