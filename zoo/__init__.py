"""Research systems that people can actually run: ten published systems behind one command line."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zoo import bfn, callbacks, emigm, ling, metrics
    from zoo.base.hyperparameters import Configurable
    from zoo.hub import list_models
    from zoo.module import ZooModule, load

__all__ = ["Configurable", "ZooModule", "__version__", "bfn", "callbacks", "emigm", "ling", "list_models", "load", "metrics"]

_HOME = {"Configurable": "base.hyperparameters", "ZooModule": "module", "list_models": "hub", "load": "module"}
_PACKAGES = ("bfn", "callbacks", "emigm", "ling", "metrics")


def __getattr__(name: str) -> Any:
    """Import lazily: ``import zoo`` is instant, and no method is loaded before it is used."""
    import importlib

    if name in _PACKAGES:
        return importlib.import_module(f"zoo.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zoo.{_HOME[name]}"), name)
