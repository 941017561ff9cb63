"""Metrics of the zoo."""
