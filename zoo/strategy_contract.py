"""Questions that modules and callbacks ask a strategy, and the few that a strategy asks them.

Ask by function, of any strategy: ``step_group(trainer.strategy)``. A strategy that derives from `StrategyContract` answers by its
methods; for all others, Lightning's own among them, the answers are those of data parallelism, FSDP or DeepSpeed. What only some
strategies can do is a protocol: ``isinstance(trainer.strategy, AveragesShards)``.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from zoo.nn.row_lookup import LocalRows, RowLink

__all__ = [
    "AveragesShards",
    "BalancesRanks",
    "CallbackContract",
    "CountsTraffic",
    "HasLossDenominator",
    "HasRows",
    "Request",
    "ShardedAverage",
    "StrategyContract",
    "agree",
    "agree_at_end",
    "agrees_without_waiting",
    "averages_shards",
    "changes_gradients",
    "data_replicas",
    "forwards_are_collective",
    "gradient_norm",
    "is_asynchronous",
    "keeps_float32_weights",
    "loss_denominator",
    "replicas_diverge",
    "row_link",
    "sample_positions",
    "shards_parameters",
    "step_group",
    "step_was_applied",
    "tells_gradient_norm",
    "weighs_batches",
]

Request = Literal["stop", "save"]


class StrategyContract:
    """Mixin of a strategy that differs from plain data parallelism; override the methods whose answer is another one.

    Name it before Lightning's class, ``class MyStrategy(StrategyContract, DDPStrategy)``. Each method has a function of the same
    name in this file, by which modules and callbacks ask.
    """

    # Weights

    def shards_parameters(self) -> bool:
        """Whether a rank holds only a part of the parameters."""
        return _shards_parameters(self)

    def forwards_are_collective(self) -> bool:
        """Whether, without gradients, all ranks must run the network equally often, since weights are gathered for each pass."""
        return _forwards_are_collective(self)

    def keeps_float32_weights(self) -> bool:
        """Whether updates are added to float32 weights, whatever the precision of the computation."""
        return isinstance(self, DeepSpeedStrategy)

    # Gradients and steps

    def gradient_norm(self) -> Tensor | None:
        """2-norm of the whole gradient, 0-dim, the same on all ranks of a step; may communicate.

        Returns:
            None: the gradients on this rank are whole, and so is their norm.
        """
        return None

    def weighs_batches(self) -> bool:
        """Whether the strategy weights losses by `loss_denominator`, as ranks have batches of different sizes."""
        return False

    def step_group(self) -> dist.ProcessGroup | None:
        """The ranks that take the present step together: reduce a step's statistics, and decide on it, over these only.

        Returns:
            None: all ranks. The answer may change from step to step.
        """
        return None

    def replicas_diverge(self) -> bool:
        """Whether replicas train apart for some steps, during which `step_group` is not all ranks."""
        return False

    def is_asynchronous(self) -> bool:
        """Whether ranks take different numbers of steps, so that ``global_step`` differs between them."""
        return False

    def step_was_applied(self) -> bool:
        """Whether the last step changed the weights, where the strategy's engine steps in the optimizer's place."""
        return _step_was_applied(self)

    # Samples

    def sample_positions(self, batch_size: int) -> Tensor | None:
        """Positions of the present batch's samples in the epoch's global order, int64 (batch_size,).

        Args:
            batch_size: Samples of this rank's batch.

        Returns:
            None: rank r of W has samples r, r + W, r + 2 W, ..., as of Lightning's ``DistributedSampler``.
        """
        return None

    # Rows of tables

    def row_link(self) -> RowLink:
        """Fetches rows of the module's tables, wherever they are."""
        return LocalRows()

    # Agreement

    def agrees_without_waiting(self) -> bool:
        """Whether `agree` waits for no other rank, so that it may be asked at every batch."""
        return False

    def agree(self, request: Request, wanted: bool) -> bool:
        """Ask all ranks for something, at most once a batch; true on all ranks at the same time, once any rank wanted it.

        Args:
            request: What is asked for.
            wanted: Whether this rank wants it.
        """
        return _any_wants(self, wanted)

    def agree_at_end(self, wanted: bool) -> bool:
        """Whether to save where training has ended or stopped; ranks that save together give the same answer.

        Args:
            wanted: Whether this rank's last checkpoint is out of date.
        """
        return wanted


