"""AntDT: stragglers and leaders, dynamic data sharding, and a controller that balances them (arXiv 2404.09679)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.antdt.address import Address
    from strategies.antdt.client import Client
    from strategies.antdt.launch import find_or_start
    from strategies.antdt.ledger import DatasetSpec, DataShardingService
    from strategies.antdt.order import SampleOrder

__all__ = ["Address", "Client", "DataShardingService", "DatasetSpec", "SampleOrder", "find_or_start"]

_HOME = {
    "Address": "address",
    "Client": "client",
    "DataShardingService": "ledger",
    "DatasetSpec": "ledger",
    "SampleOrder": "order",
    "find_or_start": "launch",
}


def __getattr__(name: str) -> Any:
    """Import lazily: the server process needs neither torch nor Lightning."""
    if name not in _HOME:
        raise AttributeError(f"module 'strategies.antdt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"strategies.antdt.{_HOME[name]}"), name)
