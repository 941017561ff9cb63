"""Hyperparameters as plain data: what an object was built with, as numbers, strings, lists and dictionaries.

A component (flow, solver, network ...) or module remembers its constructor's arguments as ``{"class_path": ...,
"init_args": {...}}``, the notation of LightningCLI and jsonargparse, whether the command line or a script built it. That
dictionary goes into checkpoints (loadable with ``weights_only=True``) and into ``config.json``, and builds the object again.
"""

import dataclasses
import enum
import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jsonargparse
import jsonargparse._parameter_resolvers as _resolvers
import numpy as np
import yaml

from zoo.base.option_errors import explain
from zoo.base.own_packages import is_own
from zoo.base.parsing import ImportGuard, is_chosen, our_parsing
from zoo.base.sources import moved_path

__all__ = ["Configurable", "build", "check_config", "class_path", "find_class", "plain", "plain_arguments", "read_config"]

T = TypeVar("T")


class Configurable:
    """Mixin of components: remembers the arguments of the constructor, to rebuild the object from plain data.

    Nothing has to be called: deriving from it is enough, also for subclasses that users write.

    Example:
        >>> class Noise(Configurable):
        ...     def __init__(self, scale: float = 1.0) -> None:
        ...         self.scale = scale
        >>> Noise(0.5).init_config["init_args"]
        {'scale': 0.5}
    """

    _init_arguments: tuple[tuple[Any, ...], dict[str, Any]]

    # A `__new__` and no wrapped `__init__`: signatures stay as written for jsonargparse, type checkers and help().
    def __new__(cls, *args: Any, **kwargs: Any) -> "Configurable":
        """Remember the arguments; ``__init__`` follows as usual."""
        self = super().__new__(cls)
        object.__setattr__(self, "_init_arguments", (args, kwargs))
        return self

    @property
    def init_config(self) -> dict[str, Any]:
        """``{"class_path", "init_args"}`` with defaults filled in, all plain data.

        Raises:
            TypeError: an argument cannot be written as plain data.
        """
        args, kwargs = self._init_arguments
        return {"class_path": class_path(type(self)), "init_args": plain_arguments(type(self), args, kwargs)}


def class_path(cls: Any) -> str:
    """Import path of a class or function, through the outermost package that offers it.

    Checkpoints name what users import (``zoo.bfn.ODE2M``), so that they outlive a file's move within its package.

    Raises:
        TypeError: it is defined inside a function (or is a lambda), where no import can reach it.
    """
    if "<" in cls.__qualname__:
        raise TypeError(
            f"{cls.__qualname__} of {cls.__module__} is defined inside a function, so a checkpoint could not find it again:"
            " define it at the top level of a module."
        )
    name = cls.__qualname__
    for package in itertools.accumulate(cls.__module__.split("."), "{}.{}".format):
        if getattr(sys.modules.get(package), name, None) is cls:
            return f"{package}.{name}"
    return f"{cls.__module__}.{name}"


def plain(value: Any, name: str = "value") -> Any:
    """Write a value as plain data: None, bool, int, float, str, list, dict.

    Args:
        value: numbers (numpy's too), strings, paths, enums, dataclasses, containers of these, `Configurable` components,
            classes, functions and ``functools.partial`` objects.
        name: what the value is called in the error message.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, enum.Enum):
        return value.name
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # a subclass, such as that of a library, could not be read with weights_only=True
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, Configurable):
        return value.init_config
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{name}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, functools.partial):
        # jsonargparse passes a Callable that makes objects as partial(instantiate, ..., cls, **arguments).
        by_parser = bool(value.args) and value.func.__module__.startswith("jsonargparse")
        made = value.args[-1] if by_parser else value.func
        if inspect.isclass(made) and (by_parser or not value.args):
            return _class_config(made, value.keywords, name)
    if inspect.isclass(value):
        return {"class_path": class_path(value)}
    if inspect.isfunction(value) and "<" not in value.__qualname__:
        return class_path(value)
    hint = "use functools.partial" if inspect.isfunction(value) else "derive its class from zoo.Configurable"
    raise TypeError(f"The argument {name}={value!r} cannot be stored in a checkpoint: {hint}, or pass plain data.")


def plain_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name and write out the arguments of a constructor call, defaults included, as plain data."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    given = signature.bind(None, *args, **kwargs).arguments
    given.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, ()):
            raise TypeError(f"{cls.__name__} was given positional *{name}: pass them by name, so that they can be stored.")
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    values = {**_default_arguments(cls), **{name: plain(value, name) for name, value in given.items()}}
    order = [name for name in signature.parameters if name in values]
    return {name: values[name] for name in [*order, *(name for name in values if name not in order)]}


@functools.cache
def _default_arguments(cls: type) -> dict[str, Any]:
    """Defaults of a constructor as plain data; those of base classes reached through ``**kwargs`` too."""
    defaults = {}
    with our_parsing():
        parameters = _resolvers.get_signature_parameters(cls)
    for parameter in parameters:
        default = parameter.default
        if (
            isinstance(default, Mapping) and "class_path" in default
        ):  # `lambda params: AdamW(params, lr=...)`, read by jsonargparse
            made = find_class(default["class_path"], object)
            defaults[parameter.name] = _class_config(made, default.get("init_args", {}), parameter.name)
        elif default is not inspect.Parameter.empty:
            defaults[parameter.name] = plain(default, parameter.name)
    return defaults


def _class_config(cls: type, arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Notation of ``partial(cls, **arguments)``; complete, because jsonargparse fills gaps from the default's arguments."""
    return {"class_path": class_path(cls), "init_args": {**_default_arguments(cls), **plain(arguments, name)}}


