"""A controller that decides what a test has written down: the server is tested with it, not with what a solution thinks."""

from collections.abc import Sequence
from typing import Any


class Decision:
    """A numbered decision, as plain data."""

    def __init__(self, version: int, node: str | None) -> None:
        self.version, self.node = version, node

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "node": self.node}


class ScriptedController:
    """Decides once for each entry of ``init_args.script`` (a node, or None for all), and remembers what it is told."""

    failure: str | None = None

    def __init__(self, settings: dict[str, Any]) -> None:
        world_size, whole = settings["world_size"], settings["global_batch"]
        if world_size > whole:
            raise ValueError(f"global_batch {whole} is less than a sample for each of {world_size} workers.")
        self._decide_every = float(settings["controller"].get("decide_every", 10.0))
        self._decided: float | None = None
        self._batch = [whole // world_size] * world_size
        self._script = list(settings["solution"].get("init_args", {}).get("script", []))
        self._decisions: list[Decision] = []
        self.heard: list[tuple[Any, ...]] = []

    @property
    def version(self) -> int:
        return len(self._decisions)

    @property
    def plan(self) -> dict[str, Any]:
        return {"version": len(self._decisions), "batch": self._batch, "cap": [None] * len(self._batch)}

    @property
    def events(self) -> list[dict[str, Any]]:
        return [decision.to_json() for decision in self._decisions]

    def join(self, node: str, now: float, **about: Any) -> None:
        self.heard.append(("join", node))

    def report(
        self, node: str, samples: Sequence[Any], now: float, *, node_state: Any = None, errors: Sequence[Any] = ()
    ) -> None:
        self.heard.append(("report", node, samples, node_state, errors))
        self.failure = self.failure or next((error["message"] for error in errors if error.get("kind") == "AssertionError"), None)

    def progress(self, remaining_samples: int, step: int) -> None:
        self.heard.append(("progress", remaining_samples, step))

    def tick(self, now: float) -> list[Decision]:
        due = self._decided is None or now - self._decided >= self._decide_every
        if not due or len(self._decisions) >= len(self._script):
            return []
        self._decided = now
        self._decisions.append(Decision(len(self._decisions) + 1, self._script[len(self._decisions)]))
        return self._decisions[-1:]

    def actions_after(self, version: int, node: str) -> list[Decision]:
        return [each for each in self._decisions if each.version > version and each.node in (None, node)]

    def applied(self, version: int, step: int, now: float) -> None:
        self.heard.append(("applied", version, step))

    def state_dict(self) -> dict[str, Any]:
        return {"decisions": self.events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._decisions = [Decision(**each) for each in state["decisions"]]
