"""A solution that the server of its own process can import quickly."""

from typing import Any

from strategies.antdt.actions import Action, KillRestart
from strategies.antdt.monitor import Windows
from strategies.antdt.solutions import Solution


class ReplaceOnce(Solution):
    """Wants a worker to be started again, once, when so many steps are done."""

    windows = Windows(1, 2, "steps", min_steps=1, skip_steps=0)

    def __init__(self, worker: int, step: int) -> None:
        self.worker, self.step = worker, step
        self.given = False

    def decide(self, view: Any, now: float) -> list[Action]:
        if self.given or view.step < self.step or not view.workers[self.worker].restartable:
            return []
        self.given = True
        return [KillRestart(f"worker:{self.worker}")]

    def cooldowns(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Any) -> None:
        self.given = state["given"]
