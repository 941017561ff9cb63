"""A command in its order of precedence: defaults < configuration files < checkpoint < typed options."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from zoo.base.checkpoint import is_pretrained_folder, read_checkpoint, read_pretrained
from zoo.base.hyperparameters import check_config, class_path, find_class
from zoo.base.presets import spelled_out
from zoo.base.shard_reader import check_folder
from zoo.base.torchrun import is_restarted
from zoo.cli.argv import import_paths, run_name, split_configs, take_ckpt_path, typed_value
from zoo.cli.configs import find_config
from zoo.cli.messages import say, warn_of_replaced_callbacks
from zoo.cli.precedence import above_configs, as_config, find_named, is_same_class, merged, replaced
from zoo.cli.runs import find_checkpoint, last_checkpoint, run_folder
from zoo.cli.sections import read_sections, texts
from zoo.hub import resolve

__all__ = ["Command"]


@dataclass
class Command:
    """A stage with its options.

    Attributes:
        argv: Words for the parser, of which later ones win.
        run_folder: Folder of the run.
        ckpt_path: Checkpoint to continue or to look at.
        pretrained: Folder of weights to start from or to look at.
        checkpoint: Contents of the file ``ckpt_path``.
    """

    argv: list[str]
    run_folder: Path = field(default_factory=lambda: run_folder("run"))
    ckpt_path: Path | None = None
    pretrained: Path | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, stage: str, argv: list[str]) -> "Command":
        """Put options in order; read the configuration files and the checkpoint that they name.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If files and options do not go together.
        """
        configs, typed = split_configs(argv)
        paths = [find_config(name) for name in configs]
        parsed = [read_sections(path) for path in paths]
        warn_of_replaced_callbacks(paths, parsed)
        ckpt, typed = take_ckpt_path(typed)
        if ckpt is None:
            ckpt = next((config["ckpt_path"] for config in reversed(parsed) if config.get("ckpt_path")), None)
        if ckpt is None and stage == "fit" and is_restarted():
            ckpt = "last"  # continue what the processes had done
        root = typed_value(typed, "--trainer.default_root_dir")
        root = root or next((r for c in reversed(parsed) if (r := (c.get("trainer") or {}).get("default_root_dir"))), None)
        command = cls([], Path(root) if root else run_folder(run_name(configs, typed, parsed, ckpt)))
        chosen = {*texts(parsed), *import_paths(typed)}
        stored = command._read_ckpt(stage, ckpt, chosen) if ckpt else {}
        for section, base in (("model", LightningModule), ("data", LightningDataModule)):
            if section in stored:
                check_config(base, stored[section], chosen)
        if "model" in stored:
            assert ckpt is not None
            stored["model"] = command._below_typed(stage, ckpt, stored["model"], parsed, typed, chosen)
        data = stored.pop("data", None)
        if data and not typed_value(typed, "--data") and (above := above_configs(data, parsed)):
            stored["data"] = above
        files = [str(path) for path in paths] + ([json.dumps(stored)] if stored else [])
        last = ["--ckpt_path", "null" if command.ckpt_path is None else str(command.ckpt_path)]
        command.argv = [stage, *(word for file in files for word in ("--config", file)), *last, *typed]
        return command

    def _below_typed(
        self, stage: str, ckpt: str, model: dict[str, Any], parsed: list[dict[str, Any]], typed: list[str], chosen: set[str]
    ) -> dict[str, Any]:
        """Let the model of a checkpoint win over the configurations, and say which of their values it replaces.

        Raises:
            ValueError: If the configurations name a class that the checkpoint cannot hold.
        """
        sections: Iterator[Mapping[str, Any]] = (
            section if isinstance(section, dict) else {"class_path": section} for c in parsed if (section := c.get("model"))
        )
        configured: Mapping[str, Any] = reduce(merged, sections, {})
        name = configured.get("class_path")
        if name and not typed_value(typed, "--model") and not is_same_class(name, model["class_path"]):
            model = {**model, "class_path": self._common_class(stage, ckpt, model, name, chosen)}
        options = [word.partition("=")[0].removeprefix("--") for word in typed if word.startswith("--model.")]
        cls = find_class(model["class_path"], LightningModule, chosen)
        differences = replaced(spelled_out(cls, configured.get("init_args")), spelled_out(cls, model["init_args"]), "model")
        values = [
            (option, old, new)
            for option, old, new in differences
            if not any(f"{option}.".startswith(f"{other}.") for other in options)
        ]
        if values:
            told = ", ".join(f"{option} is {new} instead of {old}" for option, old, new in values)
            say(f"{ckpt} wins over the configuration: {told} (type --{values[0][0]} {values[0][1]} and so on to keep yours).")
        return model

    def _common_class(self, stage: str, ckpt: str, model: dict[str, Any], name: str, chosen: set[str]) -> str:
        """Import path of the class to build, where configurations name another one than the checkpoint."""
        named, kept = find_named(name, LightningModule), find_class(model["class_path"], LightningModule, chosen)
        refusal = f"The configuration is of {name}, --ckpt_path {ckpt} of {kept.__name__}"
        if named is None or not (issubclass(named, kept) or issubclass(kept, named)):
            raise ValueError(f"{refusal}: give a configuration and a checkpoint of the same model.")
        if issubclass(kept, named) and not (stage == "fit" and self.pretrained):  # the run is continued or looked at
            return class_path(kept)
        try:
            check_config(LightningModule, {**model, "class_path": class_path(named)}, chosen)
        except ValueError as error:
            raise ValueError(f"{refusal}, whose hyperparameters do not fit: {error}") from error
        return class_path(named)

    def _read_ckpt(self, stage: str, ckpt: str, chosen: set[str]) -> dict[str, Any]:
        """Find the checkpoint that ``--ckpt_path`` names; return the model and data that it stores, as configuration."""
        if ckpt != "last" and (is_pretrained_folder(ckpt) or not (Path(ckpt).exists() or ckpt.endswith(".ckpt"))):
            if not (stage == "fit" and is_restarted() and last_checkpoint(self.run_folder)):
                self.pretrained = resolve(ckpt)
                return {"model": as_config(read_pretrained(self.pretrained)[0], LightningModule, chosen)}
            ckpt = "last"
        self.ckpt_path = find_checkpoint(ckpt, self.run_folder, stage)
        if self.ckpt_path is None:
            say(f"{self.run_folder} holds no checkpoint yet: a new run starts.")
            return {}
        if self.ckpt_path.is_dir():  # of a sharding strategy, which stores no hyperparameters: the configuration has them
            check_folder(self.ckpt_path)
            return {}
        self.checkpoint = read_checkpoint(self.ckpt_path)
        stored = {}
        for section, base in (("model", LightningModule), ("data", LightningDataModule)):
            hyperparameters = self.checkpoint.get(base.CHECKPOINT_HYPER_PARAMS_KEY, {})
            if "_class_path" in hyperparameters:  # classes of Lightning alone may store none
                stored[section] = as_config(hyperparameters, base, chosen)
        return stored
