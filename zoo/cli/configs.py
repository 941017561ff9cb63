"""Configuration files: those of the package by name, those of the user by path."""

from importlib.resources import files
from pathlib import Path

from zoo.base.nearest import nearest

__all__ = ["find_config", "packaged_configs"]


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
        f"There is no configuration {name}{nearest(short, list(configs))} (`zoo list` shows those that come with the package)."
    )
