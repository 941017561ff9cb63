"""What a checkpoint's hyperparameters say against those of configuration files, which stand below them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jsonargparse._typehints as _typehints

from zoo.hyperparameters import find_class

__all__ = ["find_named", "is_same_class", "merged", "replaced"]


def is_same_class(name: str, path: str) -> bool:
    """Whether a name from a configuration, with or without its module, means the class of an import path."""
    if "." not in name:
        return name == path.rpartition(".")[2]
    try:
        return find_class(name, object) is find_class(path, object)
    except ValueError:
        return name == path


def find_named(name: str, base: type) -> type | None:
    """The class that a configuration names, with or without its module; None if there is no such subclass of ``base``."""
    try:
        found = _typehints.import_object(_typehints.resolve_class_path_by_name(base, name))
    except (ValueError, ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and issubclass(found, base) else None


def merged(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Options of two configurations, entry by entry; the later one wins."""
    both = {
        key: merged(earlier[key], value) if isinstance(value, Mapping) and isinstance(earlier.get(key), Mapping) else value
        for key, value in later.items()
    }
    return {**earlier, **both}


def replaced(configured: Any, stored: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Values of a configuration that stored ones replace.

    Args:
        configured: what the configuration says, in its notation.
        stored: what the checkpoint says of the same.
        name: of the option, such as ``model.optimizer``.

    Yields:
        The option, the value configured, and the value stored instead.
    """
    if isinstance(stored, Mapping) and "class_path" in stored:
        section = configured if isinstance(configured, Mapping) else {"class_path": configured}
        path = section.get("class_path", stored["class_path"])
        if path is None or not is_same_class(path, stored["class_path"]):
            yield name, path, stored["class_path"]
            return
        configured, stored = section.get("init_args") or {}, stored.get("init_args") or {}
    if isinstance(configured, Mapping) and isinstance(stored, Mapping):
        for key in (key for key in configured if key in stored):
            yield from replaced(configured[key], stored[key], f"{name}.{key}")
    elif _plain(configured) != _plain(stored):
        yield name, configured, stored


def _plain(value: Any) -> Any:
    """A value for comparison: YAML takes 1e-6 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
