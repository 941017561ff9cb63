"""What strategies share that divide rows of some parameters among ranks and leave everything else to data parallelism."""

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from strategies.divided_rows import DividedRows
from strategies.refusals import refuse_scaled_losses
from zoo.strategy_contract import StrategyContract

__all__ = ["DividedStrategy"]

Parts = TypeVar("Parts", bound=DividedRows)


class DividedStrategy(StrategyContract, DDPStrategy, Generic[Parts]):
    """Data parallelism in which ranks keep parts of some parameters, of which DDP's reducer knows nothing.

    Weights at the start are those of rank 0. Clipping goes by the norm of the whole gradient. Checkpoints hold everything whole,
    optimizer state too, and continue under any strategy that reads such checkpoints, with any number of ranks; so do those of
    other strategies under this one. After a run the module is whole again in every process; until then a callback sees this
    rank's part.

    In evaluation and prediction ranks may run the network a different number of times: those that are ready serve the others.
    Callbacks that run it outside of a step, each rank as often as it has work, do so inside `uneven_forwards`.

    Args:
        **kwargs: As for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: Precision is 16-mixed.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._parts: Parts | None = None
        self._accumulates = False

    @abstractmethod
    def _divide(self, module: LightningModule) -> Parts | None:
        """Divide a module's parameters; None: there is nothing to divide. Called at the beginning of each run."""

    def _serve(self, done: bool) -> None:
        """Take part in other ranks' passes without gradients.

        Args:
            done: Until no rank has anything left; otherwise until no rank runs the network.
        """

    def _collects(self) -> bool:
        """Whether this rank's part is collected for a checkpoint."""
        return True

    # A run begins and ends

    @override
    def setup_environment(self) -> None:
        """Divide, before any callback or checkpoint sees the module."""
        super().setup_environment()
        assert self.lightning_module is not None
        self._parts = None
        self._parts = self._divide(self.lightning_module)

    @override
    def setup(self, trainer: Trainer) -> None:
        """Wrap the module."""
        if self._parts is not None:
            refuse_scaled_losses(self)
            assert self.lightning_module is not None
            self._parts.hide_from_ddp(self.lightning_module)
            self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, _Unite) for callback in callbacks):
                callbacks.append(_Unite())
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        """Undo what `setup` did; parts are united later, after the last callback that sees them."""
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        if self.lightning_module is not None and self._parts is not None:
            self._parts.show_to_ddp(self.lightning_module)
        super().teardown()

    def unite(self) -> None:
        """Give every process everything again; called by Lightning when a run has ended well."""
        if self._parts is not None:
            self._parts.unite()

    def _setup_model(self, model: nn.Module) -> Any:
        """The module in DDP; as it is, with what rank 0 has, where only parts are trained, of which DDP knows nothing."""
        if self._parts is None or any(p.requires_grad and not self._parts.holds(p) for p in model.parameters()):
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
            if isinstance(self.model, DistributedDataParallel):
                with super().block_backward_sync():
                    yield
            else:
                yield
        finally:
            self._accumulates = False

    def gradient_norm(self) -> Tensor | None:
        """The 2-norm of the whole gradient, 0-dim, the same on all ranks; a collective call of the ranks that divide."""
        if self._parts is None:
            return None
        return self._parts.gradient_norm(p for optimizer in self.optimizers for p in self.precision_plugin.main_params(optimizer))

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self._parts is not None
        self._parts.clip_gradients(self.precision_plugin.main_params(optimizer), clip_val)

    # Evaluation

    @contextmanager
    def uneven_forwards(self) -> Iterator[None]:
        """Inside, and without gradients, each rank may run the network as often as it likes, or not at all.

        All ranks must enter; each leaves when no rank of its group is inside any more, having served the others.
        """
        yield
        self._serve(done=False)

    def _serve_after(self, loop: Any, args: tuple[Any, ...]) -> None:
        """Serve ranks whose step needs more passes; after the last batch of a loader also those with more batches."""
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
        return self._parts.whole_state(optimizer, state) if self._parts is not None and self._collects() else state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save everything whole, averages and references beside the weights too."""
        if self._parts is not None and self._collects():
            checkpoint = self._parts.whole_weights(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint and keep this rank's part.

        Raises:
            ValueError: It holds other numbers of rows.
        """
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._parts is None:
            return checkpoint
        self._parts.check_weights(checkpoint.get("state_dict", {}), checkpoint_path)
        return self._parts.part_of_weights(checkpoint)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep this rank's part of the state."""
        if self._parts is not None:
            states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            checkpoint = {**checkpoint, "optimizer_states": [self._parts.part_of_state(*pair) for pair in states]}
        super().load_optimizer_state_dict(checkpoint)


class _Unite(Callback):
    """Unites parts when everything that averages or stores them is done."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, DividedStrategy):
            trainer.strategy.unite()
