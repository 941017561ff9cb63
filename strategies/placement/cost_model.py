"""Costs of a plan: memory of a device and seconds of a rollout with its training.

Source: Xiao et al., arXiv 2312.11819; the formulas are our own, for placements as `RankPlacement` runs them. Collectives are
rings over their ranks, ``(n - 1) (latency + x / n / B)`` for a gather of x bytes, at the speed of the slowest link between
them; nothing of them is assumed to be hidden behind computation. For a rollout of R samples in M chunks

=================  ====================================================================================================
one side           ``infer(R) + train(R)``, where ``infer`` is that of the slowest rank: generation, its share of each role's
                   passes, gathers, and the exchange
separated, lag 0   ``sync + infer(R/M) + train(R/M) + (M - 1) max(both)``, and later epochs
separated, lag     ``sync + max(infer(R), train(R))``
=================  ====================================================================================================
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from strategies.placement.exchange import owners_of_rows
from strategies.placement.plan import PlacementPlan

if TYPE_CHECKING:
    from strategies.paro.cost_model import Cluster, LinkSpeed

__all__ = ["Prediction", "RoleCost", "Workload", "at", "kept_bytes", "pipelined", "predict"]

Terms = dict[str, float]
TRAINED = ("actor", "critic")


@dataclass(frozen=True)
class Workload:
    """A rollout and its training.

    Attributes:
        samples: R, answers of a rollout.
        prompt_tokens: P.
        new_tokens: N.
        minibatches: Optimizer steps of a pass over a rollout.
        epochs: Passes over a rollout.
        unit: Samples that pass a network together.

    Raises:
        ValueError: Numbers out of range, or samples that do not divide.
    """

    samples: int
    prompt_tokens: int
    new_tokens: int
    minibatches: int = 4
    epochs: int = 1
    unit: int = 4

    def __post_init__(self) -> None:
        if wrong := [name for name, value in vars(self).items() if value < 1]:
            raise ValueError(f"Workload: {wrong[0]}={getattr(self, wrong[0])} must be at least 1.")
        if self.samples % (self.minibatches * self.unit):
            raise ValueError(
                f"Workload: samples={self.samples} must be a multiple of minibatches x unit = {self.minibatches * self.unit}."
            )


@dataclass(frozen=True)
class RoleCost:
    """Size and times of a model.

    Attributes:
        parameters: Number of parameters.
        trained: Number of those that are trained; 0 for frozen models.
        layers: L, blocks that are gathered one by one.
        root: Parameters outside of all blocks.
        hidden: Width.
        vocabulary: Rows of the output head; 0: a scalar head.
        parameter_bytes: Bytes of a parameter; bf16 with masters 2, float32 4.
        gradient_bytes: Bytes of a gradient; 2 or 4.
        state_bytes: Bytes of optimizer state and master of a trained parameter; with Adam 12 or 8.
        prefill: Seconds of reading prompts with the first token, by samples.
        decode: Seconds of a further token, by samples.
        score: Seconds of a forward pass over prompt and answer, by samples.
        train: Seconds of forward and backward pass, by samples.
        update: Seconds of an optimizer step on all trained parameters.
        slowest: Time of the slowest of several ranks over that of all on average; those that wait for one another take it.
        repeat: Factor of all times; the number of layers where they are of one.

    Raises:
        ValueError: Numbers out of range.
    """

    parameters: float
    trained: float = 0.0
    layers: int = 1
    root: float = 0.0
    hidden: int = 0
    vocabulary: int = 0
    parameter_bytes: float = 4.0
    gradient_bytes: float = 4.0
    state_bytes: float = 8.0
    prefill: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)
    score: dict[int, float] = field(default_factory=dict)
    train: dict[int, float] = field(default_factory=dict)
    update: float = 0.0
    slowest: float = 1.0
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.parameters < 0 or not 0 <= self.trained <= self.parameters or not 0 <= self.root <= self.parameters:
            raise ValueError(
                f"RoleCost: trained={self.trained:g} and root={self.root:g} must lie in 0 to parameters={self.parameters:g}."
            )
        if self.layers < 1 or self.repeat < 1:
            raise ValueError(f"RoleCost: layers={self.layers} and repeat={self.repeat} must be at least 1.")

    def seconds(self, operation: str, samples: float, ranks: int = 1) -> float:
        """Time of ``prefill``, ``decode``, ``score`` or ``train``, for samples of each of ranks that wait for one another."""
        return self.repeat * at(getattr(self, operation), samples) * (self.slowest if ranks > 1 else 1.0)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all parameters."""
        return self.parameters * self.parameter_bytes


