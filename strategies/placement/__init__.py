"""Placement: which ranks hold which of a module's models; generation, scoring and training divided over them."""

from strategies.placement.plan import BackEnd, PlacementPlan, RolePlan, place_slots
from strategies.placement.roles import RankPlacement
from strategies.placement.strategy import (
    FlatteningStrategy,
    InterleavingStrategy,
    PlacementStrategy,
    SeparationStrategy,
    read_plan,
    write_plan,
)
from strategies.placement.timeline import Span, Timeline, chrome_trace, idle_share

__all__ = [
    "BackEnd",
    "FlatteningStrategy",
    "InterleavingStrategy",
    "PlacementPlan",
    "PlacementStrategy",
    "RankPlacement",
    "RolePlan",
    "SeparationStrategy",
    "Span",
    "Timeline",
    "chrome_trace",
    "idle_share",
    "place_slots",
    "read_plan",
    "write_plan",
]
