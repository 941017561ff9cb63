"""Research systems that people can actually run: ten published systems behind one command line."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zoo.base.hyperparameters import Configurable
    from zoo.hub import list_models
    from zoo.module import ZooModule, load

__all__ = ["Configurable", "ZooModule", "__version__", "list_models", "load"]

_HOME = {"Configurable": "base.hyperparameters", "ZooModule": "module", "list_models": "hub", "load": "module"}


def __getattr__(name: str) -> Any:
    """Import lazily: ``import zoo`` is instant, and no method is loaded before it is used."""
    if name in _HOME:
        return getattr(importlib.import_module(f"zoo.{_HOME[name]}"), name)
    if not name.startswith("_") and (Path(__file__).parent / name / "__init__.py").exists():
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
