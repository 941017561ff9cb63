"""Timeline of a rank: when it generates, scores, trains, brings weights, waits."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    """Spans of this rank, the newest `MOST_SPANS`.

    Example:
        >>> timeline = Timeline()
        >>> with timeline("actor", "generate"):
        ...     pass
        >>> [(span.role, span.stage) for span in timeline.spans]
        [('actor', 'generate')]
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def __call__(self, role: str, stage: str) -> Iterator[None]:
        """Note what happens inside."""
        _finish_device()
        begin = time.time()
        try:
            yield
        finally:
            _finish_device()
            self.spans.append(Span(role, stage, begin, time.time()))
            del self.spans[:-MOST_SPANS]

    def seconds(self) -> dict[str, float]:
        """Seconds by role and stage, as ``role/stage``."""
        found: dict[str, float] = defaultdict(float)
        for span in self.spans:
            found[f"{span.role}/{span.stage}"] += span.end - span.begin
        return dict(found)


def _finish_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def idle_share(spans: Sequence[Span]) -> float:
    """Share of the time from the first begin to the last end in which a rank waits or does nothing."""
    if not spans:
        return 1.0
    whole = max(span.end for span in spans) - min(span.begin for span in spans)
    busy = sum(span.end - span.begin for span in spans if span.role != "wait")
    return 1 - busy / whole if whole else 0.0


def chrome_trace(ranks: Sequence[Sequence[Span]], path: str | Path) -> None:
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