def shards_parameters(strategy: Strategy) -> bool:
    """Whether a rank holds only a part of the parameters."""
    return strategy.shards_parameters() if isinstance(strategy, StrategyContract) else _shards_parameters(strategy)


def forwards_are_collective(strategy: Strategy) -> bool:
    """Whether, without gradients, all processes must run the network equally often; ask when the strategy is set up."""
    if isinstance(strategy, ParallelStrategy) and strategy.world_size == 1:
        return False
    return strategy.forwards_are_collective() if isinstance(strategy, StrategyContract) else _forwards_are_collective(strategy)


def keeps_float32_weights(strategy: Strategy) -> bool:
    """Whether updates are added to float32 weights, whatever the precision of the computation."""
    return strategy.keeps_float32_weights() if isinstance(strategy, StrategyContract) else isinstance(strategy, DeepSpeedStrategy)


def tells_gradient_norm(strategy: Strategy) -> bool:
    """Whether `gradient_norm` is that of the whole gradient, and not of the part that a rank holds."""
    if isinstance(strategy, StrategyContract) and type(strategy).gradient_norm is not StrategyContract.gradient_norm:
        return True
    return isinstance(strategy, ModelParallelStrategy) or not shards_parameters(strategy)


def gradient_norm(strategy: Strategy, optimizer: Optimizer) -> Tensor:
    """2-norm of the whole gradient, 0-dim; may communicate.

    Args:
        strategy: As it is in training.
        optimizer: The parameters that have gradients.
    """
    norm = strategy.gradient_norm() if isinstance(strategy, StrategyContract) else None
    return _norm(optimizer) if norm is None else norm


def weighs_batches(strategy: Strategy) -> bool:
    """Whether the strategy weights losses by `loss_denominator`; then a module leaves its own mean over ranks out."""
    return isinstance(strategy, StrategyContract) and strategy.weighs_batches()


def step_group(strategy: Strategy) -> dist.ProcessGroup | None:
    """The ranks that take the present step together; None: all ranks. Ask again at each step."""
    return strategy.step_group() if isinstance(strategy, StrategyContract) else None


def replicas_diverge(strategy: Strategy) -> bool:
    """Whether replicas train apart for some steps, during which `step_group` is not all ranks."""
    return isinstance(strategy, StrategyContract) and strategy.replicas_diverge()


def is_asynchronous(strategy: Strategy) -> bool:
    """Whether ranks take different numbers of steps, so that ``global_step`` differs between them."""
    return isinstance(strategy, StrategyContract) and strategy.is_asynchronous()


def step_was_applied(strategy: Strategy) -> bool:
    """Whether the last step changed the weights, where an engine such as DeepSpeed's steps in the optimizer's place."""
    return strategy.step_was_applied() if isinstance(strategy, StrategyContract) else _step_was_applied(strategy)


def sample_positions(strategy: Strategy, batch_size: int) -> Tensor | None:
    """Positions of the present batch's samples in the epoch's global order; None: those of a ``DistributedSampler``."""
    return strategy.sample_positions(batch_size) if isinstance(strategy, StrategyContract) else None


def data_replicas(strategy: Strategy) -> tuple[int, int]:
    """Among how many ranks the samples are divided, and the number of this one among them."""
    if not isinstance(strategy, ParallelStrategy):
        return 1, 0
    return strategy.distributed_sampler_kwargs["num_replicas"], strategy.distributed_sampler_kwargs["rank"]


def row_link(strategy: Strategy) -> RowLink:
    """Fetches rows of the module's tables, wherever they are; ask in each step."""
    return strategy.row_link() if isinstance(strategy, StrategyContract) else LocalRows()


def agrees_without_waiting(strategy: Strategy) -> bool:
    """Whether `agree` waits for no other rank, so that it may be asked at every batch."""
    return isinstance(strategy, StrategyContract) and strategy.agrees_without_waiting()


def agree(strategy: Strategy, request: Request, wanted: bool) -> bool:
    """Ask all ranks for something; true on all ranks at the same time, once any rank wanted it."""
    return strategy.agree(request, wanted) if isinstance(strategy, StrategyContract) else _any_wants(strategy, wanted)


def agree_at_end(strategy: Strategy, wanted: bool) -> bool:
    """Whether to save where training has ended or stopped; ranks that save together give the same answer."""
    return strategy.agree_at_end(wanted) if isinstance(strategy, StrategyContract) else wanted


# What only some strategies can do


