"""Pretrained models: those shipped with this package, folders, and repositories of the Hugging Face hub."""

import difflib
import importlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.base.shared_folder import CONFIG_FILE, fetch_repository, is_pretrained_folder
from zoo.base.sources import public_names, rooms

__all__ = ["ShippedModel", "import_everything", "import_methods", "list_models", "method_rooms", "resolve", "upload"]

_PACKAGE = Path(str(files("zoo")))


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

    @property
    def kind(self) -> str:
        """``weights`` of a method, or an ``extractor`` of features for metrics."""
        return "weights" if _has_module(self.folder.parents[1]) else "extractor"


@cache
def _manifest() -> dict[str, ShippedModel]:
    models = {}
    for config in sorted(_PACKAGE.glob(f"*/weights/*/{CONFIG_FILE}")):
        folder = config.parent
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        fields: dict[str, Any] = json.loads(config.read_text())
        models[folder.name] = ShippedModel(folder.name, fields["_class_path"], fields.get("_description", ""), size, folder)
    return models


def method_rooms() -> list[str]:
    """Packages of the methods, such as ``zoo.bfn``: those with a ``module.py``."""
    return [room for room in rooms() if _has_module(_PACKAGE / room.rpartition(".")[2])]


def import_methods() -> None:
    """Import every method of the zoo, so that its classes are known."""
    for room in method_rooms():
        importlib.import_module(room)


def import_everything() -> None:
    """Import all public classes of methods, callbacks, metrics, data and strategies."""
    for room in rooms():
        for name in public_names(room):
            getattr(importlib.import_module(room), name)


def _has_module(room: Path) -> bool:
    return (room / "module.py").exists()


def list_models() -> list[ShippedModel]:
    """The models shipped with this package, by name."""
    return list(_manifest().values())


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


def upload(folder: Path, repo_id: str, private: bool, token: str | None, message: str) -> str:
    """Upload a folder to the Hugging Face hub; see `ZooModule.push_to_hub`.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
