"""The command line: LightningCLI with class names, run folders, exact precedence of options and errors for people."""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from importlib.resources import files
from operator import or_
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_model
from torch.distributed import TCPStore
from torch.distributed.constants import default_pg_timeout

import datamodules
import strategies
import zoo.bfn
import zoo.callbacks
import zoo.ctr
import zoo.emigm
import zoo.ling
import zoo.metrics
from strategies.antdt.connection import restarts_left
from zoo.callbacks import RunCheckpoint
from zoo.checkpoint import WEIGHTS_FILE, check_weights, is_pretrained_folder, read_checkpoint, read_pretrained
from zoo.csv_logger import ResumableCSVLogger
from zoo.hub import list_models, resolve
from zoo.hyperparameters import check_config, class_path, find_class, read_config
from zoo.ling.config import Preset
from zoo.metrics import FeatureClassifier
from zoo.module import ZooModule
from zoo.option_errors import explain, nearest
from zoo.precedence import find_named, is_same_class, merged, replaced
from zoo.runs import METRICS, archive_run, find_checkpoint, last_checkpoint, put_back, run_folder
from zoo.sampling import SupportsSampling

__all__ = ["ZooArgumentParser", "ZooCLI", "find_config", "packaged_configs"]

ARCHIVED = "zoo/earlier_run"
"""Where torchrun's store says to which folder the first start of a run has moved the earlier one."""
STAGES = ("fit", "validate", "test", "predict")
STRATEGIES = {name: getattr(strategies, name) for name in strategies.__all__}  # imported here, to be found by their names


@rank_zero_only
def _say(message: str) -> None:
    print(message, file=sys.stderr)


