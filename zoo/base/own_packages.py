"""The packages of this distribution, and their place in the search path of imports."""

import importlib.util
import sys
from pathlib import Path

__all__ = ["foreign_package", "is_own", "search_current_folder_last"]

PACKAGES = ("zoo", "datamodules", "strategies")
_ROOT = Path(__file__).parents[2]


def is_own(name: str) -> bool:
    """Whether importing ``name`` leads into this distribution, and not into a folder of the same name."""
    package = name.partition(".")[0]
    return package in PACKAGES and _place(package) == _ROOT.resolve()


def foreign_package() -> str | None:
    """Sentence on a package that has the name of one of ours and is found before it; None if there is none."""
    for name in PACKAGES:
        if not is_own(name):
            return (
                f"`import {name}` finds {_place(name)}/{name} instead of {_ROOT / name}: rename that folder, or take it off"
                " PYTHONPATH."
            )
    return None


def search_current_folder_last() -> None:
    """Let imports find these packages first and classes of the current folder last.

    ``python -m`` puts the current folder first, where a file ``random.py`` or a folder ``datamodules`` would hide others.
    """
    root, here = str(_ROOT), str(Path.cwd())
    if root == here and root in sys.path:  # a checkout that is worked on
        return
    others = [entry for entry in sys.path if entry not in ("", here)]
    sys.path[:] = dict.fromkeys([*others, root, here])


def _place(package: str) -> Path | None:
    """Folder that holds a package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parents[1]
