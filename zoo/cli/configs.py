"""Configuration files: those of the package by name, those of the user by path."""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.base.hyperparameters import read_config
from zoo.base.option_errors import nearest
from zoo.cli.argv import say

__all__ = ["find_config", "packaged_configs", "read_sections", "texts", "warn_of_replaced_callbacks"]


def packaged_configs() -> dict[str, Path]:
    """Configurations that come with the package: ``{"bfn/digits": path}``."""
    root = Path(str(files("zoo"))) / "configs"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("**/*.yaml"))}


def find_config(name: str) -> Path:
    """A configuration by file name, or by its name in the package: ``bfn/digits`` is ``configs/bfn/digits.yaml``.

    Raises:
        FileNotFoundError: neither exists; the nearest names are given.
    """
    if Path(name).is_file():
        return Path(name)
    configs = packaged_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    if short in configs:
        return configs[short]
    raise FileNotFoundError(
        f"there is no configuration {name}{nearest(short, list(configs))} (`zoo list` shows those that come with the package)"
    )


def read_sections(path: Path) -> dict[str, Any]:
    """The options of a configuration file, whose sections are sections."""
    config = read_config(path)
    model = config.get("model")
    if "bayesian_flow" in config or (isinstance(model, dict) and "bayesian_flow" in model):
        raise ValueError(
            f"{path} is a configuration of the published code: convert the weights with"
            f" `zoo convert FILE FOLDER --config {path}`, then give --ckpt_path FOLDER with a configuration of ours."
        )
    for section, example in (("model", "class_path: BFN"), ("data", "class_path: Digits"), ("trainer", "max_steps: 1000")):
        value = config.get(section)
        if not isinstance(value, dict | None if section == "trainer" else dict | str | None):
            raise ValueError(f"{path}: `{section}: {value}` must be a section with options of its own, such as `{example}`.")
    return config


def warn_of_replaced_callbacks(paths: list[Path], parsed: list[dict[str, Any]]) -> None:
    """A later list replaces an earlier one, which is seldom meant."""
    first = None
    for path, config in zip(paths, parsed, strict=True):
        if (config.get("trainer") or {}).get("callbacks"):
            if first is not None:
                say(f"{path}: `callbacks:` replaces the callbacks of {first}; write `callbacks+:` to add to them.")
            first = path


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
