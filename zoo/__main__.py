"""``zoo`` and ``python -m zoo``."""

import importlib
import os
import sys
import traceback

from zoo.base.own_packages import foreign_package, search_current_folder_last
from zoo.cli.process import tune_process
from zoo.cli.verbs import VERBS, print_overview


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Words after ``zoo``; default is the process's.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong input, 143 stopped by SIGTERM after saving; or what a strategy
        asks its launcher for.
    """
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # those of Lightning's own calls
    os.environ.setdefault("JSONARGPARSE_ADD_PRINT_COMPLETION_ARGUMENT", "true")  # zoo --print_completion
    tune_process()
    search_current_folder_last()  # classes of the user's folder are found by name
    if sentence := foreign_package():
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    try:
        return _run(argv)
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("ZOO_TRACEBACK"):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help", "--version"):
        print_overview([verb])
    handler = VERBS[verb].handler if verb in VERBS else ""
    module, _, function = (handler or "zoo.cli.command:run").partition(":")
    return getattr(importlib.import_module(module), function)(argv[1:] if handler else argv) or 0


def _message(error: BaseException) -> str | None:
    """Message of an error that our own code raised for the user, else None; ``ZOO_TRACEBACK=1`` shows where."""
    home = _home(error)
    if home in ("zoo", "datamodules", "strategies") and isinstance(
        error, ValueError | TypeError | RuntimeError | OSError | ImportError
    ):
        return str(error)
    # The parser wraps what the constructor of a component says.
    return _message(error.__cause__) if home == "jsonargparse" and error.__cause__ is not None else None


def _home(error: BaseException) -> str:
    """Package that raised the error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").partition(".")[0] if frames else ""


if __name__ == "__main__":
    sys.exit(main())
