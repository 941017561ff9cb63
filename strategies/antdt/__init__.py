"""AntDT: stragglers and leaders, dynamic data sharding, and a controller that balances them (arXiv 2404.09679)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.antdt.control.controller import Controller
    from strategies.antdt.control.solutions import LBBSP, AntDTDD, AntDTND, BackupWorkersSolution, Oracle, Solution, StaticBSP
    from strategies.antdt.service.address import Address
    from strategies.antdt.service.client import Client
    from strategies.antdt.service.launch import find_or_start
    from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService
    from strategies.antdt.sharding.order import SampleOrder

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
    "Address": "service.address",
    "Client": "service.client",
    "Controller": "control.controller",
    "DataShardingService": "sharding.ledger",
    "DatasetSpec": "sharding.ledger",
    "SampleOrder": "sharding.order",
    "find_or_start": "service.launch",
} | dict.fromkeys(
    ("AntDTDD", "AntDTND", "BackupWorkersSolution", "LBBSP", "Oracle", "Solution", "StaticBSP"), "control.solutions"
)


def __getattr__(name: str) -> Any:
    """Import lazily: the server process needs neither torch nor Lightning."""
    if name not in _HOME:
        raise AttributeError(f"module 'strategies.antdt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"strategies.antdt.{_HOME[name]}"), name)
