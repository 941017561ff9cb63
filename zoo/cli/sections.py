"""Sections of a configuration file: model, data, trainer, checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.base.hyperparameters import read_config
from zoo.hub import import_methods
from zoo.module import ZooModule

__all__ = ["read_sections", "texts"]

SECTIONS = ("model", "data", "trainer", "checkpoint")
OPTIONS = ("seed_everything", "ckpt_path", "weights_only", "verbose", "return_predictions")


def read_sections(path: Path) -> dict[str, Any]:
    """Read the options of a configuration file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, a configuration of a method's published code, or a section holds no options.
    """
    config = read_config(path)
    if _is_published(config):
        raise ValueError(
            f"{path} is a configuration of the published code: convert the weights with"
            f" `zoo convert FILE FOLDER --config {path}`, then give --ckpt_path FOLDER with a configuration of ours."
        )
    for section, example in (("model", "class_path: BFN"), ("data", "class_path: Digits"), ("trainer", "max_steps: 1000")):
        value = config.get(section)
        if not isinstance(value, dict | None if section == "trainer" else dict | str | None):
            raise ValueError(f"{path}: `{section}: {value}` must be a section with options of its own, such as `{example}`.")
    return config


def _is_published(config: Mapping[str, Any]) -> bool:
    """Whether a method knows a configuration as one of its published code."""
    model = config.get("model")
    ours = not isinstance(model, Mapping) or model.keys() & {"class_path", "init_args"}
    if ours and config.keys() <= {*SECTIONS, *OPTIONS}:
        return False
    import_methods()
    waiting: list[type[ZooModule]] = [ZooModule]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        try:
            if cls.from_official_config(config) is not None:
                return True
        except ValueError:  # it is one, of something that the method here cannot do
            return True
    return False


def texts(value: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
