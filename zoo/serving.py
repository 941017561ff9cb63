"""The verb ``zoo serve-data``: the data-sharding server and controller of a job (AntDT), started once for many machines."""

from collections.abc import Sequence

from strategies.antdt import server

__all__ = ["serve_data"]


def serve_data(argv: Sequence[str]) -> int:
    """``zoo serve-data --folder runs/clicks/antdt --host 10.0.0.1 --port 28777``.

    Args:
        argv: words after the verb.

    Returns:
        Exit status: 0 it has ended as it should, 1 it could not start.
    """
    return server.main(argv)
