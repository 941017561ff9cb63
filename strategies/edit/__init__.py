"""EDiT and A-EDiT: local steps, and a synchronisation with a penalty on pseudo-gradients (arXiv 2412.07210)."""

from strategies.edit.blocks import SupportsSyncBlocks
from strategies.edit.consensus import Consensus
from strategies.edit.sharded import EDiTShardedStrategy
from strategies.edit.strategy import EDiTStrategy

__all__ = ["Consensus", "EDiTShardedStrategy", "EDiTStrategy", "SupportsSyncBlocks"]
