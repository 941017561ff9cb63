"""PaRO as a strategy of Lightning."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from typing_extensions import override

from strategies.paro.advisor import job_of, rank_fitting
from strategies.paro.average import ShardAverage
from strategies.paro.checkpoint import (
    ShardedWeights,
    is_sharded,
    load_sharded_weights,
    names_of_weights,
    read_sharded,
    save_sharded,
    weights,
)
from strategies.paro.collectives import Collectives, Method
from strategies.paro.cost_model import Cost
from strategies.paro.engine import PaROEngine
from strategies.paro.grid import RankGrid
from strategies.paro.optimizer_state import load_optimizer_state, optimizer_groups, optimizer_state
from strategies.paro.partition import Partition
from strategies.paro.precision import FloatName, StatePrecision
from strategies.paro.probe import measure_cluster
from strategies.paro.units import find_blocks, plan_units
from strategies.refusals import (
    refuse_averages,
    refuse_ddp_hooks,
    refuse_other_precision,
    refuse_scaled_losses,
    refuse_several_optimizers,
)
from zoo.strategy_contract import StrategyContract

__all__ = ["PaROStrategy"]

AUTO = "auto"


class PaROStrategy(StrategyContract, DDPStrategy):
    """Data parallelism in which parameters, gradients and optimizer state are each whole, shared in a group, or by all (PaRO-DP).

    A code such as ``IIG`` says for parameters, gradients and optimizer state whether every rank holds all (N), the ranks of a
    group share one copy (I), or all ranks do (G). ``NNN`` is DDP, ``NNG``, ``NGG``, ``GGG`` are ZeRO 1, 2, 3, ``III`` is MiCS.
    A group is a set of ranks with fast links, such as a node: a little redundancy keeps traffic inside groups, and between
    them moves it out of the loop over micro-batches. Nothing but place and traffic changes: losses and weights are those of
    DDP. Source: "Rethinking Memory and Communication Costs for Efficient Data Parallel Training of Large Language Models",
    NeurIPS 2024 (arXiv 2310.06003).

    Parameters are gathered block by block around the calls of the blocks. A block is an entry of an ``nn.ModuleList``, or an
    instance of ``block_classes``; everything else is gathered for the whole step. A block must be called: to use its weights
    elsewhere is an error, but inside `summon_full_params`. All ranks must call the same blocks in the same order in training.
    Parameters that take part in no loss get gradients of zeros (weight decay applies to them), as on flat shards all elements
    are updated. Blocks under activation checkpointing must use the non-reentrant kind. Buffers are those of rank 0 at the
    start, and each rank's own afterwards.

    Gradients are in the masters, ``optimizer.param_groups``; ``parameter.grad`` is None outside of a backward pass. Where
    weights are needed outside of steps and evaluation, use `summon_full_params`. Precision is 32-true, 64-true, bf16-mixed, or
    bf16-true, which here keeps float32 masters (Lightning's own does not). In manual optimization each ``manual_backward``
    counts as the last micro-batch of a step unless it is inside `block_backward_sync`.

    Checkpoints are those of one process, names, numbers and shapes, with weights in the format of the masters; they continue
    under any code and number of ranks, and under any other strategy, and the other way round. After a run the module is whole
    again in every process, on the CPU; if a run fails, parameters that were not whole become NaN.

    Args:
        partition: the code, one of ``strategies.paro.CODES``; or ``auto``: links are measured, and of the codes that fit into the
            memory the one is taken that the cost model finds fastest for the module and its optimizer.
        group_size: m, ranks of a group, consecutive ones; divides the number of ranks. ``node``: the ranks of a node.
        block_classes: names of the classes of blocks.
        min_unit_params: blocks with fewer parameters are not gathered by themselves.
        collectives: how gathers and sums go between N and G: between groups and inside them at the same time
            (``overlapped``), one after the other (``two_phase``), or in one ring of all ranks (``flat``, the baseline).
        param_dtype: format in which parameters are gathered and used, beside float32 masters; null: as the precision wants.
        reduce_dtype: format in which gradients travel; pieces of a narrow one are summed in float32.
        accumulate_dtype: format in which gradients of micro-batches add up.
        prefetch: blocks that are gathered ahead of their use.
        overlap: communication beside computation; the same results without.
        gather_for_evaluation: hold all weights during validation, test and prediction, so that ranks may run the network as
            often as each likes. False: block by block, all ranks alike.
        elementwise_optimizers: names of optimizer classes outside of torch that work element by element, such as ``Lion``.
        state_dict_type: write checkpoints as one file, gathered on rank 0 unit by unit, or as folders to which each rank writes
            its shards (``torch.distributed.checkpoint``). Both are read, under any code and number of ranks;
            `strategies.paro.consolidate` makes a file of a folder, for other strategies.
        memory_limit_gb: with ``auto``, memory that the states may take of a device, 10^9 bytes; null: what is free of a GPU when
            the run begins, and no limit on the CPU. Activations and gathered blocks come on top.
        kwargs: of Lightning's ``DDPStrategy``: process_group_backend, timeout, start_method, ...

    Raises:
        ValueError: an inadmissible code, a group size that does not divide the ranks, unknown names, several optimizers or one
            that is not element-wise, a precision that scales losses; with ``auto``, no code fits into the memory.
    """

    def __init__(
        self,
        partition: str = "IIG",
        group_size: int | Literal["node"] = "node",
        block_classes: list[str] | None = None,
        min_unit_params: int = 0,
        collectives: Method = "overlapped",
        param_dtype: FloatName | None = None,
        reduce_dtype: FloatName = "float32",
        accumulate_dtype: FloatName = "float32",
        prefetch: int = 1,
        overlap: bool = True,
        gather_for_evaluation: bool = True,
        elementwise_optimizers: list[str] | None = None,
        state_dict_type: Literal["full", "sharded"] = "full",
        memory_limit_gb: float | None = None,
        **kwargs: Any,
    ) -> None:
        if group_size != "node" and (not isinstance(group_size, int) or group_size < 1):
            raise ValueError(f"PaROStrategy: group_size={group_size!r} must be at least 1, or 'node' for the ranks of a node.")
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(f"PaROStrategy: state_dict_type={state_dict_type!r} must be 'full' or 'sharded'.")
        if memory_limit_gb is not None and not (memory_limit_gb > 0 and partition == AUTO):
            raise ValueError(f"PaROStrategy: memory_limit_gb={memory_limit_gb} must be positive, and goes with partition: auto.")
        if min_unit_params < 0 or prefetch < 0:
            raise ValueError(f"PaROStrategy: min_unit_params={min_unit_params} and prefetch={prefetch} must not be negative.")
        refuse_ddp_hooks(self, kwargs)
        super().__init__(**kwargs)
        #: The code; with ``auto`` None until a run has begun.
        self.partition: Partition | None = None if partition == AUTO else Partition.of(partition)
        self.memory_limit_gb = memory_limit_gb
        #: What ``auto`` found, the best first.
        self.advice: list[Cost] = []
        self.group_size = group_size
        self.block_classes = block_classes or []
        self.min_unit_params = min_unit_params
        self.collectives = collectives
        self.precision = StatePrecision(param_dtype, reduce_dtype, accumulate_dtype)
        self.prefetch, self.overlap = prefetch, overlap
        self.gather_for_evaluation = gather_for_evaluation
        self.elementwise_optimizers = elementwise_optimizers or []
        self.state_dict_type = state_dict_type
        self.engine: PaROEngine | None = None
        self.grid: RankGrid | None = None
        self._trainer: Trainer | None = None
        self._averages: list[ShardAverage] = []

    # What modules and callbacks ask

    def keeps_float32_weights(self) -> bool:
        """Yes, the masters."""
        return True

    def shards_parameters(self) -> bool:
        """Whether a rank holds a part of the parameters only: with any code but N.."""
        return self.partition is None or self.partition.parameters != "N"

    def forwards_are_collective(self) -> bool:
        """Whether weights are gathered for each pass in evaluation."""
        return self.shards_parameters() and not self.gather_for_evaluation

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Checkpoints are loaded into the shards."""
        return True

    # A run begins and ends

    @override
    def setup_environment(self) -> None:
        """Join the ranks and form the grid."""
        super().setup_environment()
        if self.grid is None:
            size = self.num_processes if self.group_size == "node" else self.group_size
            self.grid = RankGrid(size, self.root_device.type, self._timeout)

    @override
    def setup(self, trainer: Trainer) -> None:
        """Make optimizers and schedules on the user's parameters, then divide the states."""
        assert self.accelerator is not None and self.grid is not None
        module = self.lightning_module
        assert module is not None
        self._trainer = trainer
        self._check(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not fitting and self.gather_for_evaluation:
            super().setup(trainer)
            return
        self.accelerator.setup(trainer)
        precision = self.precision
        plugin = self.precision_plugin
        if isinstance(plugin, HalfPrecision):
            # The parameters are converted by the engine, which makes the masters first.
            precision = StatePrecision("bfloat16", precision.reduce, precision.accumulate)
            for part in module.modules():
                for name, buffer in part._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        part._buffers[name] = buffer.to(torch.bfloat16)
        else:
            plugin.convert_module(module)
        self.model_to_device()
        optimizer = None
        if fitting:
            self.setup_optimizers(trainer)
            refuse_several_optimizers(self, self.optimizers, "which would share flat shards")
            optimizer = self.optimizers[0] if self.optimizers else None
        blocks = find_blocks(module, self.block_classes)
        if self.partition is None:
            self.partition = self._choose(trainer, blocks, optimizer, precision)
        self.engine = PaROEngine(
            module, optimizer, self.partition, Collectives(self.grid, self.collectives), blocks, precision, self.prefetch,
            self.overlap, self.min_unit_params, self.elementwise_optimizers,
        )  # fmt: skip
        self.setup_precision_plugin()
        plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]

    def _choose(
        self, trainer: Trainer, blocks: list[nn.Module], optimizer: Optimizer | None, precision: StatePrecision
    ) -> Partition:
        """The code that the cost model finds best; a collective call."""
        assert self.grid is not None and self.lightning_module is not None
        groups = [] if optimizer is None else [group["params"] for group in optimizer.param_groups]
        plans = plan_units(self.lightning_module, blocks, groups, self.min_unit_params)
        job = job_of(plans, optimizer, precision, trainer.accumulate_grad_batches)
        cluster = measure_cluster(self.grid, memory=self._memory())
        self.advice = rank_fitting(cluster, job, self.collectives)
        best, others = self.advice[0], self.advice[1:4]
        rank_zero_info(
            f"PaROStrategy: {best.partition} for {self.grid.ng} x {self.grid.m} ranks: {1000 * best.communication_seconds:.3g} ms"
            f" of communication and {best.memory / 1e9:.3g} GB of states a step; then "
            + ", ".join(f"{c.partition} ({1000 * c.communication_seconds:.3g} ms, {c.memory / 1e9:.3g} GB)" for c in others)
        )
        return Partition.of(best.partition)

    def _memory(self) -> float | None:
        """Bytes of states that a device may hold, the least of all ranks."""
        if self.memory_limit_gb is not None:
            return self.memory_limit_gb * 1e9
        if self.root_device.type != "cuda":
            return None
        free = torch.tensor(torch.cuda.mem_get_info(self.root_device)[0], device=self.root_device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        return float(free)

    def _check(self, trainer: Trainer) -> None:
        refuse_scaled_losses(self)
        refuse_other_precision(self)
        if str(self.precision_plugin.precision) == "16-true":
            raise ValueError("PaROStrategy: precision=16-true needs scaled losses: use bf16-mixed, bf16-true or 32-true.")
        if self.shards_parameters():
            held = f"of which a rank holds a part under {self.partition or AUTO}"
            refuse_averages(self, trainer, held, "use EMA of the zoo, or a code with whole parameters such as NIG", shards=True)

    @override
    def configure_ddp(self) -> None:
        """Nothing: the module is not wrapped."""

    @override
    def teardown(self) -> None:
        """Leave whole parameters in the module, on the CPU, and end the grid."""
        interrupted = self._trainer is not None and self._trainer.state.status == TrainerStatus.INTERRUPTED
        if self.engine is not None:
            optimizer = self.engine.optimizer
            state = None if interrupted or optimizer is None else optimizer_state(self.engine, keep=self.is_global_zero)
            self.engine.close(restore=not interrupted)
            if optimizer is not None and state is not None and self.is_global_zero:
                optimizer.load_state_dict(state)  # for those who save a checkpoint now
            self.engine = None
            self._averages.clear()
        if self.grid is not None and not interrupted:  # else peers may be gone, for which a group would wait
            self.grid.close()
            self.grid = None
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        super().teardown()

    # Training

    @override
    def on_train_start(self) -> None:
        """Release what was gathered while a checkpoint was loaded."""
        if self.engine is not None:
            self.engine.release_all()

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, a backward pass is not the last one of a step."""
        if self.engine is not None:
            self.engine.last = False
        try:
            yield
        finally:
            if self.engine is not None:
                self.engine.last = True

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's step."""
        if self.engine is not None:
            self.engine.begin_forward()
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The backward pass; gradients are where the partition has them before ``on_after_backward``."""
        assert self.lightning_module is not None
        plugin = self.precision_plugin
        loss = plugin.pre_backward(closure_loss, self.lightning_module)
        plugin.backward(loss, self.lightning_module, optimizer, *args, **kwargs)
        if self.engine is not None:
            self.engine.finish_backward()
        return plugin.post_backward(loss, self.lightning_module)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A step on the masters, and the new parameters to where they are kept."""
        engine = self.engine
        assert engine is not None

        def finished() -> Any:
            result = closure()
            engine.finish_step()
            return result

        output = super().optimizer_step(optimizer, finished, model, **kwargs)
        engine.sync_parameters()
        return output

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, 0-dim, the same on all ranks; a collective call."""
        assert self.engine is not None
        return self.engine.gradient_norm()

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        masters = [p for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        clip_grads_with_norm_(masters, clip_val, self.gradient_norm())

    def average_shards(self, device: str | None = None) -> ShardAverage:
        """An average of the weights that each rank keeps its shards of; the module has it when training has ended.

        Args:
            device: where it is kept; None: where the masters are.
        """
        assert self.engine is not None
        if self.state_dict_type == "sharded":
            raise ValueError("PaROStrategy: checkpoints with an average (EMA) need state_dict_type 'full': change one of them.")
        self._averages.append(ShardAverage(self.engine, device))
        return self._averages[-1]

    @override
    def on_train_end(self) -> None:
        """Leave the average, if there is one, in the module."""
        for average in self._averages:
            average.swap()
        self._averages.clear()

    # Evaluation

    @override
    def on_validation_start(self) -> None:
        """Gather all weights, or none if they are to be gathered block by block."""
        if self.engine is not None and self.gather_for_evaluation:
            self.engine.gather_all()
        elif self.engine is not None:
            self.engine.release_all()

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_validation_end(self) -> None:
        """Release them."""
        if self.engine is not None:
            self.engine.release_all()

    on_test_end = on_predict_end = on_validation_end

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        engine = self.engine
        if engine is not None and not engine.held:
            engine.begin_forward()
        yield
        if engine is not None and not engine.held:
            engine.release_all()

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's step."""
        with self._evaluating():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's step."""
        with self._evaluating():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step."""
        with self._evaluating():
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def summon_full_params(self, writeback: bool = False) -> Iterator[None]:
        """Inside, the module's parameters are whole on each rank, in the format of the masters; entering is a collective call.

        Made for norms that are logged, and for penalties; the gradient of a penalty keeps whole parameters until it is there.

        Args:
            writeback: take over the values that they have in the end; ranks must agree on them.
        """
        if self.engine is None:
            yield
            return
        with self.engine.full_parameters(writeback):
            yield

    # What it costs

    def comm_stats(self) -> dict[str, int]:
        """Bytes that this rank has sent since the run began or `reset_comm_stats`: ``<operation>/<intra or inter>`` and sums."""
        assert self.engine is not None
        stats = {"intra": 0, "inter": 0}
        for (operation, link), sent in self.engine.comm.sent.items():
            stats[f"{operation}/{link}"] = sent
            stats[link] += sent
        return stats

    def reset_comm_stats(self) -> None:
        """Count from zero again."""
        assert self.engine is not None
        self.engine.comm.reset()

    def memory_report(self) -> dict[str, int]:
        """Bytes of states that this rank keeps; see `PaROEngine.memory`."""
        assert self.engine is not None
        return self.engine.memory()

    # Checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0, names and shapes elsewhere."""
        if self.engine is None:
            return super().lightning_module_state_dict()
        if self.state_dict_type == "sharded":
            return names_of_weights(self.engine)
        return weights(self.engine, keep=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, as one process has it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if self.engine is None or optimizer is not self.engine.optimizer:
            return super().optimizer_state(optimizer)
        if self.state_dict_type == "sharded":
            return {"state": {}, "param_groups": optimizer_groups(self.engine)}
        return optimizer_state(self.engine, keep=self.is_global_zero)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file on rank 0, or a folder of shards."""
        if self.engine is None or self.state_dict_type == "full":
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            save_sharded(self.engine, filepath, checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, of any strategy, or a folder of shards."""
        if self.engine is not None:
            self.engine.gather_all()  # the module's own hooks may look at weights while it is loaded
        if is_sharded(checkpoint_path):
            return read_sharded(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its part of the weights."""
        weights = checkpoint["state_dict"]
        if self.engine is not None and isinstance(weights, ShardedWeights):
            load_sharded_weights(self.engine, weights, strict)
            return
        with self.summon_full_params(writeback=True):
            super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of a whole state."""
        if self.engine is None or self.engine.optimizer is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        states = checkpoint["optimizer_states"]
        if len(states) != 1:
            raise ValueError(f"The checkpoint has {len(states)} optimizers, this run has one: it is of another model.")
        load_optimizer_state(self.engine, states[0])


StrategyRegistry.register("paro", PaROStrategy, description="Partial redundancy of parameters, gradients, optimizer state (PaRO)")
