"""Changes to how jsonargparse reads names and defaults, in force only while a parser of the zoo runs.

Pinned by tests/test_lightning_pins.py and tests/test_hyperparameters.py; setup.cfg bounds the version.
"""

import ast
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import jsonargparse._parameter_resolvers as _resolvers
import jsonargparse._typehints as _typehints

from zoo.base.own_packages import is_own
from zoo.base.sources import home_of, moved_path

__all__ = ["ImportGuard", "is_chosen", "our_parsing"]

_resolve_class_path_by_name = _typehints.resolve_class_path_by_name


class ImportGuard:
    """Refuses import paths that would import a module, but for those of this package; remembers what it refused.

    Args:
        chosen: Import paths that the user has named, which are admitted as well.
    """

    def __init__(self, chosen: Collection[str] = ()) -> None:
        self.chosen = chosen
        self.refused: list[str] = []

    def check(self, path: str) -> None:
        """Check a path before it is followed.

        Raises:
            ImportError: If it would import a module that nobody chose.
        """
        if not is_chosen(path, self.chosen) and _would_import(path):
            self.refused.append(path)
            raise ImportError(f"{path} is not known here")


@contextmanager
def our_parsing(guard: ImportGuard | None = None) -> Iterator[None]:
    """Let jsonargparse read literals in the defaults of components, and find classes of the zoo by their names.

    - The default ``lambda params: AdamW(params, lr=1e-3)`` becomes plain data by its source. jsonargparse takes only bare
      constants there; ``betas=(0.9, 0.99)`` and negative numbers are literals as well.
    - What a value names is imported by one function of jsonargparse alone. It asks ``guard``.
    - A public name without its package imports the package that offers it, and no other; so does the path that a class had in
      an older version.

    Args:
        guard: Decides on imports; None admits all, because the user wrote what is parsed.
    """

    outer = _typehints.import_object  # of an outer call, perhaps, whose guard counts here too

    def import_object(name: Any, *args: Any, **kwargs: Any) -> Any:
        if guard is not None and isinstance(name, str):
            guard.check(name)
        try:
            return outer(name, *args, **kwargs)
        except (ImportError, AttributeError):
            if (moved := moved_path(str(name))) in (None, name):
                raise
            return outer(moved, *args, **kwargs)

    ours = [
        (_resolvers, "ast_is_constant", _is_literal),
        (_resolvers, "ast_get_constant_value", ast.literal_eval),
        (_typehints, "import_object", import_object),
        (_typehints, "resolve_class_path_by_name", _resolve),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in ours]
    for module, name, value in ours:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _resolve(cls: Any, name: str) -> str:
    """Import path of the subclass of ``cls`` that has a name; the name itself if there is none."""
    if (room := home_of(name)) is not None:
        getattr(importlib.import_module(room), name)
    return _resolve_class_path_by_name(cls, name)


def is_chosen(path: str, chosen: Collection[str]) -> bool:
    """Whether the user has named a class, or the class that holds it."""
    return any(outer in chosen for outer in itertools.accumulate(path.split("."), "{}.{}".format) if "." in outer)


def _would_import(path: str) -> bool:
    """Whether following an import path would import a module that is neither of this package nor imported already."""
    if is_own(path):
        return False
    for name in itertools.accumulate(path.split("."), "{}.{}".format):
        if name not in sys.modules:
            try:
                return importlib.util.find_spec(name) is not None  # what holds it is imported, so that this imports nothing
            except (ImportError, ValueError):  # it is a class or an attribute
                return False
    return False


def _is_literal(node: ast.AST) -> bool:
    try:
        ast.literal_eval(cast(ast.expr, node))
    except (ValueError, TypeError):
        return False
    return True
