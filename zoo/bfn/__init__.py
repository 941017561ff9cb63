"""Bayesian flow networks and their fast solvers."""
