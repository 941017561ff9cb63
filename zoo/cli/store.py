"""The verb ``zoo store``."""

import argparse
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from zoo.cli.command import ZooCLI

__all__ = ["store"]

VERBS = {
    "build": "encode the texts of the data that the store lacks; make the store if there is none",
    "append": "the same, where a store is expected",
    "verify": "check the rows and the index of the store",
    "stats": "print the store's size and what its vectors depend on",
}


def store(argv: Sequence[str]) -> None:
    """``zoo store VERB -c CONFIG``: build, check or describe the store of a configuration's model, without a Trainer.

    Raises:
        ValueError: The model has no store, the data have no texts, or the store is empty or damaged.
    """
    parser = argparse.ArgumentParser(
        prog="zoo store",
        description="The store of text vectors of a configuration: zoo store build -c bahe/movielens. Options of model and data"
        " are those of `zoo fit`.",
        epilog="; ".join(f"{verb}: {text}" for verb, text in VERBS.items()),
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS)
    options, words = parser.parse_known_args(argv)
    built = _Components(["fit", *words])
    model: Any = built.model
    data: Any = built.datamodule
    for part, name, example in ((model, "fill_store", "BAHE"), (data, "text_fingerprint", "TextHistories")):
        if not hasattr(part, name):
            raise ValueError(f"zoo store: {type(part).__name__} knows no store of texts: take {example}.")
    data.prepare_data()
    opened = model.fill_store(data.atoms[:1], data.text_fingerprint)  # of the padding alone
    before = len(opened)
    if options.verb == "append" and not before:
        raise ValueError(f"{opened.folder} is empty: fill it with `zoo store build` first.")
    if options.verb in ("build", "append"):
        after = len(model.fill_store(data.atoms, data.text_fingerprint))
        print(f"{opened.folder}: {after:,} texts, {after - before:,} of them new")
    elif options.verb == "verify":
        print(f"{opened.folder}: {opened.verify():,} texts, rows and index are sound")
    else:
        for name, value in {"folder": opened.folder, **opened.stats()}.items():
            print(f"{name}: {value}")


class _Components(ZooCLI):
    """Model and data of a command, and nothing else."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass
