"""EDiT with replicas that are sharded over several processes each."""

from strategies.edit.sharded.strategy import EDiTShardedStrategy

__all__ = ["EDiTShardedStrategy"]
