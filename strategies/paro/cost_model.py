"""Costs of a partition: memory of a device and seconds of an optimizer step.

Source: "Rethinking Memory and Communication Costs for Efficient Data Parallel Training of Large Language Models" (NeurIPS 2024),
sections 3.1.1 and 3.1.3 and appendix A.3, with the latency of each collective and the root unit, which is gathered once, added.
With latencies of 0 and no root unit the formulas are the paper's.

n devices in all, m of a group, n / m groups, s micro-batches of a step, U units. A collective of x bytes, of which each device
has or keeps a part, takes

=============  =============================================================================================
inside groups  ``(m - 1) (a' + x / m / B')``
between them   ``(n/m - 1) (a + x / n / B)``, each device with those at its place in the other groups
both           one after the other (``two_phase``); beside one another (``overlapped``), ``(n/m - 1) max(a + x/n/B,
               (m - 1) (a' + x/n/B')) + (m - 1) (a' + x/n/B')``; or in one ring of all devices in the order of their ranks,
               (``flat``), ``(n - 1) (a + x / n / B_flat)``
=============  =============================================================================================

where B is what one device sends while all of its group do. With a network card for each device that is the card's rate and
``B_flat = B``; with one card for a group it is a share of ``1 / m``, while a flat ring, in which one device of a group sends to
another group, has all of it.
"""

from dataclasses import dataclass

from strategies.paro.collectives import Method
from strategies.paro.partition import CODES, Granularity, Partition
from strategies.paro.volume import memory

__all__ = ["Cluster", "Cost", "Job", "LinkSpeed", "predict", "rank_partitions"]


