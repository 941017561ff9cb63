"""The verb ``zoo plan``: a table of planners."""

import argparse
import importlib
from collections.abc import Sequence

from zoo.cli.verbs import Verb

__all__ = ["PLANNERS", "plan"]

PLANNERS = {
    "paro": Verb("zoo.cli.plan_paro:plan_paro", "ways to divide parameters, gradients and optimizer state, by predicted time"),
    "rlhf": Verb("zoo.cli.plan_rlhf:plan_rlhf", "placements of actor, critic, reference and reward model, by predicted time"),
}


def plan(argv: Sequence[str]) -> None:
    """``zoo plan <what>``: hand the other words to a planner.

    Raises:
        ValueError: There is no such planner.
    """
    if argv and argv[0] in ("-h", "--help"):
        parser = argparse.ArgumentParser(
            prog="zoo plan", description="Predict memory and time of training on a cluster; `zoo plan paro --help` lists options."
        )
        planners = parser.add_subparsers(title="what can be planned", metavar="WHAT")
        for name, planner in PLANNERS.items():
            planners.add_parser(name, help=planner.summary)
        parser.parse_args(argv)
    if not argv or argv[0] not in PLANNERS:
        known = ", ".join(f"`{name}`" for name in PLANNERS)
        raise ValueError(f"{' '.join(['zoo plan', *argv])}: what can be planned is {known}, as in: zoo plan paro -c plan.yaml")
    module, _, function = PLANNERS[argv[0]].handler.partition(":")
    getattr(importlib.import_module(module), function)(argv[1:])