class ZooArgumentParser(LightningArgumentParser):
    """Parser whose errors are one sentence with the nearest name, instead of a list of types.

    Args:
        args: of the parser of Lightning.
        example: a configuration that holds what is required, for the error that names what is missing.
        kwargs: of the parser of Lightning.
    """

    def __init__(self, *args: Any, example: str = "-c bfn/digits (`zoo list` shows all)", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.allow_abbrev = False  # a shortened option would slip past the order of precedence

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what is near, and exit with status 2.

        Raises:
            SystemExit: always, unless the parser raises its errors.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if os.environ.get("ZOO_TRACEBACK"):
            sys.stderr.write(message + "\n")
        sys.stderr.write(f"error: {explain(message, self._all_options(), self.example)}\n")
        raise SystemExit(2)

    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, an integer tried before a fraction: one batch is not all of them.

        typing holds ``Union[int, float]`` and ``Union[float, int]`` for equal and hands out whichever was made first, so that
        the order in which modules are imported would decide whether ``--trainer.limit_val_batches 1`` is 1 or 1.0.
        """
        added = super().add_lightning_class_args(*args, **kwargs)
        for action in self._actions:
            if (typehint := getattr(action, "_typehint", None)) is not None:
                action._typehint = _integers_first(typehint)  # type: ignore[attr-defined]
        return added

    def parse_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None, *rest: Any, **kwargs: Any
    ) -> Namespace:
        """Parse, where one entry of an architecture that is given by its name changes this entry, and no other."""
        for action in self._actions if args is not None else []:
            if zoo.ling.LingConfig not in get_args(getattr(action, "_typehint", None)):
                continue
            before = (namespace or {}).get(action.dest, action.default)
            if isinstance(before, str) and any(word.startswith(f"--{action.dest}.") for word in args):
                namespace = namespace or Namespace()
                config = zoo.ling.preset(before)
                namespace[action.dest] = Namespace(class_path=class_path(type(config)), init_args=Namespace(asdict(config)))
        return super().parse_args(args, namespace, *rest, **kwargs)

    def _all_options(self) -> list[str]:
        names = []
        for action in self._actions:
            names += [name.lstrip("-") for name in action.option_strings]
            if isinstance(action.choices, Mapping):  # subcommands
                for parser in action.choices.values():
                    names += parser._all_options() if isinstance(parser, ZooArgumentParser) else []
        return names


def _integers_first(typehint: Any) -> Any:
    """The union with int before float, if it has both the other way round."""
    members = list(get_args(typehint))
    if not {int, float} <= set(members) or members.index(int) < members.index(float):
        return typehint
    members.remove(float)
    members.insert(members.index(int) + 1, float)
    return reduce(or_, members)  # not by Union[...], which would look the other order up again


def packaged_configs() -> dict[str, Path]:
    """Configurations that come with the package: ``{"bfn/digits": path}``."""
    root = Path(str(files("zoo"))) / "configs"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("**/*.yaml"))}


def find_config(name: str) -> Path:
    """A configuration by file name, or by its name in the package: ``bfn/digits`` is ``configs/bfn/digits.yaml``.

    Raises:
        FileNotFoundError: neither exists; the nearest names are given.
    """
    if Path(name).is_file():
        return Path(name)
    configs = packaged_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    if short in configs:
        return configs[short]
    raise FileNotFoundError(
        f"there is no configuration {name}{nearest(short, list(configs))} (`zoo list` shows those that come with the package)"
    )


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
        argv = _stage_first(argv)
        if argv and argv[0] in STAGES:
            argv = self._in_order_of_precedence(argv[0], argv[1:])
        self.config = parser.parse_args(argv)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint win over typed options here; `parse_arguments` has put it in its place already."""

    def _in_order_of_precedence(self, stage: str, argv: list[str]) -> list[str]:
        configs, typed = _split_configs(argv)
        paths = [find_config(name) for name in configs]
        parsed = [_read_config(path) for path in paths]
        _warn_of_replaced_callbacks(paths, parsed)
        ckpt, typed = _take_ckpt_path(typed)
        if ckpt is None:
            ckpt = next((config["ckpt_path"] for config in reversed(parsed) if config.get("ckpt_path")), None)
        if ckpt is None and stage == "fit" and _is_restarted():
            ckpt = "last"  # what the processes had done goes on
        self._run_folder = run_folder(_run_name(configs, typed, parsed, ckpt))
        root = _typed_value(typed, "--trainer.default_root_dir")
        root = root or next((r for c in reversed(parsed) if (r := (c.get("trainer") or {}).get("default_root_dir"))), None)
        if root:
            self._run_folder = Path(root)
        stored = self._read_ckpt(stage, ckpt) if ckpt else {}
        chosen = {*_texts(parsed), *(text for word in typed for text in word.split("="))}
        for section, base in (("model", LightningModule), ("data", LightningDataModule)):
            if section in stored:
                check_config(base, stored[section], chosen)
        if "model" in stored:
            assert ckpt is not None
            stored["model"] = self._below_typed(stage, ckpt, stored["model"], parsed, typed, chosen)
        data = stored.pop("data", None)
        if data and not _typed_value(typed, "--data") and (above := _above_configs(data, parsed)):
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
        if name and not _typed_value(typed, "--model") and not is_same_class(name, model["class_path"]):
            model = {**model, "class_path": self._common_class(stage, ckpt, model, name, chosen)}
        options = [word.partition("=")[0].removeprefix("--") for word in typed if word.startswith("--model.")]
        values = [
            (option, old, new)
            for option, old, new in replaced(
                _architecture(configured.get("init_args")), _architecture(model["init_args"]), "model"
            )
            if not any(f"{option}.".startswith(f"{other}.") for other in options)
        ]
        if values:
            told = ", ".join(f"{option} is {new} instead of {old}" for option, old, new in values)
            _say(f"{ckpt} wins over the configuration: {told} (type --{values[0][0]} {values[0][1]} and so on to keep yours).")
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

    def _read_ckpt(self, stage: str, ckpt: str) -> dict[str, Any]:
        """Find what ``--ckpt_path`` names and return the model and data that it stores, as configuration."""
        if ckpt != "last" and (is_pretrained_folder(ckpt) or not (Path(ckpt).exists() or ckpt.endswith(".ckpt"))):
            if not (stage == "fit" and _is_restarted() and last_checkpoint(self._run_folder)):
                self._pretrained = resolve(ckpt)
                return {"model": _as_config(read_pretrained(self._pretrained)[0])}
            ckpt = "last"
        self._ckpt_path = find_checkpoint(ckpt, self._run_folder, stage)
        if self._ckpt_path is None:
            _say(f"{self._run_folder} holds no checkpoint yet: starting anew.")
            return {}
        if self._ckpt_path.is_dir():  # of a sharding strategy, which stores no hyperparameters: the configuration has them
            return {}
        self._checkpoint = read_checkpoint(self._ckpt_path)
        stored = {}
        if model := self._checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY):
            stored["model"] = _as_config(model)
        if (data := self._checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)) and "_class_path" in data:
            stored["data"] = _as_config(data)
        return stored

    # Building

    def before_instantiate_classes(self) -> None:
        """Set the run's folder (LightningCLI hook)."""
        assert self.subcommand is not None
        config: Namespace = self.config[self.subcommand]
        config.trainer.default_root_dir = str(self._run_folder)
        config["weights_only"] = True
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes: their number is not ours to choose
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            config.trainer.devices = local
            config.trainer.num_nodes = int(os.environ["WORLD_SIZE"]) // local
        if config.get("checkpoint") and config.checkpoint.folder is None:
            config.checkpoint.folder = str(self._run_folder / "checkpoints")
        given = self._ckpt_path or self._pretrained or (config.model.get("init_args") or {}).get("checkpoint")
        if self.subcommand != "fit" and not given:
            _say(
                f"No --ckpt_path: {self.subcommand} uses untrained, random weights"
                " (--ckpt_path last takes the newest of this run)."
            )
        self.save_config_kwargs["config_filename"] = "config.yaml" if self.subcommand == "fit" else f"{self.subcommand}.yaml"

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; load shipped or shared weights (LightningCLI hook)."""
        # A module that checks batches before they move is no mistake, whatever data it is given.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
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
            _wait_for_rank_zero()

    @rank_zero_only
    def _archive(self) -> None:
        store = _agents_store()
        if _is_restarted():  # a start before this one may have done it
            if store is not None and store.check([ARCHIVED]):
                self._archived = Path(store.get(ARCHIVED).decode())
            return
        self._archived = archive_run(self._run_folder)
        if self._archived is not None:
            if store is not None:
                store.set(ARCHIVED, str(self._archived))
            _say(
                f"A new run starts in {self._run_folder}; the earlier one moved to {self._archived} (--ckpt_path last continues)."
            )

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self._archived is not None and self._has_trained_nothing():
                put_back(self._archived)
                _say(f"Nothing was trained: the earlier run is back in {self._run_folder}.")
            raise

    def _has_trained_nothing(self) -> bool:
        if restarts_left():  # the next start would continue what is put back
            return False
        earlier_start = _is_restarted() and (self._run_folder / METRICS).exists()  # which has trained
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
            _say("Nothing will be written: add --trainer.callbacks+ ImageGridWriter (or TextWriter, JSONLWriter).")

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
            step = self._checkpoint.get("global_step", 0 if _is_restarted() and self._ckpt_path is None else None)
        return [
            TensorBoardLogger(self._run_folder, name="", version="", purge_step=step),
            ResumableCSVLogger(self._run_folder, resume_step=step),
        ]


def _sharding_without_gpu(config: Mapping[str, Any]) -> str:
    """What to take on a CPU instead of a strategy that shards on GPUs only; nothing where that is not the matter."""
    strategy = config.get("strategy")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    gpu_only = name.lower().startswith(("fsdp", "deepspeed"))
    if not gpu_only or (torch.accelerator.is_available() and config.get("accelerator") != "cpu"):
        return ""
    return (
        " Of those that divide weights among processes, these run on CPUs: -c strategies/paro_iig, -c strategies/edit_sharded,"
        " and for experts -c strategies/expert_parallel."
    )


def _is_restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _wait_for_rank_zero() -> None:
    """Let the other processes of torchrun wait until rank 0 has come here; a process group does not exist yet."""
    store = _agents_store()
    if store is None:
        return
    if os.environ["RANK"] == "0":
        store.set("zoo/folder_is_ready", "")
    store.wait(["zoo/folder_is_ready"])


def _agents_store() -> TCPStore | None:
    """The store of torchrun, which stays when it starts the processes again; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=default_pg_timeout)


