"""Lightning strategies: where things run, never what they compute."""

from strategies.expert import ExpertParallelStrategy

__all__ = ["ExpertParallelStrategy"]
