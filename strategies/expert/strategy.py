"""Expert parallelism as a strategy of Lightning."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from strategies.divided_strategy import DividedStrategy
from strategies.expert.shards import ExpertShards
from strategies.mesh import axis_group, named_mesh

__all__ = ["ExpertParallelStrategy"]


class ExpertParallelStrategy(DividedStrategy[ExpertShards]):
    """Data parallelism in which groups of ranks divide the routed experts of each layer among them.

    The ranks form a mesh, data x expert; an expert group is ``expert_parallel_size`` consecutive ranks, so that with one group
    a node its exchange stays inside. Every rank trains on its own part of the batch. Experts are divided over the group,
    everything else is on every rank. Tokens travel to the ranks that hold their experts, and results back (`Dispatcher`).

    Nothing but the place of the computation changes. Gradients are means over the losses of all ranks, those of experts too: they
    arise already summed over the group's tokens, are divided by its size and averaged over the groups. Clipping, checkpoints,
    evaluation and the end of a run are those of `DividedStrategy`; ranks that are ready compute for the others.

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
        self._handles: list[RemovableHandle] = []
        self._reductions: list[dist.Work] = []
        self._arrived: set[int] = set()

    @override
    def _divide(self, module: LightningModule) -> ExpertShards | None:
        """Form the groups and divide the experts."""
        size = self.expert_parallel_size or self.num_processes
        if self.world_size % size:
            raise ValueError(
                f"expert_parallel_size={size} does not divide the {self.world_size} processes of this run: start a multiple of"
                f" {size}, as with `torchrun --nproc-per-node {size}`, or choose a divisor of {self.world_size}."
            )
        if size == 1:
            return None
        if self._mesh is None:
            self._mesh = named_mesh(self.root_device.type, data=-1, expert=size)
        shards = ExpertShards(module, axis_group(self._mesh, "expert"), self.root_device)
        shards.divide()
        return shards

    @override
    def _serve(self, done: bool) -> None:
        if self._parts is not None and self._parts.dispatcher is not None:
            self._parts.dispatcher.serve(done)

    @override
    def _collects(self) -> bool:
        """One group has all experts."""
        return self._mesh is not None and self._mesh.get_local_rank("data") == 0

    @override
    def setup(self, trainer: Trainer) -> None:
        """Wrap the module, and take care of the experts' gradients."""
        super().setup(trainer)
        if self._parts is not None and trainer.state.fn == TrainerFn.FITTING:
            self._follow_gradients(self._parts)

    @override
    def teardown(self) -> None:
        """Undo what `setup` did."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        super().teardown()

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


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, description="Routed experts divided among the ranks of a node"
)