def _as_config(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Stored hyperparameters in the notation of configuration files."""
    arguments = {
        name: value
        for name, value in hyperparameters.items()
        if name not in ("_class_path", "_instantiator", "zoo_version") and not name.startswith("_")
    }
    path = hyperparameters["_class_path"]
    cls = find_class(path, object)
    for old, new in getattr(cls, "renamed_arguments", {}).items():
        if old in arguments:
            arguments[new] = arguments.pop(old)
    return {"class_path": path, "init_args": arguments}


def _architecture(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a model, an architecture written out that is given by its name."""
    arguments = dict(arguments or {})
    if arguments.get("config") in get_args(Preset):
        arguments["config"] = asdict(zoo.ling.preset(arguments["config"]))
    return arguments


def _stage_first(argv: list[str]) -> list[str]:
    """The stage before its options, wherever it is typed; help on a component, which is the same for all, is that of fit."""
    for at, word in enumerate(argv):
        if word in STAGES and (at == 0 or argv[at - 1] not in ("-c", "--config")):
            return [word, *argv[:at], *argv[at + 1 :]]
    return ["fit", *argv] if any(re.match(r"--[\w.]+\.help(=|$)", word) for word in argv) else argv


def _split_configs(argv: list[str]) -> tuple[list[str], list[str]]:
    """Configuration files, and everything else that is typed, each in its order."""
    configs, typed = [], []
    words = iter(argv)
    for word in words:
        if word in ("-c", "--config"):
            configs.append(next(words, ""))
        elif word.startswith("--config="):
            configs.append(word.partition("=")[2])
        else:
            typed.append(word)
    return configs, typed


def _typed_value(argv: list[str], option: str) -> str | None:
    for at, word in enumerate(argv):
        if word == option and at + 1 < len(argv):
            return argv[at + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def _take_ckpt_path(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of ``--ckpt_path``, None if it is not typed, and all other words."""
    found, rest = [], []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--ckpt_path":
            found.append(next(words, "") if word == name else value)
        else:
            rest.append(word)
    if any(not value or value.startswith("--") for value in found):
        raise ValueError("--ckpt_path needs a value: last, a file, a folder, or a name that `zoo list` shows.")
    if len(found) > 1:
        raise ValueError(f"--ckpt_path is given {len(found)} times ({', '.join(found)}): leave one of them.")
    return (found[0] if found else None), rest


def _read_config(path: Path) -> dict[str, Any]:
    """The options of a configuration file, whose sections are sections."""
    config = read_config(path)
    model = config.get("model")
    if "bayesian_flow" in config or (isinstance(model, dict) and "bayesian_flow" in model):
        raise ValueError(
            f"{path} is a configuration of the published code: convert the weights with"
            f" `zoo convert FILE FOLDER --config {path}`, then give --ckpt_path FOLDER with a configuration of ours."
        )
    for section, example in (("model", "class_path: BFN"), ("data", "class_path: Digits"), ("trainer", "max_steps: 1000")):
        value = config.get(section)
        if not isinstance(value, dict | None if section == "trainer" else dict | str | None):
            raise ValueError(f"{path}: `{section}: {value}` must be a section with options of its own, such as `{example}`.")
    return config


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _above_configs(stored: dict[str, Any], parsed: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a checkpoint says of the data, as far as it stands above the configurations; None if they name another class.

    What they say of prediction (``predict_samples``, ``predict_images``) stays theirs, since no training depends on it.
    """
    sections = [data if isinstance(data, dict) else {"class_path": data} for config in parsed if (data := config.get("data"))]
    named = next((data["class_path"] for data in reversed(sections) if "class_path" in data), stored["class_path"])
    if not is_same_class(named, stored["class_path"]):
        return None
    theirs = {name for data in sections for name in data.get("init_args") or {} if name.startswith("predict_")}
    return {**stored, "init_args": {name: value for name, value in stored["init_args"].items() if name not in theirs}}


def _run_name(configs: list[str], typed: list[str], parsed: list[dict[str, Any]], ckpt: str | None) -> str:
    """Name of the run: that of the first configuration that is not a strategy's; else of the checkpoint's run or model."""
    names = [name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml") for name in configs]
    for name, config in zip(names, parsed, strict=True):
        if config.get("model"):
            return Path(name).name if Path(name).is_absolute() else name.replace("../", "")
    if ckpt and ckpt != "last":
        path = Path(ckpt)
        inside = path.parent.parent if path.parent.name == "checkpoints" else None
        if inside is not None and "runs" in inside.parts:
            return Path(*inside.parts[inside.parts.index("runs") + 1 :]).as_posix()
        return path.stem
    if model := _typed_value(typed, "--model"):
        return model.rpartition(".")[2].lower()
    return names[0] if names else "run"


def _warn_of_replaced_callbacks(paths: list[Path], parsed: list[dict[str, Any]]) -> None:
    """A later list replaces an earlier one, which is seldom meant."""
    first = None
    for path, config in zip(paths, parsed, strict=True):
        if (config.get("trainer") or {}).get("callbacks"):
            if first is not None:
                _say(f"{path}: `callbacks:` replaces the callbacks of {first}; write `callbacks+:` to add to them.")
            first = path


def list_everything(argv: Sequence[str] = ()) -> None:
    """Print modules, data, strategies, configurations and shipped models (``zoo list``).

    Args:
        argv: words after the verb, of which there are none but ``--help``.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    about = "Print the models, data, strategies, configurations and shipped weights."
    argparse.ArgumentParser(prog="zoo list", description=about).parse_args(argv)
    console = Console()

    def names(package: Any, base: type) -> list[str]:
        return [n for n in package.__all__ if isinstance(getattr(package, n), type) and issubclass(getattr(package, n), base)]

    table = Table("kind", "name", "what it is", title="zoo")

    def row(*cells: str) -> None:
        table.add_row(*map(escape, cells))  # `[deepspeed]` is no markup

    for package in (zoo.bfn, zoo.ctr, zoo.emigm, zoo.ling, zoo.metrics):
        for name in names(package, ZooModule):
            row("model", name, (getattr(package, name).__doc__ or "").strip().split("\n")[0])
    for name in names(datamodules, LightningDataModule):
        row("data", name, (getattr(datamodules, name).__doc__ or "").strip().split("\n")[0])
    for name, strategy in STRATEGIES.items():
        row("strategy", name, (strategy.__doc__ or "").strip().split("\n")[0])
    for name, path in packaged_configs().items():
        head = path.read_text().split("\n", 1)[0]
        row("config", name, head.removeprefix("#").strip() if head.startswith("#") else "")
    for model in list_models():
        kind = "extractor" if issubclass(find_class(model.class_path, ZooModule), FeatureClassifier) else "weights"
        row(kind, model.name, f"{model.description} ({model.num_bytes / 2**20:.1f} MiB)")
    console.print(table)
