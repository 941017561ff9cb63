"""Placement of a module's roles: which rank holds which model, and how results travel between them.

A module of several models, such as `zoo.rlhf.RLHF`, asks a `Placement` which of its models are here, lets it divide work, and
gets the results of all ranks back. The class here is that of one process; `strategies.placement` has that of many.

A *row* is a sample; a *unit* is a fixed number of consecutive rows that pass a network together. Units do not depend on the
placement, so that neither do results.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zoo.base.gradient_sums import GradientSums

__all__ = ["FieldSpec", "Fields", "HasRoles", "Pending", "Placement", "PlacesRoles", "Role"]

Fields = dict[str, Tensor]
"""Tensors by name, one row a sample."""

FieldSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of a row and type of each field."""


@dataclass
class Role:
    """One model of a module that has several.

    Attributes:
        network: Its forward is one pass of scoring or training.
        prefix: First part of its weights' names in the module.
        blocks: Parts of the network that a sharding back end gathers one after the other.
        trained: Whether it is trained.
    """

    network: nn.Module
    prefix: str
    blocks: list[nn.Module] = field(default_factory=list)
    trained: bool = False


@runtime_checkable
class HasRoles(Protocol):
    """A module of several models that can be placed."""

    def roles(self) -> dict[str, Role]:
        """The models by name."""
        ...

    def drop_role(self, name: str) -> None:
        """Free a model that other ranks hold."""
        ...

    def use_placement(self, placement: "Placement") -> None:
        """Take the placement by which the module works from here on."""
        ...


class Pending:
    """Results of a role, of which those of other ranks may still be on their way.

    Args:
        own: Fields of the rows that this rank computed.
        rows: Numbers of these rows, in their order.
        whole: Waits for the others' and returns the fields of all rows.
    """

    def __init__(self, own: Fields, rows: Sequence[int], whole: Callable[[], Fields]) -> None:
        self._own, self._place = own, {row: place for place, row in enumerate(rows)}
        self._whole = whole
        self._found: Fields | None = None

    def of(self, rows: Sequence[int]) -> Fields:
        """Fields of some rows; waits only if they come from other ranks."""
        if self._found is None and all(row in self._place for row in rows):
            places = torch.tensor([self._place[row] for row in rows])
            return {name: value[places.to(value.device)] for name, value in self._own.items()}
        return {name: value[torch.tensor(list(rows), device=value.device)] for name, value in self.wait().items()}

    def wait(self) -> Fields:
        """Fields of all rows."""
        if self._found is None:
            self._found = self._whole()
        return self._found


