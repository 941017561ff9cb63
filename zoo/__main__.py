"""``zoo`` and ``python -m zoo``."""

import os
import sys
import traceback

from zoo.base.own_packages import foreign_package, search_current_folder_last
from zoo.cli.process import tune_process


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: words after ``zoo``; default is the process's.

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
    if argv[:1] == ["serve-data"]:  # a server of its own, without torch and Lightning
        from strategies.antdt import server

        return server.main(argv[1:])
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        _run(argv)
    except SIGTERMException as stop:
        if stop.code:  # a strategy wants the launcher to start the processes again
            print("Stopped after saving, to be started again.", file=sys.stderr)
            return int(stop.code)
        print("Stopped by SIGTERM after saving; the same command with --ckpt_path last continues.", file=sys.stderr)
        return 143
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("ZOO_TRACEBACK"):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def _run(argv: list[str]) -> None:
    verb = argv[0] if argv else "--help"
    if verb == "list":
        from zoo.cli.listing import list_everything

        list_everything(argv[1:])
    elif verb == "assets":
        from zoo.cli.assets import assets

        assets(argv[1:])
    elif verb == "convert":
        from zoo.cli.convert import convert

        convert(argv[1:])
    elif verb == "plan":
        from zoo.cli.plan import plan

        plan(argv[1:])
    elif verb == "simulate":
        from zoo.cli.simulate import simulate

        simulate(argv[1:])
    else:
        from zoo.cli.command import ZooCLI

        ZooCLI(argv)


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
