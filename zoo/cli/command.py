"""The command line: LightningCLI with class names, run folders, exact precedence of options and errors for people."""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_model

import strategies
from zoo.base.checkpoint import WEIGHTS_FILE, check_weights, is_pretrained_folder, read_checkpoint, read_pretrained
from zoo.base.hyperparameters import check_config, class_path, find_class
from zoo.base.samples import SupportsSampling
from zoo.base.shard_reader import check_folder
from zoo.base.torchrun import agent_store, is_restarted, local_world_size, num_nodes, restarts_left, wait_for_rank_zero
from zoo.callbacks import RunCheckpoint
from zoo.cli.argv import STAGES, import_paths, run_name, say, split_configs, stage_first, take_ckpt_path, typed_value
from zoo.cli.configs import find_config, read_sections, texts, warn_of_replaced_callbacks
from zoo.cli.csv_logger import ResumableCSVLogger
from zoo.cli.data_arguments import fill_model_arguments
from zoo.cli.parser import ZooArgumentParser
from zoo.cli.precedence import above_configs, architecture, as_config, find_named, is_same_class, merged, replaced
from zoo.cli.runs import METRICS, archive_run, find_checkpoint, last_checkpoint, put_back, run_folder
from zoo.hub import import_methods, resolve
from zoo.module import ZooModule

__all__ = ["ZooCLI"]

import_methods()  # their classes are found by name

ARCHIVED = "zoo/earlier_run"
"""Where torchrun's store says to which folder the first start of a run has moved the earlier one."""
STRATEGIES = {name: getattr(strategies, name) for name in strategies.__all__}  # imported here, to be found by their names


