"""Expert parallelism as a strategy of Lightning."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from strategies.expert.shards import ExpertShards
from strategies.mesh import axis_group, named_mesh
from strategies.refusals import refuse_scaled_losses
from zoo.strategy_contract import StrategyContract

__all__ = ["ExpertParallelStrategy"]


class ExpertParallelStrategy(StrategyContract, DDPStrategy):
    """Data parallelism in which groups of ranks divide the routed experts of each layer among them.

    The ranks form a mesh, data x expert; an expert group is ``expert_parallel_size`` consecutive ranks, so that with one group
    a node its exchange stays inside. Every rank trains on its own part of the batch. Experts are divided over the group,
    everything else is on every rank. Tokens travel to the ranks that hold their experts, and results back (`Dispatcher`).

    Nothing but the place of the computation changes. Weights at the start are those of rank 0. Gradients are means over the
    losses of all ranks, those of experts too: they arise already summed over the group's tokens, are divided by its size and
    averaged over the groups. Clipping goes by the norm of the whole gradient. Checkpoints hold all experts and their whole
    optimizer state, and continue under any strategy that reads such checkpoints, with any number of ranks; so do those of
    other strategies under this one. After a run the module is whole again in every process; until then a callback sees this
    rank's experts only.

    In evaluation and prediction ranks may run the network a different number of times: those that are ready compute for the
    others. Callbacks that run it outside of a step, each rank as often as it has work, do so inside `uneven_forwards`.

    The module must have ``expert_parameters()`` (`HasExperts`), and its layers of experts the form of `ExpertLayer`.

    Args:
        expert_parallel_size: P, ranks that divide the experts; divides the number of ranks and that of experts. None: the ranks
            of a node. 1 is ordinary data parallelism.
        **kwargs: as for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: the size does not fit ranks or experts, the module has no experts, or precision is 16-mixed.
    """

    def __init__(self, expert_parallel_size: int | None = None, **kwargs: Any) -> None:
        if expert_parallel_size is not None and expert_parallel_size < 1:
            raise ValueError(f"expert_parallel_size={expert_parallel_size} must be at least 1, or null for the ranks of a node.")
        super().__init__(**kwargs)
        self.expert_parallel_size = expert_parallel_size
        self._mesh: DeviceMesh | None = None
        self._shards: ExpertShards | None = None
        self._handles: list[RemovableHandle] = []
        self._reductions: list[dist.Work] = []
        self._arrived: set[int] = set()
        self._accumulates = False

    # A run begins and ends

    @override
    def setup_environment(self) -> None:
        """Form the groups and divide the experts, before any callback or checkpoint sees the module."""
        super().setup_environment()
        self._shards = None
        size = self.expert_parallel_size or self.num_processes
        if self.world_size % size:
            raise ValueError(
                f"expert_parallel_size={size} does not divide the {self.world_size} processes of this run: start a multiple of"
                f" {size}, as with `torchrun --nproc-per-node {size}`, or choose a divisor of {self.world_size}."
            )
        if size == 1:
            return
        if self._mesh is None:
            self._mesh = named_mesh(self.root_device.type, data=-1, expert=size)
        assert self.lightning_module is not None
        shards = ExpertShards(self.lightning_module, axis_group(self._mesh, "expert"), self.root_device)
        shards.divide()
        self._shards = shards

    @override
    def setup(self, trainer: Trainer) -> None:
        """Wrap the module, and take care of the experts' gradients."""
        if self._shards is not None:
            refuse_scaled_losses(self)
            assert self.lightning_module is not None
            self._shards.hide_from_ddp(self.lightning_module)
            self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, _UniteExperts) for callback in callbacks):
                callbacks.append(_UniteExperts())
        super().setup(trainer)
        if self._shards is not None and trainer.state.fn == TrainerFn.FITTING:
            self._follow_gradients(self._shards)

    @override
    def teardown(self) -> None:
        """Undo what `setup` did; the experts are united later, after the last callback that sees them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        if self.lightning_module is not None and self._shards is not None:
            self._shards.show_to_ddp(self.lightning_module)
        super().teardown()

    def unite_experts(self) -> None:
        """Give every process all experts again; called by Lightning when a run has ended well."""
        if self._shards is not None:
            self._shards.unite()

    def _setup_model(self, model: nn.Module) -> Any:
        """The module in DDP; as it is, with what rank 0 has, where experts alone are trained, of which DDP knows nothing."""
        if self._shards is None or any(p.requires_grad and not self._shards.holds(p) for p in model.parameters()):
            return super()._setup_model(model)
        _sync_module_states(model)
        return model

    def _register_ddp_hooks(self) -> None:
        if isinstance(self.model, DistributedDataParallel):
            super()._register_ddp_hooks()

    # Gradients

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Inside, gradients are not averaged: those of the first micro-batches of an accumulated step."""
        self._accumulates = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulates = False

    def _follow_gradients(self, shards: ExpertShards) -> None:
        """Make of each gradient of an expert, which is a sum over the group's tokens, the mean over the losses of all ranks."""
        self._reductions.clear()
        self._arrived.clear()
        for layer in shards.layers:
            trained = [p for p in (layer.gate_up_proj, layer.down_proj) if p.requires_grad]
            for parameter in trained:
                self._handles.append(parameter.register_hook(lambda gradient: gradient / shards.size))
                self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, trained)))

    def _on_gradient(self, trained: list[nn.Parameter], parameter: nn.Parameter) -> None:
        """Average a layer's gradients over the ranks that hold the same experts, while backward goes on.

        All of the layer together: which comes first depends on how a rank computes it, and with it on its number of tokens.
        """
        assert self._mesh is not None
        num_groups = self._mesh.size(0)
        if num_groups == 1 or self._accumulates:
            return
        if not self._arrived:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_reductions)
        self._arrived.add(id(parameter))
        if not all(id(other) in self._arrived for other in trained):
            return
        for other in trained:
            assert other.grad is not None
            other.grad.div_(num_groups)
            work = dist.all_reduce(other.grad, group=axis_group(self._mesh, "data"), async_op=True)
            assert work is not None
            self._reductions.append(work)

    def _finish_reductions(self) -> None:
        for work in self._reductions:
            work.wait()
        self._reductions.clear()
        self._arrived.clear()

    def gradient_norm(self) -> Tensor | None:
        """The 2-norm of the whole gradient, 0-dim, the same on all ranks; a collective call of the expert group."""
        if self._shards is None:
            return None
        return self._shards.gradient_norm(
            p for optimizer in self.optimizers for p in self.precision_plugin.main_params(optimizer)
        )

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self._shards is not None
        self._shards.clip_gradients(self.precision_plugin.main_params(optimizer), clip_val)

    # Evaluation

    @contextmanager
    def uneven_forwards(self) -> Iterator[None]:
        """Inside, and without gradients, each rank may run the network as often as it likes, or not at all.

        All ranks must enter; each leaves when no rank of its group is inside any more, having computed for the others.
        """
        yield
        self._serve(done=False)

    def _serve(self, done: bool) -> None:
        if self._shards is not None and self._shards.dispatcher is not None:
            self._shards.dispatcher.serve(done)

    def _serve_after(self, loop: Any, args: tuple[Any, ...]) -> None:
        """Compute for ranks whose step needs more passes; after the last batch of a loader also for those with more batches."""
        last = loop.batch_progress.is_last_batch
        if len(args) > 2:  # batch, its number, and that of its loader
            last = last or args[1] + 1 >= loop.max_batches[args[2]]
        self._serve(done=last)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's step."""
        output = super().validation_step(*args, **kwargs)
        trainer = self._trainer()
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._serve_after(trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop, args)
        return output

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's step."""
        output = super().test_step(*args, **kwargs)
        self._serve_after(self._trainer().test_loop, args)
        return output

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's step."""
        output = super().predict_step(*args, **kwargs)
        self._serve_after(self._trainer().predict_loop, args)
        return output

    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # Checkpoints hold everything; what a rank has in memory are its parts

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, on rank 0."""
        state = super().optimizer_state(optimizer)
        return self._shards.whole_state(optimizer, state) if self._writes() and self._shards is not None else state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save all experts, those of averages and references beside the weights too."""
        if self._writes() and self._shards is not None:
            checkpoint = self._shards.whole_weights(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _writes(self) -> bool:
        """Whether this rank's experts are collected for a checkpoint: one group has all."""
        return self._mesh is not None and self._mesh.get_local_rank("data") == 0

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint and keep this rank's experts."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        return checkpoint if self._shards is None else self._shards.part_of_weights(checkpoint)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this rank's part of the state."""
        if self._shards is not None:
            states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            checkpoint = {**checkpoint, "optimizer_states": [self._shards.part_of_state(*pair) for pair in states]}
        super().load_optimizer_state_dict(checkpoint)


class _UniteExperts(Callback):
    """Unites the experts when everything that averages or stores this rank's part is done."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ExpertParallelStrategy):
            trainer.strategy.unite_experts()


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, description="Routed experts divided among the ranks of a node"
)