class Placement:
    """One process that holds every role; the base of placements over several.

    Args:
        roles: Models of the module.

    Attributes:
        infers: Whether this rank takes part in generation and scoring.
        trains: Whether this rank takes part in training.
        chunks: Parts in which a rollout is generated, scored and trained.
        max_lag: Rollouts by which generation may be ahead of training.
    """

    infers = True
    trains = True
    chunks = 1
    max_lag = 0

    def __init__(self, roles: dict[str, Role]) -> None:
        self.roles = roles
        self._sums: dict[str, GradientSums] = {}

    def holds(self, role: str) -> bool:
        """Whether this rank has a role's model."""
        return True

    def network(self, role: str) -> nn.Module:
        """The network of a role, for passes of training."""
        return self.roles[role].network

    def inference(self, role: str) -> nn.Module:
        """The network of a role, for passes without gradients."""
        return self.roles[role].network

    def check(self, rows: int, unit: int, minibatches: int) -> None:
        """Refuse rollouts that cannot be divided.

        Args:
            rows: Samples of a rollout.
            unit: Samples of a unit.
            minibatches: Optimizer steps of a rollout.

        Raises:
            ValueError: If something does not divide.
        """
        if rows % (minibatches * unit):
            raise ValueError(
                f"A rollout of {rows} samples does not divide into {minibatches} minibatches of units of {unit} samples: choose"
                " batch_size x samples_per_prompt as a multiple of minibatches x unit."
            )
        if minibatches % self.chunks:
            raise ValueError(
                f"{minibatches} minibatches do not divide into {self.chunks} chunks: choose chunks of the plan as a divisor."
            )

    # Weights

    def begin(self) -> None:
        """Bring the weights of now to the ranks that generate; all ranks call it before each rollout."""

    def gathered(self, role: str) -> AbstractContextManager[Any]:
        """Context in which a role's divided weights are whole, for passes without gradients; entering is a collective call."""
        return nullcontext()

    def decoding(self, role: str, model: Any) -> AbstractContextManager[Any]:
        """Context in which a role's divided weights are whole for generation; gives the model to generate with.

        Args:
            role: The role.
            model: A `zoo.lm.decoder.Decodes` of the role's network.
        """
        return nullcontext(model)

    def agreement(self, role: str) -> Callable[[bool], bool] | None:
        """Function ``agree`` of `zoo.lm.generation.generate`, where ranks gather weights for each pass together."""
        return None

    # Generation and scoring

    def compute(
        self, role: str, rows: int, unit: int, function: Callable[[list[int]], Fields], spec: FieldSpec, whole: bool = False
    ) -> Pending:
        """Let the ranks of a role compute all rows, and share the results among the ranks that infer.

        Args:
            role: The role.
            rows: Number of rows.
            unit: Rows that are computed together.
            function: From numbers of rows to their fields.
            spec: The fields.
            whole: Whether ``function`` is called once with all rows of this rank, instead of unit by unit.
        """
        numbers = list(range(rows))
        calls = [numbers] if whole else [numbers[begin : begin + unit] for begin in range(0, rows, unit)]
        parts = [function(call) for call in calls]
        own = {name: torch.cat([part[name] for part in parts]) for name in spec}
        return Pending(own, numbers, lambda: own)

    def stream(self, chunks: Sequence[int], collect: Callable[[int], Fields], spec: FieldSpec, rows: int) -> Iterator[Fields]:
        """The fields of each chunk of a rollout on the ranks that train, as they come; nothing elsewhere.

        Args:
            chunks: Numbers of the chunks.
            collect: Generates and scores one; called on the ranks that infer.
            spec: The fields.
            rows: Rows of a chunk.
        """
        for chunk in chunks:
            yield collect(chunk)

    def to_all(self, values: Tensor, infers: bool = False) -> Tensor:
        """Numbers that some ranks know, on all ranks.

        Args:
            values: The numbers; elsewhere of the same shape.
            infers: Whether those know them that infer, instead of rank 0.
        """
        return values

    # Training

    def learning(self) -> AbstractContextManager[Any]:
        """Context of the steps on a minibatch."""
        return nullcontext()

    def share(self, role: str, units: Sequence[int]) -> list[int]:
        """The units of a minibatch that this rank trains a role on."""
        return list(units)

    def replicas(self, role: str) -> int:
        """Number of ranks over which the back end of a role averages gradients; 1 where they are added."""
        return 1

    @contextmanager
    def accumulate(self, role: str, last: bool) -> Iterator[None]:
        """Context of one forward and backward pass; the last of a minibatch gives the gradients of all."""
        yield
        if role not in self._sums:
            self._sums[role] = GradientSums(self.roles[role].network.parameters())
        self._sums[role].add()
        if last:
            self._sums[role].give(lambda total: self._add_up(role, total))

    def clip(self, role: str, parameters: Sequence[Tensor], max_norm: float) -> None:
        """Scale the gradient of a role's trained parameters down to a largest norm."""
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def _add_up(self, role: str, total: Tensor) -> None:
        """Add sums of gradients over the ranks that train a role, in place."""

    def total(self, role: str, values: Tensor) -> Tensor:
        """Sum over the ranks that train a role."""
        return values

    # Checkpoints

    def whole(self, value: Tensor) -> Tensor:
        """A tensor that is divided like a weight, as a whole; a collective call of the ranks that divide it."""
        return value

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, divided like a weight."""
        return value.to(like)


@runtime_checkable
class PlacesRoles(Protocol):
    """A strategy that places the roles of a module."""

    def places_roles(self) -> bool:
        """Whether it does so in this run."""
        ...
