"""Scripted decisions, in a file that the server of its own process can import quickly."""

from typing import Any

from strategies.antdt.control.actions import Action, AdjustBatch, KillRestart
from strategies.antdt.control.monitor import Windows
from strategies.antdt.control.solutions import Solution


class Plans(Solution):
    """Decides on the given batches, one decision after the other."""

    windows = Windows(1, 2, "steps", min_steps=1, skip_steps=0)

    def __init__(self, plans: list[list[int]], cap: list[int | None] | None = None) -> None:
        self.plans, self.cap = plans, cap
        self.given = 0

    def decide(self, view: Any, now: float) -> list[Action]:
        if self.given >= len(self.plans) or AdjustBatch.kind not in view.ready:
            return []
        self.given += 1
        batch = self.plans[self.given - 1]
        return [AdjustBatch(tuple(batch), tuple(self.cap or view.cap))]

    def cooldowns(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Any) -> None:
        self.given = state["given"]


class Restart(Plans):
    """Wants a worker to be started again, once, when so many steps are done."""

    def __init__(self, worker: int, step: int) -> None:
        super().__init__([])
        self.worker, self.step = worker, step

    def decide(self, view: Any, now: float) -> list[Action]:
        if self.given or view.step < self.step or not view.workers[self.worker].restartable:
            return []
        self.given = 1
        return [KillRestart(f"worker:{self.worker}")]
