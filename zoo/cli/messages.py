"""Messages for the user, from one process of a run."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

__all__ = ["say", "warn_of_replaced_callbacks"]


@rank_zero_only
def say(message: str) -> None:
    """Print a message to stderr, from rank 0."""
    print(message, file=sys.stderr)


def warn_of_replaced_callbacks(paths: list[Path], parsed: list[dict[str, Any]]) -> None:
    """A later list replaces an earlier one, which is seldom meant."""
    first = None
    for path, config in zip(paths, parsed, strict=True):
        if (config.get("trainer") or {}).get("callbacks"):
            if first is not None:
                say(f"{path}: `callbacks:` replaces the callbacks of {first}; write `callbacks+:` to add to them.")
            first = path
