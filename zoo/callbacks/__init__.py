"""Lightning callbacks of the zoo."""

from zoo.callbacks.ema import EMA
from zoo.callbacks.run_checkpoint import RunCheckpoint

__all__ = ["EMA", "RunCheckpoint"]
