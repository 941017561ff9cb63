"""Layers that several methods share, and what they do with networks."""

from zoo.nn.evaluation_mode import evaluation_mode
from zoo.nn.time_embedding import SinusoidalEmbedding

__all__ = ["SinusoidalEmbedding", "evaluation_mode"]
