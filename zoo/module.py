"""ZooModule: the base class of every model of the zoo."""

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Self

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_model
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

import zoo
from zoo.base.checkpoint import (
    WEIGHTS_FILE,
    check_weights,
    is_pretrained_folder,
    read_checkpoint,
    read_pretrained,
    take_types,
    write_pretrained,
)
from zoo.base.hyperparameters import Configurable, build, class_path, find_class, plain_arguments
from zoo.base.named_weights import check_sources, leave_out, with_named
from zoo.base.random import SampleRandom
from zoo.batch_seed import SeedEachBatch
from zoo.hub import resolve, upload
from zoo.manual_optimization import ManualOptimization, step_schedules
from zoo.official import OfficialWeights
from zoo.optimizer_config import optimizer_config
from zoo.sample_positions import eval_positions, train_positions
from zoo.strategy_contract import step_was_applied

__all__ = ["ZooModule", "load"]


class ZooModule(OfficialWeights, Configurable, LightningModule):
    """Owns hyperparameters, optimizer, random draws, compilation, checkpoints and sharing, so that a method need not.

    A subclass calls ``super().__init__(optimizer=...)`` and is done: its constructor's arguments are stored as plain data,
    whoever built it, and ``load_from_checkpoint`` and ``from_pretrained`` need nothing but the path.

    A module with several optimizers sets ``self.automatic_optimization = False``, returns a list of `optimizer_config` from
    ``configure_optimizers``, and in ``training_step`` takes each step as Lightning's manual optimization says
    (``toggled_optimizer``, ``zero_grad``, ``manual_backward``, ``step``). Clipping by the Trainer's flags, schedules per step
    and per epoch, counting and resuming then need nothing more. Under DDP, where each backward pass reaches the weights of one
    optimizer only, take the strategy ``ddp_find_unused_parameters_true``.

    Args:
        optimizer: makes the optimizer from the parameter groups.
        lr_scheduler: makes the learning-rate schedule from the optimizer.
        lr_scheduler_interval: whether the schedule advances per optimizer step or per epoch.
        compile: compile the networks in place with ``torch.compile`` when training, testing or predicting starts.
    """

    #: Arguments of earlier versions that have another name now: ``{"old": "new"}``. They are still read, with a warning.
    renamed_arguments: ClassVar[dict[str, str]] = {}
    #: Whether batches stay as the data gives them in true half precision, which would round 8-bit values to others.
    exact_batches: ClassVar[bool] = False
    #: Whether a module that is rebuilt has its parameters in the stored floating-point types instead of its constructor's.
    keeps_stored_types: ClassVar[bool] = False
    #: Whether weights come from somewhere before any checkpoint is read.
    is_pretrained: bool = False

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        compile: bool = False,
    ) -> None:
        super().__init__()
        args, kwargs = self.__dict__["_init_arguments"]
        hyperparameters = {"_class_path": class_path(type(self)), **plain_arguments(type(self), args, kwargs)}
        self._set_hparams(hyperparameters)
        self._hparams_initial = self._to_hparams_dict(json.loads(json.dumps(hyperparameters)))
        self._log_hyperparams = True
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.compile_networks = compile
        #: Applied, not skipped, steps of each optimizer; saved, and followed by learning-rate schedules that advance per step.
        self.applied_steps_by_optimizer = [0]
        self._scheduled_steps = 0

    @override
    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: every argument is stored already. Kept so that a subclass may call it out of habit."""

    @property
    def init_config(self) -> dict[str, Any]:
        """The hyperparameters in the ``{"class_path", "init_args"}`` notation, for a module that is a component."""
        arguments = dict(self.hparams_initial)
        return {"class_path": arguments.pop("_class_path"), "init_args": arguments}

    # Optimization

    def parameter_groups(self) -> Iterable[Any]:
        """Parameters for the optimizer: all that are trained; override for groups with options of their own."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def optimizer_config(
        self, optimizer: OptimizerCallable, parameters: Iterable[Any], lr_scheduler: LRSchedulerCallable | None = None
    ) -> dict[str, Any]:
        """Build an optimizer with its schedule: one entry of what `configure_optimizers` returns for several.

        Args:
            optimizer: makes the optimizer.
            parameters: what it gets.
            lr_scheduler: makes its schedule, which advances as ``lr_scheduler_interval`` says.

        Raises:
            ValueError: If the optimizer refuses its options or the parameters; those of shapes that it does not take are named.
        """
        return optimizer_config(self, optimizer, parameters, lr_scheduler, self.lr_scheduler_interval)

    @override
    def configure_optimizers(self) -> Any:
        config = self.optimizer_config(self.optimizer, self.parameter_groups(), self.lr_scheduler)
        return config if self.lr_scheduler else config["optimizer"]

    @property
    def applied_steps(self) -> int:
        """Applied steps of the first optimizer."""
        return self.applied_steps_by_optimizer[0]

    @applied_steps.setter
    def applied_steps(self, steps: int) -> None:
        self.applied_steps_by_optimizer[0] = steps

    @override
    def on_train_start(self) -> None:
        """Count the steps that optimizers really apply."""
        counts, optimizers = self.applied_steps_by_optimizer, self.trainer.optimizers
        counts += [0] * (len(optimizers) - len(counts))
        for index, optimizer in enumerate(optimizers):
            if hasattr(optimizer, "register_step_post_hook"):
                optimizer.register_step_post_hook(partial(self._on_step, index))
        self._scheduled_steps = self.applied_steps

    def _on_step(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        if index == 0:
            self.on_applied_step()
        else:
            self.applied_steps_by_optimizer[index] += 1
        if not self.automatic_optimization:
            step_schedules(self, "step", self.applied_steps_by_optimizer[index], optimizer)

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Take a step; count it here where an engine such as DeepSpeed's steps in the optimizer's place."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not hasattr(self.trainer.optimizers[0], "register_step_post_hook") and step_was_applied(self.trainer.strategy):
            self.on_applied_step()

    def on_applied_step(self) -> None:
        """Called after each step that the first optimizer applied; extend with ``super()`` what must follow applied steps."""
        self.applied_steps += 1

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance a schedule; in automatic optimization not after a step that was skipped."""
        if self.automatic_optimization and self.lr_scheduler_interval == "step" and metric is None:
            if self.applied_steps == self._scheduled_steps:
                return
            self._scheduled_steps = self.applied_steps
        super().lr_scheduler_step(scheduler, metric)

    # Compilation

    def networks(self) -> list[nn.Module]:
        """The modules that ``compile=True`` compiles in place: the children that hold parameters."""
        return [child for child in self.children() if next(child.parameters(), None) is not None]

    @override
    def setup(self, stage: str) -> None:
        """Compile the networks once, in place, so that the names of the weights stay."""
        plugin = self.trainer.precision_plugin
        if self.exact_batches:
            plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # Lightning refuses to clip what fused optimizers step by, for the sake of scaled losses; these are not scaled.
            plugin.clip_gradients = partial(Precision.clip_gradients, plugin)  # type: ignore[method-assign]
        if isinstance(plugin, DoublePrecision):
            self.double()  # before a checkpoint's weights are loaded, which Lightning would round to float32
        if self.compile_networks:
            for network in self.networks():
                if network._compiled_call_impl is None:
                    network.compile()

    @override
    def teardown(self, stage: str) -> None:
        """Give the precision plugin its own ways back."""
        for name in ("convert_input", "clip_gradients"):
            vars(self.trainer.precision_plugin).pop(name, None)

    # Random draws

    @property
    def random_seed(self) -> int:
        """The seed of all draws: that of ``seed_everything``, else 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def train_random(self, batch_size: int) -> SampleRandom:
        """Draws of the current training batch, one stream a sample.

        They are a pure function of (seed, epoch, position of the sample in the epoch's global order): a resumed run draws
        what the interrupted one would have, and W processes with batches of b draw what one process with W*b does.

        Args:
            batch_size: number of samples in this process's batch.
        """
        epoch = 0 if self._trainer is None else self.trainer.current_epoch
        return SampleRandom(self.random_seed, train_positions(self, batch_size), epoch=epoch)

    def eval_random(self, batch_size: int) -> SampleRandom:
        """Draws of the current validation, test or prediction batch; the same at each evaluation.

        Args:
            batch_size: number of samples in this process's batch.
        """
        return SampleRandom(self.random_seed, eval_positions(self, batch_size), epoch=-1)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Callbacks that each run of this module needs; extend the list of ``super()``."""
        callbacks: list[Callback] = [SeedEachBatch(self.random_seed)]
        return callbacks if self.automatic_optimization else [*callbacks, ManualOptimization(self.trainer)]

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the package version and the seed; name frozen weights of a named source instead of storing them."""
        leave_out(self, checkpoint)
        checkpoint["zoo_version"] = zoo.__version__
        checkpoint["zoo_seed"] = self.random_seed
        checkpoint["zoo_applied_steps"] = list(self.applied_steps_by_optimizer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other sources of frozen weights; say so if a run is continued with another seed."""
        check_sources(self, checkpoint, self.keeps_stored_types if self._trainer is None else None)
        applied = checkpoint.get("zoo_applied_steps", checkpoint.get("global_step", 0))
        self.applied_steps_by_optimizer = list(applied) if isinstance(applied, list) else [applied]
        seed = checkpoint.get("zoo_seed", self.random_seed)
        if self._trainer is not None and self.trainer.training and seed != self.random_seed:
            rank_zero_warn(
                f"The checkpoint was trained with seed {seed}, this run has seed {self.random_seed}: order and noise differ from"
                f" those of the first run. Pass --seed_everything {seed} to continue exactly."
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights after comparing all names and shapes; frozen weights of a named source may be missing.

        Raises:
            ValueError: names or shapes differ; all of them are listed.
        """
        state_dict = with_named(self, state_dict)
        check_weights(self, state_dict, "the checkpoint", strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        hparams_file: None = None,
        strict: bool = True,
        weights_only: Literal[True] = True,
        **overrides: Any,
    ) -> Self:
        """Build the module that a checkpoint holds, weights included (the averaged ones where EMA was on).

        Args:
            checkpoint_path: a ``.ckpt`` file of Lightning.
            map_location: as for ``torch.load``.
            hparams_file: not used; the checkpoint holds everything.
            strict: whether missing and unknown names of weights are errors.
            weights_only: always true; there is no unsafe way.
            overrides: constructor arguments to replace.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is unsafe or damaged, or its class, arguments or weights do not fit.
        """
        if not weights_only:
            raise ValueError("Checkpoints are read with weights_only=True only: others could run code when loaded.")
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        if cls.CHECKPOINT_HYPER_PARAMS_KEY not in checkpoint:
            raise ValueError(f"{checkpoint_path} holds no hyperparameters, so the module cannot be rebuilt from it.")
        module = cls._build({**checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY]}, overrides)
        if module.keeps_stored_types:
            take_types(module, checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
        weights = with_named(module, checkpoint["state_dict"])
        check_weights(module, weights, str(checkpoint_path), strict)
        module.load_state_dict(weights, strict=strict)
        return module

    # Sharing

    def save_pretrained(self, folder: str | Path, description: str = "", half: bool = False) -> Path:
        """Write ``config.json`` and ``model.safetensors`` (Hugging Face layout) and return the folder.

        Args:
            folder: where to write; made if missing.
            description: one line on what the weights were trained on and what they reach, stored in ``config.json``.
            half: store float32 weights in float16, half as large; they are float32 again when loaded.
        """
        config = {**self.hparams_initial, "zoo_version": zoo.__version__, **self.shared_entries()}
        if description:
            config["_description"] = description
        return write_pretrained(self, Path(folder), config, half)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **overrides: Any) -> Self:
        """Build the module of a safetensors folder, a Hugging Face hub repository or weights shipped with this package.

        Args:
            name_or_folder: a folder written by `save_pretrained`, ``"organisation/name"`` on the hub, or a name that
                ``zoo list`` shows.
            overrides: constructor arguments to replace.

        Raises:
            FileNotFoundError: nothing is found under that name.
            ValueError: damaged files, or class, arguments or weights do not fit.
        """
        folder = Path(name_or_folder)
        if not is_pretrained_folder(folder):
            folder = resolve(str(name_or_folder))
        config, weights = read_pretrained(folder)
        module = cls._build(config, overrides)
        if module.keeps_stored_types and not config.get("_half"):
            take_types(module, weights)
        check_weights(module, weights, str(folder))
        load_model(module, str(folder / WEIGHTS_FILE))
        module.take_shared_entries(config)
        return module

    def shared_entries(self) -> dict[str, Any]:
        """Plain data that ``config.json`` keeps beside the hyperparameters, by names that begin with an underscore."""
        return {}

    def take_shared_entries(self, config: Mapping[str, Any]) -> None:
        """Give a module that is rebuilt what `shared_entries` kept.

        Args:
            config: all entries of ``config.json``.
        """

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, message: str = "Upload") -> str:
        """Upload `save_pretrained`'s folder to the Hugging Face hub.

        Args:
            repo_id: ``"organisation/name"``.
            private: whether a repository that is created now is private.
            token: access token; default is the one of ``hf auth login``.
            message: commit message.

        Returns:
            Address of the commit.
        """
        with TemporaryDirectory() as folder:
            return upload(self.save_pretrained(folder), repo_id, private, token, message)

    @classmethod
    def _build(cls, hyperparameters: dict[str, Any], overrides: dict[str, Any]) -> Self:
        """Build this class, or the subclass that the hyperparameters name, from plain data."""
        arguments = {k: v for k, v in hyperparameters.items() if k != "zoo_version" and not k.startswith("_")}
        stored = find_class(hyperparameters["_class_path"], ZooModule) if "_class_path" in hyperparameters else cls
        if not (issubclass(stored, cls) or issubclass(cls, stored)):
            raise ValueError(f"The checkpoint holds a {stored.__name__}, which is not a {cls.__name__}.")
        target = stored if issubclass(stored, cls) else cls
        for old, new in target.renamed_arguments.items():
            if old in arguments:
                rank_zero_warn(f"{target.__name__}: the argument {old!r} of the checkpoint is called {new!r} now.")
                arguments[new] = arguments.pop(old)
        return build(cls, {"class_path": class_path(target), "init_args": {**arguments, **overrides}})


def load(name_or_folder: str | Path, **overrides: Any) -> ZooModule:
    """Load a pretrained module.

    Args:
        name_or_folder: a name of `zoo.list_models`, a folder of ``save_pretrained``, or ``"organisation/name"`` on the hub.
        overrides: constructor arguments to replace.

    Raises:
        FileNotFoundError: nothing is found under that name; the nearest names are given.
        ValueError: the files are damaged or do not fit.
    """
    return ZooModule.from_pretrained(name_or_folder, **overrides).eval()
