"""The parser: errors in one sentence, integers before fractions, entries of named architectures."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from operator import or_
from typing import Any, NoReturn, get_args

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from zoo.base.hyperparameters import class_path
from zoo.base.option_errors import explain
from zoo.base.parsing import our_parsing
from zoo.base.presets import presets_of
from zoo.cli.verbs import VERBS
from zoo.hub import import_everything

__all__ = ["ZooArgumentParser"]


class ZooArgumentParser(LightningArgumentParser):
    """Parser whose errors are one sentence with the nearest name, instead of a list of types.

    Args:
        args: Arguments of the parser of Lightning.
        example: Configuration that holds what is required, for the error that names what is missing.
        kwargs: Arguments of the parser of Lightning.
    """

    # What reads signatures or imports what a value names.
    add_class_arguments = our_parsing()(LightningArgumentParser.add_class_arguments)
    add_subclass_arguments = our_parsing()(LightningArgumentParser.add_subclass_arguments)
    instantiate_classes = our_parsing()(LightningArgumentParser.instantiate_classes)
    save = our_parsing()(LightningArgumentParser.save)

    def __init__(self, *args: Any, example: str = "-c bfn/digits (`zoo list` shows all)", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.allow_abbrev = False  # a shortened option would slip past the order of precedence

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what is near, and exit with status 2.

        Raises:
            SystemExit: Always, unless the parser raises its errors.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if os.environ.get("ZOO_TRACEBACK"):
            sys.stderr.write(message + "\n")
        import_everything()  # the nearest name may be that of any class
        sys.stderr.write(f"error: {explain(message, self._all_options(), self.example, VERBS)}\n")
        raise SystemExit(2)

    @override
    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, an integer tried before a fraction: one batch is not all of them.

        typing holds ``Union[int, float]`` and ``Union[float, int]`` for equal and hands out whichever was made first, so that
        the order in which modules are imported would decide whether ``--trainer.limit_val_batches 1`` is 1 or 1.0.
        """
        added = super().add_lightning_class_args(*args, **kwargs)
        for action in self._actions:
            if (typehint := getattr(action, "_typehint", None)) is not None:
                action._typehint = _integers_first(typehint)  # type: ignore[attr-defined]
        return added

    @override
    @our_parsing()
    def parse_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None, *rest: Any, **kwargs: Any
    ) -> Namespace:
        """Parse, where one entry of an architecture that is given by its name changes this entry, and no other."""
        words = [word for word in args or () if isinstance(word, str)]
        if any(re.fullmatch(r"-h|--help|--([\w.+]+\.)?help(=.*)?|--print_completion(=.*)?", word) for word in words):
            import_everything()  # help lists the subclasses that are known
        for action in self._actions:
            if not any(word.startswith(f"--{action.dest}.") for word in words):
                continue
            before = (namespace or {}).get(action.dest, action.default)
            found = presets_of(getattr(action, "_typehint", None)).get(before) if isinstance(before, str) else None
            if found is not None:
                namespace = namespace or Namespace()
                namespace[action.dest] = Namespace(class_path=class_path(type(found)), init_args=Namespace(asdict(found)))
        return super().parse_args(args, namespace, *rest, **kwargs)

    def _all_options(self) -> list[str]:
        names = []
        for action in self._actions:
            names += [name.lstrip("-") for name in action.option_strings]
            if isinstance(action.choices, Mapping):  # subcommands
                for parser in action.choices.values():
                    names += parser._all_options() if isinstance(parser, ZooArgumentParser) else []
        return names


def _integers_first(typehint: Any) -> Any:
    """The union with int before float, if it has both the other way round."""
    members = list(get_args(typehint))
    if not {int, float} <= set(members) or members.index(int) < members.index(float):
        return typehint
    members.remove(float)
    members.insert(members.index(int) + 1, float)
    return reduce(or_, members)  # not by Union[...], which would look the other order up again
