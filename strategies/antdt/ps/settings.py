"""What the workers of a run have agreed on, as one of them tells it to the servers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strategies.antdt.ps.clock import Consistency
from strategies.antdt.service.address import Address

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What a server does, and when.

    Attributes:
        consistency: how far workers may be apart, before the controller has changed it.
        clip: largest norm, or element, of the gradient of a synchronous step; 0: any.
        clip_norm: which of the two; workers find the factor of a norm, which takes all servers.
        on_drop: what becomes of the samples of a dropped gradient: ``lose`` or ``requeue``.
        heartbeat_timeout: seconds after which a silent worker is held for lost.
        save_every: seconds between two copies of a server's part on disk.
        report_every: seconds between two reports to the controller.
        data: the data-sharding server; None: samples are not committed.
        raw: all of it as it was told, JSON types.
    """

    consistency: Consistency
    clip: float = 0.0
    clip_norm: bool = True
    on_drop: str = "lose"
    heartbeat_timeout: float = 60.0
    save_every: float = 30.0
    report_every: float = 2.0
    data: Address | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Settings":
        """From JSON types; what is missing is as by default.

        Raises:
            KeyError: there is no ``mode``.
            ValueError: numbers that do not go together.
        """
        data = raw.get("data")
        return cls(
            Consistency(raw["mode"], int(raw.get("staleness", 0)), int(raw.get("backup", 0))),
            float(raw.get("clip", 0.0)),
            bool(raw.get("clip_norm", True)),
            raw.get("on_drop", "lose"),
            float(raw.get("heartbeat_timeout", 60.0)),
            float(raw.get("save_every", 30.0)),
            float(raw.get("report_every", 2.0)),
            None if data is None else Address(data[0], int(data[1]), data[2]),
            dict(raw),
        )
