"""Backbones of modules that the zoo has trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import json

from torch import nn

from zoo.base.checkpoint import CONFIG_FILE, check_weights, read_checkpoint, read_pretrained
from zoo.base.hyperparameters import build, find_class
from zoo.base.named_weights import check_sources, with_named
from zoo.hub import resolve
from zoo.lm.backbone import Backbone

__all__ = ["trained_backbone"]

B = TypeVar("B", bound=Backbone)
_PREFIX = "backbone."


def trained_backbone(source: str | Path, base: type[B]) -> B | None:
    """Build the backbone of a trained module, with its weights.

    Args:
        source: A ``.ckpt`` file, a folder that ``save_pretrained`` of a module wrote, or a name that ``zoo list`` shows.
        base: Class of the backbone.

    Returns:
        The backbone, in training mode; None if ``source`` is none of these but a path or a repository of a hub.

    Raises:
        FileNotFoundError: If nothing is found under that name.
        ValueError: If the module has no backbone of that class, or its weights are damaged or do not fit.
    """
    found = _read(source)
    if found is None:
        return None
    hyperparameters, checkpoint = found
    config = hyperparameters.get("backbone")
    if not isinstance(config, Mapping) or not issubclass(find_class(config["class_path"], Backbone), base):
        has = config["class_path"] if isinstance(config, Mapping) else "no backbone"
        raise ValueError(
            f"{source} is a {hyperparameters.get('_class_path')} with {has}: give a module whose backbone is a {base.__name__}."
        )
    module = nn.ModuleDict({"backbone": build(base, config)})
    check_sources(module, checkpoint, None)
    own = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(_PREFIX)}
    weights = {name.removeprefix(_PREFIX): value for name, value in with_named(module, own).items()}
    backbone = module["backbone"]
    assert isinstance(backbone, base)
    check_weights(backbone, weights, str(source))
    backbone.load_state_dict(weights, strict=False)  # a tied tensor is stored once
    return backbone


def _read(source: str | Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Hyperparameters and checkpoint of a module."""
    path = Path(source).expanduser()
    if path.suffix == ".ckpt":
        checkpoint = read_checkpoint(path)
        return dict(checkpoint.get("hyper_parameters", {})), checkpoint
    if not path.exists():
        if len(path.parts) > 1:
            return None
        path = resolve(str(source))
    file = path / CONFIG_FILE
    if not file.is_file() or "_class_path" not in json.loads(file.read_text()):
        return None
    config, weights = read_pretrained(path)
    return config, {"state_dict": weights}
