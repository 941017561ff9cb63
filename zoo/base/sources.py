"""Public classes of this distribution, read from its source files: nothing is imported."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from zoo.base.own_packages import PACKAGES

__all__ = ["definition", "derives_from", "home_of", "moved_path", "public_names", "rooms"]

_ROOT = Path(__file__).parents[2]


@cache
def rooms() -> tuple[str, ...]:
    """Packages that offer public names: ``zoo.bfn``, ``zoo.callbacks``, ..., ``datamodules``, ``strategies``."""
    folders = [*sorted((_ROOT / "zoo").iterdir()), _ROOT / "datamodules", _ROOT / "strategies"]
    found = [path.relative_to(_ROOT).as_posix().replace("/", ".") for path in folders if (path / "__init__.py").exists()]
    return tuple(room for room in found if public_names(room))


@cache
def public_names(room: str) -> tuple[str, ...]:
    """Names in ``__all__`` of a package."""
    for node in _tree(room).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    return ()


@cache
def _homes() -> dict[str, str]:
    return {name: room for room in rooms() for name in public_names(room)}


def home_of(name: str) -> str | None:
    """Package that offers a public name; None if there is none."""
    return _homes().get(name)


def moved_path(path: str) -> str | None:
    """Import path of a public class that an older version stored by the module or package that it had then; else None."""
    home = home_of(path.rpartition(".")[2]) if path.partition(".")[0] in PACKAGES else None
    return None if home is None else f"{home}.{path.rpartition('.')[2]}"


def definition(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The module that defines a class, and its statement, found through the imports of ``module``; None if it is not ours."""
    for node in _statements(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return definition(node.module, alias.name)
    return None


def derives_from(module: str, name: str, base: str) -> bool:
    """Whether a class, as ``module`` names it, is called ``base`` or derives from a class of that name."""
    if name == base:
        return True
    found = definition(module, name)
    return found is not None and any(derives_from(found[0], ast.unparse(parent), base) for parent in found[1].bases)


def _statements(module: str) -> Iterator[ast.stmt]:
    for node in _tree(module).body:
        yield from node.body if isinstance(node, ast.If) else [node]


@cache
def _tree(module: str) -> ast.Module:
    path = _ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_bytes() if file.exists() else "")
