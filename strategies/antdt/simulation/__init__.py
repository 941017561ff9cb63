"""Slow ranks, measured and modelled."""
