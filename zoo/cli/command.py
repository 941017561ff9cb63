"""The command line: LightningCLI with class names, run folders, exact precedence of options and errors for people."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import load_model
from typing_extensions import override

from zoo.base.checkpoint import WEIGHTS_FILE, check_weights, read_pretrained
from zoo.base.parsing import our_parsing
from zoo.base.samples import SupportsSampling
from zoo.base.torchrun import agent_store, is_restarted, local_world_size, num_nodes, restarts_left, wait_for_rank_zero
from zoo.callbacks.run_checkpoint import RunCheckpoint
from zoo.cli.argv import STAGES, stage_first
from zoo.cli.csv_logger import ResumableCSVLogger
from zoo.cli.data_arguments import fill_model_arguments
from zoo.cli.display import display_callbacks, print_results, silence
from zoo.cli.messages import say
from zoo.cli.order import Command
from zoo.cli.parser import ZooArgumentParser
from zoo.cli.runs import METRICS, archive_run, last_checkpoint, put_back
from zoo.hub import import_everything
from zoo.module import ZooModule

__all__ = ["ZooCLI", "run"]

ARCHIVED = "zoo/earlier_run"
"""Entry of torchrun's store: the folder to which the first start of a run has moved the earlier one."""


def run(argv: list[str]) -> int:
    """Run a stage: fit, validate, test or predict.

    Returns:
        Exit status: 0 done, 143 stopped by SIGTERM after saving; or what a strategy asks its launcher for.
    """
    silence()
    try:
        ZooCLI(argv)
    except SIGTERMException as stop:
        if stop.code:  # a strategy wants the launcher to start the processes again
            print("Stopped after saving; the launcher starts the processes again.", file=sys.stderr)
            return int(stop.code)
        print("Stopped by SIGTERM after saving; the same command with --ckpt_path last continues.", file=sys.stderr)
        return 143
    return 0


