"""Pretrained models: those shipped with this package, folders, and repositories of the Hugging Face hub."""

import difflib
import importlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.checkpoint import CONFIG_FILE, fetch_repository, is_pretrained_folder
from zoo.module import ZooModule

__all__ = ["ShippedModel", "import_methods", "list_models", "load", "resolve"]


@dataclass(frozen=True)
class ShippedModel:
    """Weights that come with the package.

    Attributes:
        name: what `load` takes.
        class_path: the module's class.
        description: one line: what it was trained on and what it reaches.
        num_bytes: size of the weights.
        folder: where they lie.
    """

    name: str
    class_path: str
    description: str
    num_bytes: int
    folder: Path


@cache
def _manifest() -> dict[str, ShippedModel]:
    models = {}
    for config in sorted(Path(str(files("zoo"))).glob(f"*/weights/*/{CONFIG_FILE}")):
        folder = config.parent
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        fields: dict[str, Any] = json.loads(config.read_text())
        models[folder.name] = ShippedModel(folder.name, fields["_class_path"], fields.get("_description", ""), size, folder)
    return models


def import_methods() -> None:
    """Import every method of the zoo, so that its classes are found by their names."""
    for module in Path(str(files("zoo"))).glob("*/module.py"):
        importlib.import_module(f"zoo.{module.parent.name}")


def list_models() -> list[ShippedModel]:
    """The models shipped with this package, by name."""
    return list(_manifest().values())


def load(name_or_folder: str | Path, **overrides: Any) -> ZooModule:
    """Load a pretrained module.

    Args:
        name_or_folder: a name of `list_models` (``"bfn-digits"``), a folder written by ``save_pretrained``, or a repository
            of the Hugging Face hub (``"organisation/name"``).
        overrides: constructor arguments to replace.

    Raises:
        FileNotFoundError: nothing is found under that name; the nearest names are given.
        ValueError: the files are damaged or do not fit.
    """
    return ZooModule.from_pretrained(name_or_folder, **overrides).eval()


def resolve(name: str) -> Path:
    """Folder of a pretrained model: shipped, local, or fetched from the hub (once, then cached).

    Raises:
        FileNotFoundError: nothing is found under that name.
    """
    if name in _manifest():
        return _manifest()[name].folder
    if is_pretrained_folder(name):
        return Path(name)
    if name.count("/") == 1 and not Path(name).exists():
        return fetch_repository(name, ["*.json", "*.safetensors", "*.md"])
    near = difflib.get_close_matches(name, _manifest(), n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise FileNotFoundError(f"There is no pretrained model {name!r}.{hint} `zoo list` shows those shipped with the package.")
