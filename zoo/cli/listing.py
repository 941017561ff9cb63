"""The verb ``zoo list``."""

import argparse
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

import datamodules
import strategies
import zoo
from zoo.base.hyperparameters import find_class
from zoo.cli.configs import packaged_configs
from zoo.hub import list_models
from zoo.metrics import FeatureClassifier
from zoo.module import ZooModule

__all__ = ["list_everything"]


def list_everything(argv: Sequence[str] = ()) -> None:
    """Print modules, data, strategies, configurations and shipped models (``zoo list``).

    Args:
        argv: words after the verb, of which there are none but ``--help``.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    about = "Print the models, data, strategies, configurations and shipped weights."
    argparse.ArgumentParser(prog="zoo list", description=about).parse_args(argv)
    console = Console()

    def names(package: Any, base: type) -> list[str]:
        return [n for n in package.__all__ if isinstance(getattr(package, n), type) and issubclass(getattr(package, n), base)]

    table = Table("kind", "name", "what it is", title="zoo")

    def row(*cells: str) -> None:
        table.add_row(*map(escape, cells))  # `[deepspeed]` is no markup

    for package in (zoo.bfn, zoo.ctr, zoo.emigm, zoo.ling, zoo.metrics):
        for name in names(package, ZooModule):
            row("model", name, (getattr(package, name).__doc__ or "").strip().split("\n")[0])
    for name in names(datamodules, LightningDataModule):
        row("data", name, (getattr(datamodules, name).__doc__ or "").strip().split("\n")[0])
    for name in strategies.__all__:
        row("strategy", name, (getattr(strategies, name).__doc__ or "").strip().split("\n")[0])
    for name, path in packaged_configs().items():
        head = path.read_text().split("\n", 1)[0]
        row("config", name, head.removeprefix("#").strip() if head.startswith("#") else "")
    for model in list_models():
        kind = "extractor" if issubclass(find_class(model.class_path, ZooModule), FeatureClassifier) else "weights"
        row(kind, model.name, f"{model.description} ({model.num_bytes / 2**20:.1f} MiB)")
    console.print(table)
