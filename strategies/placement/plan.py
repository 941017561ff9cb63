"""Plans: which ranks hold which role, and by which back end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["BackEnd", "Gather", "PlacementPlan", "RolePlan", "place_slots", "ranks_text"]

BackEnd = Literal["replicate", "ddp", "fsdp2", "paro"]
Gather = Literal["per_token", "once", "resident"]

ROLES = ("actor", "critic", "reference", "reward", "rollout_actor", "rollout_critic")
_TRAINED = ("actor", "critic")
_COPIES = {"actor": "rollout_actor", "critic": "rollout_critic"}


@dataclass(frozen=True)
class RolePlan:
    """The place of one model.

    Attributes:
        ranks: ``all``, or numbers and ranges such as ``0-3`` or ``0,2,4-7``.
        backend: Of a trained role. ``replicate``: each rank has the whole model, and gradients are added in float64, so that the
            weights do not depend on the number of ranks; ``ddp``: the same by torch's DistributedDataParallel, which takes 4
            bytes a parameter less and half the traffic; ``fsdp2``: the ranks divide the model; ``paro``: they divide it by a
            code of PaRO.
        partition: The code, see `strategies.paro.PaROStrategy`.
        group_size: Ranks of a group of PaRO, consecutive ones of the role; 0: all.
    """

    ranks: str = "all"
    backend: BackEnd = "replicate"
    partition: str = "IIG"
    group_size: int = 0

    def members(self, world: int, name: str = "role") -> list[int]:
        """Global ranks, increasing.

        Args:
            world: Number of ranks.
            name: Named in messages.

        Raises:
            ValueError: If there are none, or others than 0 to ``world`` - 1.
        """
        if self.ranks == "all":
            return list(range(world))
        found: set[int] = set()
        for part in str(self.ranks).split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise ValueError(f"{name}: ranks={self.ranks!r} must be all, or numbers and ranges such as 0-3 or 0,2,4-7.")
            found |= set(range(int(first), int(last or first) + 1))
        if not found or max(found) >= world:
            raise ValueError(f"{name}: ranks={self.ranks!r} must be some of the ranks 0 to {world - 1} of this run.")
        return sorted(found)


@dataclass(frozen=True)
class PlacementPlan:
    """The places of all models, and the rhythm in which they work.

    Without ``rollout_actor`` and ``rollout_critic`` the ranks of actor and critic generate and score themselves. With them the
    ranks that train and those that infer are disjoint, and weights travel before each rollout.

    Attributes:
        roles: Place of each role: ``actor``, ``critic``, ``reference``, ``reward``, ``rollout_actor``, ``rollout_critic``.
        chunks: Parts in which a rollout is generated and trained; with disjoint ranks training begins with the first.
        max_lag: Rollouts by which generation may be ahead of training; 0: the result is that of any other placement.
        gather: Whole weights of a divided actor that generates itself: block by block for each token (ZeRO-3), once for a
            rollout, or in a copy that stays (``resident``).
        bucket_mb: Megabytes of weights that travel at a time.
    """

    roles: Mapping[str, RolePlan] = field(default_factory=dict)
    chunks: int = 1
    max_lag: int = 0
    gather: Gather = "once"
    bucket_mb: int = 100

    # Plans of the paper

    @classmethod
    def flattening(cls, backend: BackEnd = "replicate", gather: Gather = "once") -> "PlacementPlan":
        """All models on all ranks."""
        roles = {name: RolePlan("all", backend if name in _TRAINED else "replicate") for name in ROLES[:4]}
        return cls(roles, gather=gather)

    @classmethod
    def interleaving(cls, world: int, backend: BackEnd = "replicate", gather: Gather = "once") -> "PlacementPlan":
        """Actor and critic on all ranks, the reference on the first half, the reward model on the second.

        Raises:
            ValueError: If the number of ranks is odd.
        """
        if world % 2:
            raise ValueError(f"Interleaving needs an even number of ranks, not {world}: start one more or one less.")
        placed = place_slots({"actor": 1, "critic": 1, "reference": Fraction(1, 2), "reward": Fraction(1, 2)}, world)
        roles = {name: RolePlan(ranks_text(placed[name]), backend if name in _TRAINED else "replicate") for name in placed}
        return cls(roles, gather=gather)

    @classmethod
    def separation(
        cls, world: int, train: int, chunks: int = 1, max_lag: int = 0, backend: BackEnd = "replicate"
    ) -> "PlacementPlan":
        """The first ranks train actor and critic, the others generate and score.

        Args:
            world: Number of ranks.
            train: Number of ranks that train.
            chunks: As of the plan.
            max_lag: As of the plan.
            backend: Of the trained models.

        Raises:
            ValueError: If one of the two sides has no rank.
        """
        if not 0 < train < world:
            raise ValueError(f"Separation of {world} ranks into {train} that train and {world - train} others: both need one.")
        trained = {name: RolePlan(ranks_text(range(train)), backend) for name in _TRAINED}
        others = {name: RolePlan(ranks_text(range(train, world))) for name in ROLES[2:]}
        return cls({**trained, **others}, chunks, max_lag)

    # Questions

    @property
    def separates(self) -> bool:
        """Whether other ranks generate than train."""
        return "rollout_actor" in self.roles

    def members(self, role: str, world: int) -> list[int]:
        """Ranks that hold a role; of a copy that the plan does not name, those of the original; empty: nobody."""
        original = {copy: name for name, copy in _COPIES.items()}
        named = role if role in self.roles else original.get(role, role)
        return self.roles[named].members(world, named) if named in self.roles else []

    def inferring(self, world: int) -> list[int]:
        """Ranks that generate and score."""
        names = ("rollout_actor", "rollout_critic", "reference", "reward")
        return sorted({rank for name in names for rank in self.members(name, world)})

    def training(self, world: int) -> list[int]:
        """Ranks that train."""
        return sorted({rank for name in _TRAINED for rank in self.members(name, world)})

    def validate(self, world: int, needed: Sequence[str]) -> None:
        """Refuse plans that do not fit the run.

        Args:
            world: Number of ranks.
            needed: Roles that the module has.

        Raises:
            ValueError: If a role is unknown, missing or without ranks, sides overlap, ranks are idle, rank 0 does not train the
                actor, or numbers are out of range.
        """
        if unknown := sorted(set(self.roles) - set(ROLES)):
            raise ValueError(f"The plan has a place for {', '.join(unknown)}: the roles are {', '.join(ROLES)}.")
        if lacking := [name for name in needed if not self.members(name, world)]:
            raise ValueError(f"The plan has no ranks for {', '.join(lacking)}: give each role of the module some.")
        if self.chunks < 1 or self.max_lag < 0 or self.bucket_mb < 1:
            raise ValueError(
                f"The plan: chunks={self.chunks} and bucket_mb={self.bucket_mb} must be at least 1, max_lag={self.max_lag} at"
                " least 0."
            )
        if 0 not in self.members("actor", world):
            raise ValueError("The plan: rank 0, which writes checkpoints and logs, must be one of the actor's ranks.")
        for name, plan in self.roles.items():
            if plan.backend not in get_args(BackEnd):
                raise ValueError(f"{name}: backend={plan.backend!r} must be one of {', '.join(get_args(BackEnd))}.")
            if plan.backend != "replicate" and name not in _TRAINED:
                raise ValueError(f"{name}: backend={plan.backend} is for actor and critic where they are trained: leave it out.")
            if plan.backend != "paro" and plan != RolePlan(plan.ranks, plan.backend):
                raise ValueError(f"{name}: partition and group_size are for backend=paro, not {plan.backend}: leave them out.")
            if plan.group_size < 0 or (plan.group_size and len(self.members(name, world)) % plan.group_size):
                raise ValueError(
                    f"{name}: group_size={plan.group_size} must divide its {len(self.members(name, world))} ranks, or be 0."
                )
        if self.gather not in get_args(Gather):
            raise ValueError(f"The plan: gather={self.gather!r} must be one of {', '.join(get_args(Gather))}.")
        inferring, training = set(self.inferring(world)), set(self.training(world))
        if self.separates:
            if "critic" in needed and "rollout_critic" not in self.roles:
                raise ValueError("The plan has a rollout_actor: give rollout_critic a place among its ranks too.")
            if both := sorted(inferring & training):
                raise ValueError(
                    f"The plan: ranks {ranks_text(both)} both train and infer: with a rollout_actor the two sides must be"
                    " disjoint; leave it out to let the actor's ranks generate."
                )
        elif self.max_lag:
            raise ValueError(f"The plan: max_lag={self.max_lag} needs ranks that only generate: name a rollout_actor.")
        if idle := sorted(set(range(world)) - inferring - training):
            raise ValueError(f"The plan leaves the ranks {ranks_text(idle)} of {world} without a role: is it for another world?")

    # Files

    @classmethod
    def from_dict(cls, data: Any, source: str | Path) -> "PlacementPlan":
        """A plan from plain data, as a file has it.

        Args:
            data: Names and values of the attributes, roles as dictionaries too.
            source: Named in messages.

        Raises:
            ValueError: If it is something else.
        """
        known = {each.name for each in fields(cls)}
        if not isinstance(data, dict) or not set(data) <= known or not isinstance(data.get("roles"), dict):
            raise ValueError(f"{source} is no plan: it needs roles, and may have {', '.join(sorted(known - {'roles'}))}.")
        try:
            roles = {name: RolePlan(**entries) for name, entries in data["roles"].items()}
        except TypeError as error:
            raise ValueError(
                f"{source}: each role has ranks, backend, partition and group_size, and nothing else ({error})."
            ) from error
        return cls(**{**data, "roles": roles})


def place_slots(fractions: Mapping[str, float | Fraction], world: int) -> dict[str, list[int]]:
    """Give each role a share of the ranks: consecutive ones, the largest share first, each into the first pass with room.

    Several passes over the ranks are made where the shares sum to more than 1. Shares that are powers of two lie in blocks
    that are aligned to their size, and so inside nodes.

    Args:
        fractions: Share of each role.
        world: Number of ranks.

    Raises:
        ValueError: If a share is not positive, above 1, or no whole number of ranks.

    Example:
        >>> place_slots({"actor": 1, "critic": 1, "reference": 0.5, "reward": 0.5}, 4)
        {'actor': [0, 1, 2, 3], 'critic': [0, 1, 2, 3], 'reference': [0, 1], 'reward': [2, 3]}
    """
    sizes: dict[str, int] = {}
    for name, share in fractions.items():
        ranks = Fraction(share).limit_denominator(world * world) * world
        if not 0 < share <= 1 or ranks.denominator != 1:
            raise ValueError(f"{name}: a share of {share} of {world} ranks is no whole number of them, 1 to {world}.")
        sizes[name] = int(ranks)
    order = sorted(fractions, key=lambda name: -sizes[name])
    used: list[int] = []  # ranks taken in each pass
    placed = {}
    for name in order:
        size = sizes[name]
        number = next((number for number, taken in enumerate(used) if taken + size <= world), len(used))
        if number == len(used):
            used.append(0)
        placed[name] = list(range(used[number], used[number] + size))
        used[number] += size
    return {name: placed[name] for name in fractions}


def ranks_text(ranks: Sequence[int]) -> str:
    """Increasing ranks as text, ``0-3`` or ``0,2``."""
    if len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