class ZooCLI(LightningCLI):
    """LightningCLI in subclass mode for model and data, with what long-lived runs need.

    * Options win in this order: defaults < configuration files < checkpoint < what is typed.
    * ``-c bfn/digits`` names a packaged configuration; several ``-c`` compose, later ones win.
    * ``--ckpt_path`` takes a ``.ckpt`` file, ``last``, a safetensors folder, or the name of a shipped model; without
      ``--model`` the class comes from it, and without ``--data`` the data too.
    * A run lives in ``runs/<config>``: ``checkpoints/last.ckpt``, ``metrics.csv``, TensorBoard events, ``config.yaml``.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        self._run_folder = run_folder("run")
        self._ckpt_path: Path | None = None
        self._pretrained: Path | None = None
        self._archived: Path | None = None
        self._checkpoint: dict[str, Any] = {}
        super().__init__(
            ZooModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=ZooArgumentParser,
            parser_kwargs={
                "prog": "zoo",
                "description": "Research systems that people can actually run."
                " More verbs: list, assets, convert, plan, simulate, serve-data.",
            },
            args=args,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint.*``, which survives composed configurations (LightningCLI hook)."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    # Parsing

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse in the order defaults < configuration files < checkpoint < typed options (LightningCLI hook)."""
        if not isinstance(args, list | tuple | None):
            raise TypeError("ZooCLI takes its arguments as a list of strings.")
        argv = list(sys.argv[1:] if args is None else args)
        argv = stage_first(argv)
        if argv and argv[0] in STAGES:
            argv = self._in_order_of_precedence(argv[0], argv[1:])
        self.config = parser.parse_args(argv)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint win over typed options here; `parse_arguments` has put it in its place already."""

    def _in_order_of_precedence(self, stage: str, argv: list[str]) -> list[str]:
        configs, typed = split_configs(argv)
        paths = [find_config(name) for name in configs]
        parsed = [read_sections(path) for path in paths]
        warn_of_replaced_callbacks(paths, parsed)
        ckpt, typed = take_ckpt_path(typed)
        if ckpt is None:
            ckpt = next((config["ckpt_path"] for config in reversed(parsed) if config.get("ckpt_path")), None)
        if ckpt is None and stage == "fit" and is_restarted():
            ckpt = "last"  # what the processes had done goes on
        self._run_folder = run_folder(run_name(configs, typed, parsed, ckpt))
        root = typed_value(typed, "--trainer.default_root_dir")
        root = root or next((r for c in reversed(parsed) if (r := (c.get("trainer") or {}).get("default_root_dir"))), None)
        if root:
            self._run_folder = Path(root)
        chosen = {*texts(parsed), *import_paths(typed)}
        stored = self._read_ckpt(stage, ckpt, chosen) if ckpt else {}
        for section, base in (("model", LightningModule), ("data", LightningDataModule)):
            if section in stored:
                check_config(base, stored[section], chosen)
        if "model" in stored:
            assert ckpt is not None
            stored["model"] = self._below_typed(stage, ckpt, stored["model"], parsed, typed, chosen)
        data = stored.pop("data", None)
        if data and not typed_value(typed, "--data") and (above := above_configs(data, parsed)):
            stored["data"] = above
        ordered = [stage]
        for path in paths:
            ordered += ["--config", str(path)]
        if stored:
            ordered += ["--config", json.dumps(stored)]
        ordered += ["--ckpt_path", "null" if self._ckpt_path is None else str(self._ckpt_path)]
        return ordered + typed

    def _below_typed(
        self, stage: str, ckpt: str, model: dict[str, Any], parsed: list[dict[str, Any]], typed: list[str], chosen: set[str]
    ) -> dict[str, Any]:
        """The model that a checkpoint stores, of a class that fits the configurations; says which of their values it replaces.

        Raises:
            ValueError: the configurations name a class that cannot be what the checkpoint holds.
        """
        sections: Iterator[Mapping[str, Any]] = (
            section if isinstance(section, dict) else {"class_path": section} for c in parsed if (section := c.get("model"))
        )
        configured: Mapping[str, Any] = reduce(merged, sections, {})
        name = configured.get("class_path")
        if name and not typed_value(typed, "--model") and not is_same_class(name, model["class_path"]):
            model = {**model, "class_path": self._common_class(stage, ckpt, model, name, chosen)}
        options = [word.partition("=")[0].removeprefix("--") for word in typed if word.startswith("--model.")]
        values = [
            (option, old, new)
            for option, old, new in replaced(architecture(configured.get("init_args")), architecture(model["init_args"]), "model")
            if not any(f"{option}.".startswith(f"{other}.") for other in options)
        ]
        if values:
            told = ", ".join(f"{option} is {new} instead of {old}" for option, old, new in values)
            say(f"{ckpt} wins over the configuration: {told} (type --{values[0][0]} {values[0][1]} and so on to keep yours).")
        return model

    def _common_class(self, stage: str, ckpt: str, model: dict[str, Any], name: str, chosen: set[str]) -> str:
        """Import path of the class to build, where configurations name another one than the checkpoint."""
        named, kept = find_named(name, LightningModule), find_class(model["class_path"], LightningModule)
        refusal = f"The configuration is of {name}, --ckpt_path {ckpt} of {kept.__name__}"
        if named is None or not (issubclass(named, kept) or issubclass(kept, named)):
            raise ValueError(f"{refusal}: give a configuration and a checkpoint of the same model.")
        if issubclass(kept, named) and not (stage == "fit" and self._pretrained):  # the run itself goes on, or is looked at
            return class_path(kept)
        try:
            check_config(LightningModule, {**model, "class_path": class_path(named)}, chosen)
        except ValueError as error:
            raise ValueError(f"{refusal}, whose hyperparameters do not fit: {error}") from error
        return class_path(named)

    def _read_ckpt(self, stage: str, ckpt: str, chosen: set[str]) -> dict[str, Any]:
        """Find what ``--ckpt_path`` names and return the model and data that it stores, as configuration."""
        if ckpt != "last" and (is_pretrained_folder(ckpt) or not (Path(ckpt).exists() or ckpt.endswith(".ckpt"))):
            if not (stage == "fit" and is_restarted() and last_checkpoint(self._run_folder)):
                self._pretrained = resolve(ckpt)
                return {"model": as_config(read_pretrained(self._pretrained)[0], LightningModule, chosen)}
            ckpt = "last"
        self._ckpt_path = find_checkpoint(ckpt, self._run_folder, stage)
        if self._ckpt_path is None:
            say(f"{self._run_folder} holds no checkpoint yet: starting anew.")
            return {}
        if self._ckpt_path.is_dir():  # of a sharding strategy, which stores no hyperparameters: the configuration has them
            check_folder(self._ckpt_path)
            return {}
        self._checkpoint = read_checkpoint(self._ckpt_path)
        stored = {}
        if model := self._checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY):
            stored["model"] = as_config(model, LightningModule, chosen)
        if (data := self._checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)) and "_class_path" in data:
            stored["data"] = as_config(data, LightningDataModule, chosen)
        return stored

    # Building

    def before_instantiate_classes(self) -> None:
        """Set the run's folder (LightningCLI hook)."""
        assert self.subcommand is not None
        config: Namespace = self.config[self.subcommand]
        config.trainer.default_root_dir = str(self._run_folder)
        config["weights_only"] = True
        if (local := local_world_size()) is not None:  # torchrun has started the processes: their number is not ours to choose
            config.trainer.devices = local
            config.trainer.num_nodes = num_nodes()
        if config.get("checkpoint") and config.checkpoint.folder is None:
            config.checkpoint.folder = str(self._run_folder / "checkpoints")
        given = self._ckpt_path or self._pretrained or (config.model.get("init_args") or {}).get("checkpoint")
        if self.subcommand != "fit" and not given:
            say(
                f"No --ckpt_path: {self.subcommand} uses untrained, random weights"
                " (--ckpt_path last takes the newest of this run)."
            )
        self.save_config_kwargs["config_filename"] = "config.yaml" if self.subcommand == "fit" else f"{self.subcommand}.yaml"

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; load shipped or shared weights (LightningCLI hook)."""
        # A module that checks batches before they move is no mistake, whatever data it is given.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        fill_model_arguments(self.config[self.subcommand])
        super().instantiate_classes()
        if self._pretrained is not None:
            entries, weights = read_pretrained(self._pretrained)
            check_weights(self.model, weights, str(self._pretrained))
            load_model(self.model, self._pretrained / WEIGHTS_FILE)  # knows tied weights, which are stored once
            self.model.take_shared_entries(entries)

    def before_fit(self) -> None:
        """Move an earlier run in the same folder out of the way of a new one, before any process uses it (LightningCLI hook)."""
        if self._ckpt_path is None and not self.config.fit.trainer.fast_dev_run:
            self._archive()
            wait_for_rank_zero("zoo/folder_is_ready")

    @rank_zero_only
    def _archive(self) -> None:
        store = agent_store()
        if is_restarted():  # a start before this one may have done it
            if store is not None and store.check([ARCHIVED]):
                self._archived = Path(store.get(ARCHIVED).decode())
            return
        self._archived = archive_run(self._run_folder)
        if self._archived is not None:
            if store is not None:
                store.set(ARCHIVED, str(self._archived))
            say(
                f"A new run starts in {self._run_folder}; the earlier one moved to {self._archived} (--ckpt_path last continues)."
            )

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self._archived is not None and self._has_trained_nothing():
                put_back(self._archived)
                say(f"Nothing was trained: the earlier run is back in {self._run_folder}.")
            raise

    def _has_trained_nothing(self) -> bool:
        if restarts_left():  # the next start would continue what is put back
            return False
        earlier_start = is_restarted() and (self._run_folder / METRICS).exists()  # which has trained
        return self.trainer.global_step == 0 and not earlier_start and last_checkpoint(self._run_folder) is None

    def before_predict(self) -> None:
        """See that there is something to predict, and someone to write it (LightningCLI hook).

        Raises:
            ValueError: the model draws no samples, and the data have no pictures for it.
        """
        draws_only = all(getattr(self.datamodule, f"predict_{name}", None) is None for name in ("images", "split"))
        if not isinstance(self.model, SupportsSampling) and hasattr(self.datamodule, "predict_images") and draws_only:
            split = " or --data.predict_split train" if hasattr(self.datamodule, "predict_split") else ""
            raise ValueError(
                f"{type(self.model).__name__} draws no samples: name the pictures to work on with "
                f"--data.predict_images FOLDER{split}."
            )
        if not any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            say("Nothing will be written: add --trainer.callbacks+ ImageGridWriter (or TextWriter, JSONLWriter).")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("logger") is None or config.get("logger") is True:
            config["logger"] = self._loggers()
        config["enable_checkpointing"] = config.get("enable_checkpointing") is not False
        if not config["enable_checkpointing"]:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, MisconfigurationException) as error:
            raise ValueError(f"trainer: {error}{_sharding_without_gpu(config)}") from error

    def _loggers(self) -> list[Logger]:
        step = None
        if self.subcommand == "fit":  # started again before its first checkpoint, it repeats all steps
            step = self._checkpoint.get("global_step", 0 if is_restarted() and self._ckpt_path is None else None)
        return [
            TensorBoardLogger(self._run_folder, name="", version="", purge_step=step),
            ResumableCSVLogger(self._run_folder, resume_step=step),
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