class ZooCLI(LightningCLI):
    """LightningCLI in subclass mode for model and data, with what long-lived runs need.

    * Options win in this order: defaults < configuration files < checkpoint < what is typed.
    * ``-c bfn/digits`` names a packaged configuration; several ``-c`` compose, later ones win.
    * ``--ckpt_path`` takes a ``.ckpt`` file, ``last``, a safetensors folder, or the name of a shipped model; without
      ``--model`` the class comes from it, and without ``--data`` the data too.
    * A run lives in ``runs/<config>``: ``checkpoints/last.ckpt``, ``metrics.csv``, TensorBoard events, ``config.yaml``.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        if not isinstance(args, list | tuple | None):
            raise TypeError("ZooCLI takes its arguments as a list of strings.")
        argv = stage_first(list(sys.argv[1:] if args is None else args))
        self._stages = {*argv[:1]} & {*STAGES}
        self._command = Command([])
        self._archived: Path | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=ZooArgumentParser,
            parser_kwargs={"prog": "zoo", "description": "`zoo --help` lists all verbs."},
            args=argv,
            **kwargs,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The stage that is typed, or all: parsers of the others would take a second to build."""
        stages = LightningCLI.subcommands()
        return {name: skipped for name, skipped in stages.items() if name in (self._stages or stages)}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint.*``, which survives composed configurations."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    @override
    @our_parsing()
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse in the order defaults < configuration files < checkpoint < typed options."""
        argv: list[str] = args  # type: ignore[assignment]
        if self._stages:
            self._command = Command.read(argv[0], argv[1:])
            argv = self._command.argv
        self.config = parser.parse_args(argv)

    @override
    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint win over typed options here; `parse_arguments` has put it in its place already."""

    @override
    def before_instantiate_classes(self) -> None:
        """Set the run's folder."""
        assert self.subcommand is not None
        config: Namespace = self.config[self.subcommand]
        config.trainer.default_root_dir = str(self._command.run_folder)
        config["weights_only"] = True
        if (local := local_world_size()) is not None:  # torchrun has started the processes: their number is not ours to choose
            config.trainer.devices = local
            config.trainer.num_nodes = num_nodes()
        if config.get("checkpoint") and config.checkpoint.folder is None:
            config.checkpoint.folder = str(self._command.run_folder / "checkpoints")
        given = self._command.ckpt_path or self._command.pretrained or (config.model.get("init_args") or {}).get("checkpoint")
        self._has_weights = bool(given)
        self.save_config_kwargs["config_filename"] = "config.yaml" if self.subcommand == "fit" else f"{self.subcommand}.yaml"

    def _announce_random_weights(self) -> None:
        pretrained = isinstance(self.model, ZooModule) and self.model.is_pretrained
        if self.subcommand != "fit" and not self._has_weights and not pretrained:
            say(
                f"No --ckpt_path: {self.subcommand} uses untrained, random weights"
                " (--ckpt_path last takes the newest of this run)."
            )

    @override
    def instantiate_classes(self) -> None:
        """Build model, data and trainer; load shipped or shared weights."""
        fill_model_arguments(self.config[self.subcommand])
        super().instantiate_classes()
        self._announce_random_weights()
        if self._command.pretrained is not None:
            entries, weights = read_pretrained(self._command.pretrained)
            check_weights(self.model, weights, str(self._command.pretrained))
            load_model(self.model, self._command.pretrained / WEIGHTS_FILE)  # knows tied weights, which are stored once
            if isinstance(self.model, ZooModule):
                self.model.take_shared_entries(entries)

    def before_fit(self) -> None:
        """Move an earlier run in the same folder out of the way of a new one, before any process uses it."""
        if self._command.ckpt_path is None and not self.config.fit.trainer.fast_dev_run:
            self._archive()
            wait_for_rank_zero("zoo/folder_is_ready")

    @rank_zero_only
    def _archive(self) -> None:
        store = agent_store()
        if is_restarted():  # a start before this one may have done it
            if store is not None and store.check([ARCHIVED]):
                self._archived = Path(store.get(ARCHIVED).decode())
            return
        self._archived = archive_run(self._command.run_folder)
        if self._archived is not None:
            if store is not None:
                store.set(ARCHIVED, str(self._archived))
            say(
                f"A new run starts in {self._command.run_folder}; the earlier one moved to {self._archived}"
                " (--ckpt_path last continues)."
            )

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self._archived is not None and self._has_trained_nothing():
                put_back(self._archived)
                say(f"Nothing was trained: the earlier run is back in {self._command.run_folder}.")
            raise

    def _has_trained_nothing(self) -> bool:
        if restarts_left():  # the next start would continue what is put back
            return False
        earlier_start = is_restarted() and (self._command.run_folder / METRICS).exists()  # which has trained
        return self.trainer.global_step == 0 and not earlier_start and last_checkpoint(self._command.run_folder) is None

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        """Run the validation and print its metrics."""
        self._evaluate("validate", verbose, kwargs)

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Run the test and print its metrics."""
        self._evaluate("test", verbose, kwargs)

    def _evaluate(self, stage: str, verbose: bool, kwargs: dict[str, Any]) -> None:
        results = getattr(self.trainer, stage)(verbose=False, **kwargs)
        if verbose and self.trainer.is_global_zero:
            print_results(results, stage)

    def before_predict(self) -> None:
        """Check that there is something to predict, and a callback to write it.

        Raises:
            ValueError: If the model draws no samples, and the data have no pictures for it.
        """
        draws_only = all(getattr(self.datamodule, f"predict_{name}", None) is None for name in ("images", "split"))
        if not isinstance(self.model, SupportsSampling) and hasattr(self.datamodule, "predict_images") and draws_only:
            split = " or --data.predict_split train" if hasattr(self.datamodule, "predict_split") else ""
            raise ValueError(
                f"{type(self.model).__name__} draws no samples: name the pictures to work on with"
                f" --data.predict_images FOLDER{split}."
            )
        if not any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            say("Nothing will be written: add --trainer.callbacks+ ImageGridWriter (or TextWriter, JSONLWriter).")

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("logger") is None or config.get("logger") is True:
            config["logger"] = self._loggers()
        config["enable_checkpointing"] = config.get("enable_checkpointing") is not False
        if not config["enable_checkpointing"]:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
        callbacks = [*callbacks, *display_callbacks(config)]
        strategy = config.get("strategy")
        if isinstance(strategy, str) and strategy not in StrategyRegistry:
            import_everything()  # our strategies have names, which their modules tell Lightning
        try:
            return super()._instantiate_trainer({**config, "enable_model_summary": False}, callbacks)
        except (ValueError, MisconfigurationException) as error:
            raise ValueError(f"trainer: {error}{_sharding_without_gpu(config)}") from error

    def _loggers(self) -> list[Logger]:
        step = None
        if self.subcommand == "fit":  # started again before its first checkpoint, it repeats all steps
            step = self._command.checkpoint.get("global_step", 0 if is_restarted() and self._command.ckpt_path is None else None)
        return [
            TensorBoardLogger(self._command.run_folder, name="", version="", purge_step=step),
            ResumableCSVLogger(self._command.run_folder, resume_step=step),
        ]


def _sharding_without_gpu(config: Mapping[str, Any]) -> str:
    """Advice on strategies for CPUs, where one that shards on GPUs only was chosen; else empty."""
    strategy = config.get("strategy")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    gpu_only = name.lower().startswith(("fsdp", "deepspeed"))
    if not gpu_only or (torch.accelerator.is_available() and config.get("accelerator") != "cpu"):
        return ""
    return (
        " Of those that divide weights among processes, these run on CPUs: -c strategies/paro_iig, -c strategies/edit_sharded,"
        " and for experts -c strategies/expert_parallel."
    )
