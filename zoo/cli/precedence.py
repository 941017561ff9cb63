"""Precedence of a checkpoint's hyperparameters over configuration files."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jsonargparse._typehints as _typehints

from zoo.base.hyperparameters import find_class

__all__ = ["above_configs", "as_config", "find_named", "is_same_class", "merged", "replaced"]


def is_same_class(name: str, path: str) -> bool:
    """Whether a name from a configuration, with or without its module, means the class of an import path."""
    if "." not in name:
        return name == path.rpartition(".")[2]
    try:
        return find_class(name, object, [name]) is find_class(path, object)
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


def above_configs(stored: dict[str, Any], parsed: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The checkpoint's data options that stand above the configurations; None if they name another class.

    What they say of prediction (``predict_samples``, ``predict_images``) stays theirs, since no training depends on it.
    """
    sections = [data if isinstance(data, dict) else {"class_path": data} for config in parsed if (data := config.get("data"))]
    named = next((data["class_path"] for data in reversed(sections) if "class_path" in data), stored["class_path"])
    if not is_same_class(named, stored["class_path"]):
        return None
    theirs = {name for data in sections for name in data.get("init_args") or {} if name.startswith("predict_")}
    return {**stored, "init_args": {name: value for name, value in stored["init_args"].items() if name not in theirs}}


def as_config(hyperparameters: Mapping[str, Any], base: type, chosen: Collection[str]) -> dict[str, Any]:
    """Stored hyperparameters in the notation of configuration files.

    Args:
        hyperparameters: What a checkpoint or ``config.json`` holds.
        base: Class that it must be of.
        chosen: Import paths that the user has named.

    Raises:
        ValueError: If the class is unknown, or not of ``base``.
    """
    arguments = {
        name: value
        for name, value in hyperparameters.items()
        if name not in ("_class_path", "_instantiator", "zoo_version") and not name.startswith("_")
    }
    path = hyperparameters["_class_path"]
    cls: type = find_class(path, base, chosen)
    for old, new in getattr(cls, "renamed_arguments", {}).items():
        if old in arguments:
            arguments[new] = arguments.pop(old)
    return {"class_path": path, "init_args": arguments}
