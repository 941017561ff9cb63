"""What any worker may want all to do, to stop or to save, and when all have trained enough."""

from collections.abc import Iterable, Mapping
from typing import Literal

from strategies.antdt.ps.worker import ParameterClient

__all__ = ["Agreement"]


class Agreement:
    """Requests of which workers learn with answers of the clock, some sooner, some later.

    Args:
        client: of the worker.

    Attributes:
        heard: how often all were asked to ``stop`` and to ``save``, as far as this worker has heard.
        budget: steps of the servers' clock after which training is over; None: no limit.
    """

    def __init__(self, client: ParameterClient) -> None:
        self._client = client
        self._seen = {"stop": 0, "save": 0}
        self.heard = dict(self._seen)
        self.budget: int | None = None

    def begin(self, budget: int | None) -> None:
        """Training begins: what was asked for before is no matter."""
        self._seen, self.heard, self.budget = dict(self._client.requests), dict(self._client.requests), budget

    def hear(self) -> None:
        """Take over what the clock has said last."""
        self.heard = dict(self._client.requests)

    def hear_all(self, heard: Iterable[Mapping[str, int]]) -> None:
        """Take over what any worker has heard, so that all know alike."""
        for each in heard:
            self.heard = {request: max(count, each[request]) for request, count in self.heard.items()}

    def grant(self, request: Literal["stop", "save"], wanted: bool) -> bool:
        """Say what this worker wants; true once on each, after the batch in which it heard that any wanted it."""
        if wanted and self.heard[request] <= self._seen[request]:
            self._client.ask(request, self._seen[request])
        granted = self.heard[request] > self._seen[request]
        self._seen[request] = self.heard[request]
        return granted

    @property
    def is_spent(self) -> bool:
        """Whether all steps of the budget are done, as far as this worker knows."""
        return self.budget is not None and self._client.version >= self.budget

    def interrupted(self) -> Literal["", "wanted", "over"]:
        """Ask the clock why a worker should not wait for samples any longer: it is wanted for something else, or all is over."""
        self._client.look()
        self.hear()
        if self.is_spent:
            return "over"
        return "wanted" if any(self.heard[request] > self._seen[request] for request in self.heard) else ""
