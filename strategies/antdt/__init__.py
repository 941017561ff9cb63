"""AntDT: stragglers and leaders, dynamic data sharding, and a controller that balances them (arXiv 2404.09679)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.antdt.address import Address
    from strategies.antdt.client import Client
    from strategies.antdt.controller import Controller
    from strategies.antdt.launch import find_or_start
    from strategies.antdt.ledger import DatasetSpec, DataShardingService
    from strategies.antdt.order import SampleOrder
    from strategies.antdt.solutions import LBBSP, AntDTDD, AntDTND, BackupWorkersSolution, Oracle, Solution, StaticBSP

__all__ = [
    "LBBSP",
    "Address",
    "AntDTDD",
    "AntDTND",
    "BackupWorkersSolution",
    "Client",
    "Controller",
    "DataShardingService",
    "DatasetSpec",
    "Oracle",
    "SampleOrder",
    "Solution",
    "StaticBSP",
    "find_or_start",
]

_HOME = {
    "Address": "address",
    "Client": "client",
    "Controller": "controller",
    "DataShardingService": "ledger",
    "DatasetSpec": "ledger",
    "SampleOrder": "order",
    "find_or_start": "launch",
} | dict.fromkeys(("AntDTDD", "AntDTND", "BackupWorkersSolution", "LBBSP", "Oracle", "Solution", "StaticBSP"), "solutions")


def __getattr__(name: str) -> Any:
    """Import lazily: the server process needs neither torch nor Lightning."""
    if name not in _HOME:
        raise AttributeError(f"module 'strategies.antdt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"strategies.antdt.{_HOME[name]}"), name)