class ShardedAverage(Protocol):
    """An average of the weights, of which each rank keeps a part; all methods but `update` and `restart` are collective calls."""

    def update(self, decay: float) -> None:
        """``average <- decay * average + (1 - decay) * weights``."""

    def swap(self) -> None:
        """Exchange average and weights."""

    def restart(self) -> None:
        """Begin again at the present weights."""

    def weights(self, keep: bool) -> dict[str, Any]:
        """The module's whole averaged ``state_dict``, where ``keep``; elsewhere names and shapes."""


@runtime_checkable
class AveragesShards(Protocol):
    """A strategy that averages the shards it keeps, and leaves the average in the module when training has ended."""

    def average_shards(self, device: str | None) -> ShardedAverage:
        """A new average, once the strategy is set up; of one that is resumed, before weights are loaded."""
        ...


@runtime_checkable
class CountsTraffic(Protocol):
    """A strategy that counts the bytes that it sends and keeps."""

    def comm_stats(self) -> dict[str, int]:
        """Bytes that this rank has sent since the run began; ``intra`` and ``inter`` are sums by class of links."""

    def memory_report(self) -> dict[str, int]:
        """Bytes of states that this rank keeps, by kind."""


@runtime_checkable
class BalancesRanks(Protocol):
    """A strategy that gives ranks batches of different sizes."""

    def antdt_state(self) -> dict[str, Any]:
        """``step``, ``batch`` [samples of each rank], ``bpt`` [seconds of each rank], ``wall`` and ``bubble`` (seconds),
        ``version``, ``restarts``, ``generation``, ``agent_seconds``; some are missing until a step was measured.
        """  # fmt: skip


# What strategies ask modules and callbacks


@runtime_checkable
class HasRows(Protocol):
    """A module with tables whose rows it asks of `row_link` in each step, so that a strategy may divide them."""

    def row_tables(self) -> dict[str, torch.nn.Parameter]:
        """The tables by the names of the parameters in the module's ``network``; all have the same rows."""
        ...


@runtime_checkable
class HasLossDenominator(Protocol):
    """A module whose losses are means over something else than samples."""

    def loss_denominator(self, batch: Any) -> float:
        """Number of tokens, boxes, ... over which the loss of a micro-batch is a mean."""
        ...


def loss_denominator(module: LightningModule, batch: Any, num_samples: float) -> float:
    """Number over which the loss of a micro-batch is a mean.

    Args:
        module: Says it, if it is not the number of samples.
        batch: The micro-batch.
        num_samples: Its number of samples.
    """
    return float(module.loss_denominator(batch) if isinstance(module, HasLossDenominator) else num_samples)


class CallbackContract:
    """Mixin of a callback that strategies ask, ``class MyCallback(CallbackContract, Callback)``."""

    def averages_shards(self) -> bool:
        """Whether a callback that averages weights takes the average from a strategy that `AveragesShards`."""
        return False

    def changes_gradients(self) -> bool:
        """Whether it changes or drops gradients between the backward pass and the step of this process's optimizer."""
        return False


def averages_shards(callback: Callback) -> bool:
    """Whether a callback that averages weights takes the average from a strategy that `AveragesShards`."""
    return isinstance(callback, CallbackContract) and callback.averages_shards()


def changes_gradients(callback: Callback) -> bool:
    """Whether it changes or drops gradients between the backward pass and the step of this process's optimizer."""
    return isinstance(callback, CallbackContract) and callback.changes_gradients()


# Lightning's own strategies


def _shards_parameters(strategy: object) -> bool:
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3 if strategy.config else True
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def _forwards_are_collective(strategy: object) -> bool:
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def _step_was_applied(strategy: object) -> bool:
    engine: Any = strategy.model if isinstance(strategy, DeepSpeedStrategy) else None
    return engine is None or bool(engine.was_step_applied())


def _any_wants(strategy: object, wanted: bool) -> bool:
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return wanted
    return bool(strategy.reduce_boolean_decision(wanted, all=False))


def _norm(optimizer: Optimizer) -> Tensor:
    """The 2-norm of all gradients, 0-dim; of the whole where they are distributed tensors."""
    gradients = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    kinds = {(type(each), each.device, each.dtype) for each in gradients}
    if len(kinds) == 1 and type(gradients[0]) is Tensor:
        # The same numbers as below, without sorting by device and type, which takes as long as the norms.
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
