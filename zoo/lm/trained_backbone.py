"""Backbones of modules that the zoo has trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from zoo.base.checkpoint import CONFIG_FILE, check_weights, read_checkpoint, read_pretrained
from zoo.base.hyperparameters import build, find_class
from zoo.base.named_weights import check_sources, with_named
from zoo.hub import resolve
from zoo.lm.backbone import Backbone

__all__ = ["trained_backbone"]

B = TypeVar("B", bound=Backbone)
#: Arguments of modules that are backbones, the first that is there is taken, and the names of their weights.
_NAMES = {"backbone": "backbone", "actor": "actor", "student": "backbone"}


def trained_backbone(source: str | Path, base: type[B]) -> tuple[B, dict[str, Tensor]] | None:
    """Build the backbone, or the actor, of a trained module, with its weights; averaged ones where a run of RLHF has them.

    Args:
        source: A ``.ckpt`` file, a folder that ``save_pretrained`` of a module wrote, or a name that ``zoo list`` shows.
        base: Class of the backbone.

    Returns:
        The backbone, in training mode, and the module's other weights; None if ``source`` is none of these but a path or a
        repository of a hub.

    Raises:
        FileNotFoundError: If nothing is found under that name.
        ValueError: If the module has no backbone of that class, or its weights are damaged or do not fit.
    """
    found = _read(source)
    if found is None:
        return None
    hyperparameters, checkpoint = found
    argument = next((name for name in _NAMES if isinstance(hyperparameters.get(name), Mapping)), "backbone")
    config, name = hyperparameters.get(argument), _NAMES[argument]
    if not isinstance(config, Mapping) or not issubclass(find_class(config["class_path"], Backbone), base):
        has = config["class_path"] if isinstance(config, Mapping) else "no backbone"
        raise ValueError(
            f"{source} is a {hyperparameters.get('_class_path')} with {has}: give a module whose backbone is a {base.__name__}."
        )
    module = nn.ModuleDict({name: build(base, config)})
    check_sources(module, checkpoint, None)
    averaged = checkpoint.get("rlhf", {}).get("ema") or {}
    state = {**checkpoint["state_dict"], **{f"{name}.{key}": value for key, value in averaged.items()}}
    own = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
    weights = {key.removeprefix(f"{name}."): value for key, value in with_named(module, own).items()}
    backbone = module[name]
    assert isinstance(backbone, base)
    check_weights(backbone, weights, str(source))
    backbone.load_state_dict(weights, strict=False)  # a tied tensor is stored once
    return backbone, {key: value for key, value in state.items() if key not in own}


def _read(source: str | Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Hyperparameters and checkpoint of a module."""
    path = Path(source).expanduser()
    if path.suffix == ".ckpt":
        checkpoint = read_checkpoint(path)
        return dict(checkpoint.get("hyper_parameters", {})), checkpoint
    if not path.exists():
        if "/" in str(source):
            return None
        path = resolve(str(source))
    file = path / CONFIG_FILE
    if not file.is_file() or "_class_path" not in json.loads(file.read_text()):
        return None
    config, weights = read_pretrained(path)
    return config, {"state_dict": weights}