def build(base: type[T], config: Mapping[str, Any], trusted: bool = False) -> T:
    """Build an object from ``{"class_path", "init_args"}``.

    Args:
        base: the class that the object must be an instance of.
        config: plain data; a value in ``init_args`` may also be an object that is already built.
        trusted: whether the user wrote ``config``, so that it may import any installed module; see `check_config`.

    Raises:
        ValueError: unknown class or argument, a value of the wrong type, or a module that would have to be imported.
    """
    parser, parsed = _parse(base, config, None if trusted else ImportGuard())
    with our_parsing():
        return cast(T, parser.instantiate(parsed).object)


def check_config(base: type, config: Mapping[str, Any], chosen: Collection[str] = ()) -> None:
    """Refuse plain data of a file that does not fit its classes, or would import a module that the user did not choose.

    Classes and functions, however deep they lie, may be of this package or of modules already imported, as for `find_class`.
    Nothing is built.

    Args:
        base: the class that the object must be an instance of.
        config: ``{"class_path", "init_args"}``.
        chosen: import paths that the user has named, which are admitted as well.

    Raises:
        ValueError: unknown class or argument, a value of the wrong type, or a module that would have to be imported.
    """
    _parse(base, config, ImportGuard(chosen))


def _parse(base: type, config: Mapping[str, Any], guard: ImportGuard | None) -> tuple[jsonargparse.ArgumentParser, Any]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        with our_parsing(guard):
            parser.add_subclass_arguments(base, "object", required=True)
            return parser, parser.parse_object({"object": _copied(config)})
    except (jsonargparse.ArgumentError, TypeError) as error:
        if guard is not None and guard.refused:
            raise ValueError(_unknown(guard.refused[0], base)) from error
        reason = explain(str(error), []).removesuffix(" (--help lists all)").replace("object.", "")
        raise ValueError(f"Cannot build {config.get('class_path')} from its arguments: {reason}") from error


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or does not hold options.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no configuration file {path}.")
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        at = "" if where is None else f", line {where.line + 1}: {getattr(error, 'problem', None)}"
        raise ValueError(f"{path} is not valid YAML{at}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration: it must hold options, such as `model:`.")
    return config


def _copied(config: Any) -> Any:
    """Copy of nested plain data (jsonargparse changes it in place); objects in it stay the same objects."""
    if isinstance(config, Mapping):
        return {key: _copied(value) for key, value in config.items()}
    return [_copied(value) for value in config] if isinstance(config, list) else config


def find_class(path: str, base: type[T], chosen: Collection[str] = ()) -> type[T]:
    """Find the class that stored plain data names, without importing anything that the user did not choose.

    Args:
        path: Import path of the class, of this package or of a module already imported.
        base: Class that it must derive from.
        chosen: Import paths that the user has named, which are admitted as well.

    Raises:
        ValueError: no such class, or not a subclass of ``base``.
    """
    target = _import(path, chosen)
    if target is None and (moved := moved_path(path)) is not None:
        target = _import(moved, chosen)
    if not inspect.isclass(target):
        raise ValueError(_unknown(path, base))
    if not issubclass(target, base):
        raise ValueError(f"{path} is not a {base.__name__}, refusing to build it.")
    return target


def _import(path: str, chosen: Collection[str]) -> Any:
    """Object at an import path; None if there is no such name, or nobody chose its module."""
    module_path, _, name = path.rpartition(".")
    if module_path not in sys.modules and (is_own(module_path) or is_chosen(path, chosen)):
        try:
            importlib.import_module(module_path)
        except ModuleNotFoundError as error:
            if moved_path(path) in (None, path):
                raise ValueError(f"There is no module {module_path} for the class {path}: {error}.") from error
    return getattr(sys.modules.get(module_path), name, None)


def _unknown(path: str, base: type) -> str:
    option = "--data" if base.__name__.endswith("DataModule") else "--model"
    return (
        f"The class {path} is not known here: type its name after its option, such as `{option} {path}`, or in Python import"
        f" {path.rpartition('.')[0]} first."
    )
