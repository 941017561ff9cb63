"""Pretrained models: those shipped with this package, folders, and repositories of the Hugging Face hub."""

import difflib
import importlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.base.checkpoint import CONFIG_FILE, fetch_repository, is_pretrained_folder

__all__ = ["ShippedModel", "import_methods", "list_models", "resolve", "upload"]


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
    for room in ("callbacks", "metrics"):
        importlib.import_module(f"zoo.{room}")


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
