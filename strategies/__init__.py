"""Lightning strategies: where things run, never what they compute."""

from strategies.edit import EDiTShardedStrategy, EDiTStrategy

__all__ = ["EDiTShardedStrategy", "EDiTStrategy"]
