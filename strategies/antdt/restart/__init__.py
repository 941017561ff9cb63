"""Restarts of ranks inside of a running job."""
