"""Layers that several methods share."""

from zoo.nn.time_embedding import SinusoidalEmbedding

__all__ = ["SinusoidalEmbedding"]
