"""Expert parallelism: routed experts divided among ranks, which send one another tokens."""

from strategies.expert.dispatch import Dispatcher, ExpertLayer
from strategies.expert.shards import ExpertShards, HasExperts
from strategies.expert.strategy import ExpertParallelStrategy

__all__ = ["Dispatcher", "ExpertLayer", "ExpertParallelStrategy", "ExpertShards", "HasExperts"]
