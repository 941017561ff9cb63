"""Lightning strategies: where things run, never what they compute."""

from strategies.edit import EDiTShardedStrategy, EDiTStrategy
from strategies.expert import ExpertParallelStrategy
from strategies.paro import PaROStrategy

__all__ = ["EDiTShardedStrategy", "EDiTStrategy", "ExpertParallelStrategy", "PaROStrategy"]
