"""EDiT whose replicas are sharded (FSDP2): what a rank holds of a replica, gathered to compute and made whole to save."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from strategies.edit.blocks import Block
from strategies.edit.strategy import REPLICATE, SHARD, EDiTStrategy
from strategies.mesh import axis_group, named_mesh
from strategies.refusals import refuse_manual_optimization
from strategies.whole_state import divided_like, divided_state, whole

__all__ = ["EDiTShardedStrategy"]


class _ShardRoot(nn.Module):
    """Owns the parameters outside of all blocks, and calls the LightningModule, so that FSDP sees each step begin and end."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class EDiTShardedStrategy(EDiTStrategy):
    """EDiT whose replicas are each sharded over the processes of a node (FSDP2).

    Processes form a mesh ``replicate x shard``. Within a replica, parameters, gradients and optimizer states are sharded and
    gradients averaged at each step; replicas synchronise over ``replicate``, each rank its own shard, with norms over the whole.
    Checkpoints hold whole tensors, as those of any strategy do.

    Args:
        shard_size: processes a replica; null: those of one node.
        reshard_after_forward: free the gathered weights of a block between forward and backward pass.
        kwargs: of `EDiTStrategy`.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, shard_size: int | None = None, reshard_after_forward: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if shard_size is not None and shard_size < 1:
            raise ValueError(f"EDiTShardedStrategy: shard_size={shard_size} must be at least 1, or null for a node's processes.")
        self.shard_size = shard_size
        self.reshard_after_forward = reshard_after_forward

    def shards_parameters(self) -> bool:
        """Yes: a rank holds its shard of a replica."""
        return True

    def forwards_are_collective(self) -> bool:
        """Yes: FSDP gathers the weights of a block for each pass."""
        return True

    def _make_mesh(self) -> DeviceMesh:
        return named_mesh(self.root_device.type, **{REPLICATE: -1, SHARD: self.shard_size or self.num_processes})

    def _check(self, trainer: Trainer) -> None:
        super()._check(trainer)
        refuse_manual_optimization(self, "weights are gathered for one forward and backward pass a step", "use EDiTStrategy")

    def _set_up_network(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not _is_sharded(self.lightning_module):
            self.precision_plugin.convert_module(self.model)
            self.model_to_device()
            self._spread_from_first([*self.lightning_module.parameters(), *self.lightning_module.buffers()])
            self.model = self._shard()
        else:
            self.model = self._root
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        # FSDP's gathered weights may not be inference tensors.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

    def _blocks(self, module: LightningModule) -> list[Block]:
        """Entries of module lists are called, and so gathered, one by one; other blocks may be read only: the root has them."""
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        entries = {entry for part in lists for entry in part}
        blocks = super()._blocks(module)
        return [block if block.module in entries else dataclasses.replace(block, module=None) for block in blocks]

    def _shard(self) -> nn.Module:
        assert self.mesh is not None and self.lightning_module is not None
        self._root = _ShardRoot(self.lightning_module)
        for block in self._blocks(self.lightning_module):
            if block.module is not None:
                shared = len({id(p) for p in block.module.parameters() if p.requires_grad}) - len(block.parameters)
                if shared:
                    raise ValueError(
                        f"EDiTShardedStrategy: block {block.name} has {shared} parameters that are other blocks' too, which"
                        " cannot be sharded with each: name other blocks in sync_blocks, or use EDiTStrategy."
                    )
                fully_shard(block.module, mesh=self.mesh[SHARD], reshard_after_forward=self.reshard_after_forward)
        fully_shard(self._root, mesh=self.mesh[SHARD], reshard_after_forward=self.reshard_after_forward)
        return self._root

    def _settle(self) -> None:
        """Let the new weights of a block be there before FSDP gathers them, on a stream of its own."""
        if self.root_device.type != "cpu":
            torch.accelerator.current_stream(self.root_device).synchronize()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A step of the inner optimizer, in the warm-up with gradients averaged over the replicas."""

        def averaged() -> Any:
            result = closure()
            if self.in_warmup:
                self._average_gradients()
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The 2-norm of this replica's whole gradient, 0-dim; a collective of the ranks that share the replica."""
        gradients = [p.grad for group in self.optimizers[0].param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def _average_gradients(self) -> None:
        assert self.mesh is not None and self.lightning_module is not None
        group, count = axis_group(self.mesh, REPLICATE), self.mesh[REPLICATE].size()
        parameters = [parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad]
        has = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.root_device).int()
        dist.all_reduce(has, group=group)
        for parameter, ranks in zip(parameters, has.tolist(), strict=True):
            if not ranks:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            if local.numel():
                dist.all_reduce(local, group=group)
                local /= count

    # Checkpoints

    @torch.no_grad()
    def _whole_state_dict(self) -> dict[str, Any]:
        return whole(super()._whole_state_dict())

    @torch.no_grad()
    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer in whole tensors."""
        return whole(super().optimizer_state(optimizer))

    @torch.no_grad()
    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take whole weights, or this rank's shards of them."""
        module = self.lightning_module
        assert module is not None
        if _is_sharded(module):
            own = dict(module.named_parameters(remove_duplicate=False))
            weights = {name: divided_like(tensor, own.get(name)) for name, tensor in checkpoint["state_dict"].items()}
            checkpoint = {**checkpoint, "state_dict": weights}
        super().load_model_state_dict(checkpoint, strict)

    @torch.no_grad()
    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's shards of whole states."""
        states = [
            divided_state(state, optimizer)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    @override
    def teardown(self) -> None:
        """Leave the shards where they are."""
        module, self._lightning_module = self._lightning_module, None  # else it would be moved to the CPU, shard by shard
        try:
            super().teardown()
        finally:
            self._lightning_module = module


def _is_sharded(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(parameter, DTensor) for parameter in module.parameters())