@dataclass(frozen=True)
class LinkSpeed:
    """A class of connections.

    Attributes:
        bandwidth: Bytes per second that one device sends while all of its group do.
        latency: Seconds of a message without content.

    Raises:
        ValueError: Numbers out of range.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or self.latency < 0:
            raise ValueError(f"LinkSpeed: bandwidth={self.bandwidth} must be positive, latency={self.latency} not negative.")

    def seconds(self, num_bytes: float, num_messages: float) -> float:
        """Time of messages sent one after another."""
        return num_messages * self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """The devices and what connects them.

    Attributes:
        world_size: n, devices in all.
        group_size: m, devices of a group, which have fast links to one another.
        intra: Links inside a group.
        inter: Links between groups.
        flat: Links between groups as a ring of all devices sees them; None: as ``inter``.
        memory: Bytes of a device; None: without limit.

    Raises:
        ValueError: The groups do not divide the devices.
    """

    world_size: int
    group_size: int
    intra: LinkSpeed
    inter: LinkSpeed
    flat: LinkSpeed | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.group_size < 1 or self.world_size % self.group_size:
            raise ValueError(f"Cluster: group_size={self.group_size} must divide world_size={self.world_size}.")

    @classmethod
    def with_one_card_a_group(
        cls, world_size: int, group_size: int, intra: LinkSpeed, card: LinkSpeed, memory: float | None = None
    ) -> "Cluster":
        """A cluster whose groups each have one network card, which their devices share.

        Args:
            world_size: n.
            group_size: m.
            intra: Links inside a group.
            card: The card, with its whole rate.
            memory: Bytes of a device.
        """
        share = LinkSpeed(card.bandwidth / group_size, card.latency)
        return cls(world_size, group_size, intra, share, card, memory)

    @property
    def num_groups(self) -> int:
        """n / m."""
        return self.world_size // self.group_size

    def ways(self, granularity: Granularity) -> int:
        """Into how many parts a state is divided."""
        return {"N": 1, "I": self.group_size, "G": self.world_size}[granularity]

    def intra_seconds(self, num_bytes: float, calls: float = 1) -> float:
        """Gather or reduce-scatter inside groups.

        Args:
            num_bytes: x, of the whole, in all calls together.
            calls: Number of collectives.
        """
        steps = self.group_size - 1
        return self.intra.seconds(steps * num_bytes / self.group_size, steps * calls)

    def inter_seconds(self, num_bytes: float, calls: float = 1) -> float:
        """The same between groups, of which each device moves its m-th part."""
        steps = self.num_groups - 1
        return self.inter.seconds(steps * num_bytes / self.world_size, steps * calls)

    def world_seconds(self, num_bytes: float, calls: float = 1, method: Method = "overlapped") -> float:
        """The same over all devices."""
        if method == "two_phase" or 1 in (self.group_size, self.num_groups):
            return self.intra_seconds(num_bytes, calls) + self.inter_seconds(num_bytes, calls)
        if method == "flat":
            steps = self.world_size - 1
            return (self.flat or self.inter).seconds(steps * num_bytes / self.world_size, steps * calls)
        block, steps = num_bytes / self.world_size, self.group_size - 1
        inside = self.intra.seconds(steps * block, steps * calls)
        return (self.num_groups - 1) * max(self.inter.seconds(block, calls), inside) + inside


@dataclass(frozen=True)
class Job:
    """The training to plan for.

    Attributes:
        parameters: Number of parameters, frozen ones included.
        trainable: Number of those that are trained; None: all.
        micro_batches: s, of an optimizer step.
        units: Number of units, each of which is one collective; the root unit included.
        root: Parameters of the root unit, which stays gathered from the beginning of a micro-batch to its end.
        parameter_bytes: Bytes of a parameter, in memory and on the wire.
        gradient_bytes: Bytes of a gradient on the wire.
        accumulator_bytes: Bytes of a gradient in memory.
        state_bytes: Bytes of master weight and optimizer state of a trained parameter.
        activation_bytes: Memory for anything else.
        compute_seconds: Forward and backward passes of a step, of all micro-batches.
        update_seconds: The optimizer's update of all parameters on one device.
        overlap: Share of communication or computation, the shorter of them, that is hidden behind the other; the paper assumes 1.

    Raises:
        ValueError: Numbers out of range.
    """

    parameters: float
    trainable: float | None = None
    micro_batches: int = 1
    units: int = 1
    root: float = 0.0
    parameter_bytes: float = 2.0
    gradient_bytes: float = 2.0
    accumulator_bytes: float = 2.0
    state_bytes: float = 12.0
    activation_bytes: float = 0.0
    compute_seconds: float = 0.0
    update_seconds: float = 0.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if self.parameters <= 0 or self.micro_batches < 1 or self.units < 1 or not 0 <= self.root <= self.parameters:
            raise ValueError(
                f"Job: parameters={self.parameters:g} must be positive, micro_batches={self.micro_batches} and units={self.units}"
                f" at least 1, root={self.root:g} not more than the parameters."
            )
        if not 0 <= self.num_trainable <= self.parameters:
            raise ValueError(f"Job: trainable={self.trainable} must lie between 0 and parameters={self.parameters:g}.")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"Job: overlap={self.overlap} must lie in [0, 1].")

    @property
    def num_trainable(self) -> float:
        """Number of parameters that are trained."""
        return self.parameters if self.trainable is None else self.trainable


@dataclass(frozen=True)
class Cost:
    """Costs of a partition on a cluster.

    Attributes:
        partition: Its code.
        memory: Bytes of a device: parameters, gradients, states and what the job adds. Gathered units come on top.
        fits: Whether the device has as many.
        parameter_seconds: Gathering parameters for one micro-batch.
        gradient_seconds: Reducing gradients after one micro-batch.
        update_seconds: What is exchanged once in a step: gradients to where the states are, new parameters back.
        communication_seconds: All of it in a step.
        step_seconds: A step, with computation.
    """

    partition: str
    memory: float
    fits: bool
    parameter_seconds: float
    gradient_seconds: float
    update_seconds: float
    communication_seconds: float
    step_seconds: float


def predict(partition: Partition, cluster: Cluster, job: Job, method: Method = "overlapped") -> Cost:
    """The cost of one partition.

    Args:
        partition: What is divided, and how finely.
        cluster: Where.
        job: What is trained.
        method: How collectives over all devices run.
    """
    p, g, states = partition.parameters, partition.gradients, partition.optimizer
    trained = job.num_trainable

    def world(num_bytes: float, calls: float = job.units) -> float:
        return cluster.world_seconds(num_bytes, calls, method)

    def inside(num_bytes: float, calls: float = job.units) -> float:
        return cluster.intra_seconds(num_bytes, calls)

    def between(num_bytes: float, calls: float = job.units) -> float:
        return cluster.inter_seconds(num_bytes, calls)

    gathered, gatherings = job.parameter_bytes * (2 * job.parameters - job.root), 2 * job.units - (1 if job.root else 0)
    parameter_seconds = {"N": 0.0, "I": inside(gathered, gatherings), "G": world(gathered, gatherings)}[p]
    grads, weights = job.gradient_bytes * trained, job.parameter_bytes * trained
    gradient_seconds = {"N": 0.0, "I": inside(grads), "G": world(grads)}[g]
    to_states = {
        "NN": 2 * world(grads), "NI": inside(grads) + 2 * between(grads), "NG": world(grads), "II": 2 * between(grads),
        "IG": between(grads), "GG": 0.0,
    }[g + states]  # fmt: skip
    to_parameters = {
        "NN": 0.0, "II": 0.0, "GG": 0.0, "NI": inside(weights), "IG": between(weights), "NG": world(weights),
    }[p + states]  # fmt: skip
    update_seconds = to_states + to_parameters
    communication = (parameter_seconds + gradient_seconds) * job.micro_batches + update_seconds
    computation = job.compute_seconds
    step = max(communication, computation) + (1 - job.overlap) * min(communication, computation)
    kept = memory(
        partition, n=cluster.world_size, m=cluster.group_size, psi=job.parameters, psi_trainable=trained,
        bytes_p=job.parameter_bytes, bytes_g=job.accumulator_bytes, bytes_optimizer=job.state_bytes,
    )  # fmt: skip
    needed = kept.total + job.activation_bytes
    return Cost(
        str(partition),
        needed,
        cluster.memory is None or needed <= cluster.memory,
        parameter_seconds,
        gradient_seconds,
        update_seconds,
        communication,
        step + job.update_seconds / cluster.ways(states),
    )


def rank_partitions(cluster: Cluster, job: Job, method: Method = "overlapped") -> list[Cost]:
    """All partitions: those that fit first, the fastest first; of equally fast ones that with the least memory.

    Times that differ by less than a millionth count as equal.

    Args:
        cluster: Where.
        job: What is trained.
        method: How collectives over all devices run.
    """
    costs = [predict(Partition.of(code), cluster, job, method) for code in CODES]
    return sorted(costs, key=lambda cost: (not cost.fits, float(f"{cost.step_seconds:.6e}"), cost.memory))
