"""Choice of the plan that takes the least time: all plans are tried, which are hundreds at most."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from strategies.placement.cost_model import Prediction, RoleCost, Workload, predict
from strategies.placement.plan import BackEnd, Gather, PlacementPlan

if TYPE_CHECKING:
    from strategies.paro.cost_model import Cluster

__all__ = ["explain", "name_of", "plans", "rank_plans"]


def plans(world: int, job: Workload, max_lag: int = 0) -> Iterator[PlacementPlan]:
    """Plans that fit a number of ranks and a rollout; none with PaRO, whose codes ``zoo plan paro`` compares.

    Args:
        world: Number of ranks.
        job: The rollout.
        max_lag: Rollouts by which generation may be ahead of training; what is trained then differs from that of lag 0.
    """
    units = job.samples // job.minibatches // job.unit
    backends: Sequence[BackEnd] = ("replicate", "ddp", "fsdp2") if world > 1 else ("replicate",)
    for backend in backends:
        gathers: Sequence[Gather] = get_args(Gather) if backend == "fsdp2" else ("once",)
        for gather in gathers if units % world == 0 else ():
            yield PlacementPlan.flattening(backend, gather)
            if world % 2 == 0:
                yield PlacementPlan.interleaving(world, backend, gather)
        for train in (count for count in range(1, world) if units % count == 0):
            if backend != "replicate" and train == 1:
                continue
            for chunks in (count for count in range(1, job.minibatches + 1) if job.minibatches % count == 0):
                yield PlacementPlan.separation(world, train, chunks, 0, backend)
            for lag in range(1, max_lag + 1):
                yield PlacementPlan.separation(world, train, 1, lag, backend)


def rank_plans(
    cluster: "Cluster", job: Workload, roles: Mapping[str, RoleCost], max_lag: int = 0, cap: float = 0.9
) -> list[Prediction]:
    """All plans: those that fit into memory first, the fastest first; of equally fast ones that with the least memory.

    Args:
        cluster: Devices, one a rank.
        job: The rollout.
        roles: Sizes and times of the models.
        max_lag: As of `plans`.
        cap: Share of a device's memory that may be used.

    Raises:
        ValueError: No plan divides the rollout, or there is no actor.
    """
    if "actor" not in roles or not roles["actor"].trained:
        raise ValueError("The planner needs the sizes and times of an actor that is trained.")
    if max_lag < 0 or not 0 < cap <= 1:
        raise ValueError(f"The planner: max_lag={max_lag} must be at least 0, cap={cap} in (0, 1].")
    world = cluster.world_size
    found = []
    for plan in plans(world, job, max_lag):
        plan.validate(world, list(roles))
        found.append(predict(plan, cluster, job, roles, cap))
    if not found:
        raise ValueError(
            f"No plan divides minibatches of {job.samples // job.minibatches} samples in units of {job.unit} over {world} ranks:"
            " take larger minibatches, a smaller unit, or other ranks."
        )
    return sorted(found, key=lambda each: (not each.fits, float(f"{each.seconds:.6e}"), each.memory, each.plan.max_lag))


def name_of(plan: PlacementPlan, world: int) -> str:
    """``flattening``, ``interleaving`` or ``separation`` with its numbers of ranks."""
    if plan.separates:
        return f"separation {len(plan.training(world))}+{len(plan.inferring(world))}"
    return "flattening" if len(plan.members("reference", world)) == world else "interleaving"


def explain(ranked: Sequence[Prediction], world: int) -> str:
    """One sentence on the first of ranked plans: its time, that of the next strategy, and what takes most of it."""
    best = ranked[0]
    name, term = name_of(best.plan, world), max(best.terms, key=lambda each: best.terms[each])
    text = f"{name} is predicted to take {best.seconds:.3g} s a rollout, {best.terms[term]:.3g} s of it to {_VERBS[term]}"
    other = next((each for each in ranked if each.fits and name_of(each.plan, world).split()[0] != name.split()[0]), None)
    if other is None:
        return text + "; no other strategy fits."
    rival = max(other.terms, key=lambda each: other.terms[each] - best.terms.get(each, 0.0))
    return (
        f"{text}; {name_of(other.plan, world)} would take {other.seconds:.3g} s, with {other.terms[rival]:.3g} s to"
        f" {_VERBS[rival]} and {other.idle:.0%} of the time idle."
    )


_VERBS = {
    "generate": "generate",
    "score": "score",
    "train": "train",
    "gather": "gather divided weights",
    "gradients": "add gradients",
    "exchange": "exchange samples",
    "sync": "bring weights",
}
