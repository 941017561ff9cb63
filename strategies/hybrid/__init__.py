"""Hybrid parallelism: embedding tables divided among ranks by rows, everything else replicated."""

from strategies.hybrid.exchange import RowExchange
from strategies.hybrid.strategy import HybridStrategy

__all__ = ["HybridStrategy", "RowExchange"]
