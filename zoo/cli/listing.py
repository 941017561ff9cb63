"""The verb ``zoo list``."""

import argparse
import ast
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoo.base.sources import definition, derives_from, public_names, rooms
from zoo.cli.configs import packaged_configs
from zoo.hub import list_models

__all__ = ["list_everything"]


def list_everything(argv: Sequence[str] = ()) -> None:
    """Print modules, data, strategies, configurations and shipped models, from the sources: nothing is imported.

    Args:
        argv: Words after the verb: none but ``--help``.
    """
    about = "Print the models, data, strategies, configurations and shipped weights."
    argparse.ArgumentParser(prog="zoo list", description=about).parse_args(argv)
    table = Table("kind", "name", "what it is", title="zoo")

    def row(*cells: str) -> None:
        table.add_row(*map(escape, cells))  # `[deepspeed]` is no markup

    def classes(kind: str, room: str, base: str = "") -> None:
        for name in public_names(room):
            found = definition(room, name)
            if found is not None and (not base or derives_from(room, name, base)):
                row(kind, name, (ast.get_docstring(found[1]) or "").partition("\n")[0])

    for room in rooms():
        if room.startswith("zoo."):
            classes("model", room, "ZooModule")
    classes("data", "datamodules")
    classes("strategy", "strategies")
    for name, path in packaged_configs().items():
        head = path.read_text().partition("\n")[0]
        row("config", name, head.removeprefix("#").strip() if head.startswith("#") else "")
    for model in list_models():
        row(model.kind, model.name, f"{model.description} ({model.num_bytes / 2**20:.1f} MiB)")
    Console().print(table)
