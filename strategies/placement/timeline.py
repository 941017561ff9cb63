"""Timeline of a rank: when it generates, scores, trains, brings weights, waits."""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Span", "Timeline", "chrome_trace", "idle_share"]

MOST_SPANS = 100_000


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        role: Whose, or ``wait``.
        stage: ``generate``, ``score``, ``train``, ``sync``, or what is waited for.
        begin: Seconds of the clock ``time.time``, comparable between processes of a machine.
        end: The same.
    """

    role: str
    stage: str
    begin: float
    end: float


class Timeline:
    """Spans of this rank, the newest `MOST_SPANS`; a span inside of another one interrupts it, so that none overlap.

    Example:
        >>> timeline = Timeline()
        >>> with timeline("reward", "score"):
        ...     with timeline("wait", "exchange"):
        ...         pass
        >>> [span.stage for span in timeline.spans]
        ['score', 'exchange', 'score']
    """

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=MOST_SPANS)
        self._now: tuple[str, str] | None = None
        self._begin = 0.0

    @contextmanager
    def __call__(self, role: str, stage: str) -> Iterator[None]:
        """Note what happens inside."""
        outer = self._now
        self._turn_to((role, stage))
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, work: tuple[str, str] | None) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        now = time.time()
        if self._now is not None:
            self.spans.append(Span(*self._now, self._begin, now))
        self._now, self._begin = work, now


def idle_share(spans: Iterable[Span]) -> float:
    """Share of the time from the first begin to the last end in which a rank waits or does nothing."""
    spans = list(spans)
    if not spans:
        return 1.0
    whole = spans[-1].end - spans[0].begin
    busy = sum(span.end - span.begin for span in spans if span.role != "wait")
    return 1 - busy / whole if whole else 0.0


def chrome_trace(ranks: Sequence[Iterable[Span]], path: str | Path) -> None:
    """Write the spans of all ranks as a trace for ``chrome://tracing`` or Perfetto.

    Args:
        ranks: Spans of each rank.
        path: File to write.
    """
    events: list[dict[str, Any]] = [
        {"name": f"{span.role}: {span.stage}", "cat": span.stage, "ph": "X", "pid": 0, "tid": rank,
         "ts": span.begin * 1e6, "dur": (span.end - span.begin) * 1e6}
        for rank, spans in enumerate(ranks) for span in spans
    ]  # fmt: skip
    Path(path).write_text(json.dumps({"traceEvents": events}))