def at(curve: Mapping[int, float], samples: float) -> float:
    """Times between and beyond measured ones, linearly; of one measured point in proportion, of none 0.

    Example:
        >>> at({1: 3.0, 4: 6.0}, 2), at({4: 8.0}, 2)
        (4.0, 4.0)
    """
    if not curve or not samples:
        return 0.0
    points = sorted((float(size), seconds) for size, seconds in curve.items())
    if len(points) == 1:
        return points[0][1] * samples / points[0][0]
    place = min(max(sum(size < samples for size, _ in points), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return max(0.0, y0 + (y1 - y0) * (samples - x0) / (x1 - x0))


def pipelined(stages: Sequence[float], chunks: int) -> float:
    """Seconds until all chunks have passed all stages, each of which works on one at a time."""
    return sum(stages) + (chunks - 1) * max(stages)


def kept_bytes(role: RoleCost, ranks: int = 1) -> float:
    """Bytes of parameters, gradients and optimizer state of a role on each of so many ranks that divide it."""
    return (role.weight_bytes + role.trained * (role.gradient_bytes + role.state_bytes)) / ranks


@dataclass(frozen=True)
class Prediction:
    """Predicted costs of a plan.

    Attributes:
        plan: The plan.
        seconds: Of a rollout with its training.
        memory: Bytes of the device that needs most.
        fits: Whether it has as many.
        idle: Share of all ranks' time in which they wait.
        terms: Seconds by kind of work: on each side those of its slowest rank.
    """

    plan: PlacementPlan
    seconds: float
    memory: float
    fits: bool
    idle: float
    terms: Terms


class _Costs:
    """A plan on a cluster, part by part."""

    def __init__(self, plan: PlacementPlan, cluster: "Cluster", job: Workload, roles: Mapping[str, RoleCost]) -> None:
        self.plan, self.cluster, self.job, self.roles = plan, cluster, job, roles
        self.world = cluster.world_size
        self.trained = [name for name in TRAINED if name in roles]
        self.generators = plan.members("rollout_actor", self.world)
        self.inferring, self.training = plan.inferring(self.world), plan.training(self.world)
        if any(plan.roles[name].backend == "paro" for name in self.trained):
            raise ValueError("The planner predicts no plan with PaRO: compare its codes for one model with zoo plan paro.")

    def divided(self, role: str) -> bool:
        return self.plan.roles[role].backend == "fsdp2" and len(self.plan.members(role, self.world)) > 1

    def sum_bytes(self, role: str) -> float:
        """Bytes of a parameter's gradient where it is added over passes and ranks, beside the gradient of a pass."""
        return 8.0 if self.plan.roles[role].backend == "replicate" else self.roles[role].gradient_bytes

    def link(self, ranks: Sequence[int]) -> "LinkSpeed":
        inside = len({rank // self.cluster.group_size for rank in ranks}) == 1
        return self.cluster.intra if inside else self.cluster.flat or self.cluster.inter

    def ring(self, ranks: Sequence[int], num_bytes: float, calls: float = 1) -> float:
        """Seconds of a gather or reduce-scatter."""
        steps = len(ranks) - 1
        return self.link(ranks).seconds(steps * num_bytes / len(ranks), steps * calls)

    def gather(self, role: str, passes: float, train: bool = False) -> float:
        """Gathers of passes; the root stays whole between passes without gradients, and to the end of one with them."""
        cost, ranks = self.roles[role], self.plan.members(role, self.world)
        blocks, root = cost.weight_bytes - cost.root * cost.parameter_bytes, cost.root * cost.parameter_bytes
        if train:
            return self.ring(ranks, passes * (2 * blocks + root), passes * (2 * cost.layers + 1))
        return self.ring(ranks, passes * blocks + root, passes * cost.layers + 1)

    def scored(self) -> list[tuple[str, str, float]]:
        """Roles that score, where, and bytes of a sample's result."""
        tokens = 4.0 * self.job.new_tokens
        asked = [("actor", "rollout_actor", tokens), ("reference", "reference", tokens), ("reward", "reward", 4.0)]
        asked.append(("critic", "rollout_critic", tokens))
        return [each for each in asked if each[0] in self.roles]

    def infer(self, rows: int) -> dict[int, Terms]:
        """Generation and scoring of so many samples, by rank."""
        job, plan, unit = self.job, self.plan, self.job.unit
        found: dict[int, Terms] = {rank: defaultdict(float) for rank in self.inferring}
        own, actor = owners_of_rows(rows, unit, self.generators, self.generators), self.roles["actor"]
        sharded = {name: not plan.separates and self.divided(name) for name in self.trained}
        for rank, mine in own.items():
            decoded = (job.new_tokens - 1) * actor.seconds("decode", len(mine), len(found))
            found[rank]["generate"] += actor.seconds("prefill", len(mine), len(found)) + decoded
            if sharded["actor"]:
                found[rank]["gather"] += self.gather("actor", job.new_tokens if plan.gather == "per_token" else 1)
        self._share(found, own, 8.0 * job.new_tokens)
        for role, place, row_bytes in self.scored():
            taken = owners_of_rows(rows, unit, plan.members(place, self.world), self.generators)
            for rank, mine in taken.items():
                passes = math.ceil(len(mine) / unit)
                found[rank]["score"] += passes * self.roles[role].seconds("score", unit, len(found))
                if sharded.get(role) and not (role == "actor" and plan.gather == "resident"):
                    found[rank]["gather"] += self.gather(role, passes)
            self._share(found, taken, row_bytes)
        if plan.separates:
            width = 8.0 * job.new_tokens + sum(row_bytes for _, _, row_bytes in self.scored())
            times = math.ceil(len(self.training) / len(self.inferring))
            for terms in found.values():
                terms["exchange"] += self.link(range(self.world)).seconds(times * rows * width, times)
        return found

    def _share(self, found: Mapping[int, Terms], rows: Mapping[int, Sequence[int]], row_bytes: float) -> None:
        others = len(found) - 1
        most = max(len(mine) for mine in rows.values())
        for terms in found.values():
            terms["exchange"] += self.link(self.inferring).seconds(others * most * row_bytes, others)

    def train(self) -> dict[int, Terms]:
        """All steps on a rollout in one epoch, by rank."""
        job = self.job
        found: dict[int, Terms] = {rank: defaultdict(float) for rank in self.training}
        for role in self.trained:
            cost, ranks, divided = self.roles[role], self.plan.members(role, self.world), self.divided(role)
            passes = job.samples / job.minibatches / job.unit / len(ranks)
            sums = cost.trained * (cost.gradient_bytes if divided else 2 * self.sum_bytes(role))
            gradients = self.ring(ranks, sums, cost.layers if divided else 1)
            for rank in ranks:
                update = cost.repeat * cost.update / (len(ranks) if divided else 1)
                found[rank]["train"] += job.minibatches * (passes * cost.seconds("train", job.unit, len(ranks)) + update)
                found[rank]["gradients"] += job.minibatches * gradients
                if divided:
                    found[rank]["gather"] += job.minibatches * self.gather(role, passes, train=True)
        return found

    def again(self) -> float:
        """Log-probabilities of a rollout that older weights generated, under the weights of now."""
        job, ranks = self.job, self.plan.members("actor", self.world)
        passes = job.samples / job.unit / len(ranks)
        gathered = self.gather("actor", passes) if self.divided("actor") else 0.0
        summed = self.ring(ranks, 2 * 4.0 * job.samples * job.new_tokens)
        return passes * self.roles["actor"].seconds("score", job.unit, len(ranks)) + gathered + summed

    def sync(self) -> float:
        """Trained weights to the ranks that generate, or to the resident copy."""
        if not self.plan.separates:
            resident = self.plan.gather == "resident" and self.divided("actor")
            return self.gather("actor", 1) if resident else 0.0
        seconds = 0.0
        for role in self.trained:
            cost, ranks = self.roles[role], self.plan.members(role, self.world)
            num_bytes = cost.trained * cost.parameter_bytes
            receivers = self.plan.members(f"rollout_{role}", self.world)
            buckets = math.ceil(num_bytes / (self.plan.bucket_mb * 2**20))
            seconds += self.link([ranks[0], *receivers]).seconds(num_bytes, buckets * len(receivers))
            seconds += self.ring(ranks, num_bytes, cost.layers) if self.divided(role) else 0.0
        return seconds

    def memory(self, rank: int) -> float:
        """Peak bytes of a rank: what it keeps, and the larger of what generation and training need beside it."""
        job, plan, tokens = self.job, self.plan, self.job.prompt_tokens + self.job.new_tokens
        kept = generate = train = 0.0
        for name, cost in self.roles.items():
            ranks, width = plan.members(name, self.world), cost.parameter_bytes
            divided = name in self.trained and self.divided(name)
            logits = job.unit * job.new_tokens * cost.vocabulary * (width + 4)
            block = cost.root * width + (cost.parameters - cost.root) * width / cost.layers
            if rank in ranks:
                kept += kept_bytes(cost, len(ranks) if divided else 1)
            if name in self.trained and rank in ranks:
                activations = job.unit * tokens * cost.hidden * cost.layers * width
                # Float64 sums, buckets of DDP, or gradients before they divide.
                beside = cost.trained * self.sum_bytes(name)
                train = max(train, activations + logits + beside + (block if divided else 0.0))
            if name in self.trained and plan.separates and rank in plan.members(f"rollout_{name}", self.world):
                kept += cost.weight_bytes
            if name == "actor" and rank in self.generators:
                rows = math.ceil(job.samples / plan.chunks / job.unit / len(self.generators)) * job.unit
                generate = 2 * cost.layers * cost.hidden * rows * tokens * width + logits
                if divided and not plan.separates:
                    kept += cost.weight_bytes if plan.gather == "resident" else 0.0
                    generate += {"once": cost.weight_bytes, "per_token": block, "resident": 0.0}[plan.gather]
        return kept + max(generate, train)


def predict(
    plan: PlacementPlan, cluster: "Cluster", job: Workload, roles: Mapping[str, RoleCost], cap: float = 0.9
) -> Prediction:
    """The costs of one plan.

    Args:
        plan: One that fits the cluster's number of devices.
        cluster: Devices, one a rank, and their links.
        job: The rollout.
        roles: The models: ``actor``, and what there is of ``critic``, ``reference`` and ``reward``.
        cap: Share of a device's memory that may be used.
    """
    costs = _Costs(plan, cluster, job, roles)
    infer, train, sync = costs.infer(job.samples // plan.chunks), costs.train(), costs.sync()
    again = costs.again() if plan.max_lag else 0.0
    inferring = plan.chunks * max(sum(terms.values()) for terms in infer.values())
    training = max(sum(terms.values()) for terms in train.values())
    later = (job.epochs - 1) * training
    if not plan.separates:
        seconds = sync + inferring + training + later
    elif plan.max_lag:
        seconds = sync + max(inferring, again + training + later)
    else:
        seconds = sync + pipelined([inferring / plan.chunks, training / plan.chunks], plan.chunks) + later
    terms: Terms = {"sync": sync} if sync else {}
    for side, times in ((infer, plan.chunks), (train, job.epochs)):
        for name, value in max(side.values(), key=lambda each: sum(each.values())).items():
            terms[name] = terms.get(name, 0.0) + times * value
    if again:
        terms["score"] += again
    busy = plan.chunks * sum(sum(each.values()) for each in infer.values()) + sync * costs.world
    busy += job.epochs * sum(sum(each.values()) for each in train.values()) + again * len(costs.training)
    memory = max(costs.memory(rank) for rank in range(costs.world))
    fits = cluster.memory is None or memory <= cap * cluster.memory
    idle = max(0.0, 1 - busy / (seconds * costs.world)) if seconds else 0.0
    return Prediction(plan, seconds, memory, fits, idle, terms)
