"""The verb ``zoo convert``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule

from zoo.base.checkpoint import CONFIG_FILE, is_pretrained_folder, read_plain
from zoo.base.hyperparameters import find_class, read_config
from zoo.cli.configs import find_config
from zoo.module import ZooModule
from zoo.official import infer_official

__all__ = ["convert"]

WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


def convert(argv: Sequence[str]) -> None:
    """``zoo convert SOURCE TARGET``: checkpoints and official weights as a safetensors folder, and back.

    ``zoo convert last.ckpt FOLDER`` writes a folder to share, ``zoo convert mnist_ema.pt FOLDER --config NAME`` does so with
    officially released weights, which need no ``--config`` where they say enough by themselves, and
    ``zoo convert FOLDER weights.pt --official`` writes what the published code loads. Weights of Ling are whole folders.

    Raises:
        FileNotFoundError: there is no such source or configuration.
        ValueError: the source is not what it should be, or options or target do not go together.
    """
    parser = argparse.ArgumentParser(
        prog="zoo convert",
        description="Write a checkpoint, or officially released weights, as a safetensors folder to share; or the other way.",
    )
    parser.add_argument(
        "source", type=Path, help="a .ckpt file, a safetensors folder, a name that zoo list shows, or official weights"
    )
    parser.add_argument("target", type=Path, help="the folder to write, or with --official the file (Ling: or the folder)")
    parser.add_argument("--model", help="class of your own that a checkpoint or folder holds, such as my_file.Net")
    parser.add_argument("--config", help="for official weights: a configuration of ours, or the published code's YAML file")
    parser.add_argument(
        "--official", action="store_true", help="write for the published code: .pt or .safetensors, for Ling a folder"
    )
    parser.add_argument("--description", default="", help="one line on what the weights were trained on and what they reach")
    parser.add_argument("--half", action="store_true", help="store the weights in half precision, half as large")
    options = parser.parse_args(argv)
    _check_target(options.target, options.official)
    if options.official and (options.half or options.description):
        raise ValueError("--half and --description are for the folder to share: leave them out with --official.")
    if options.model is not None:
        cls = find_class(options.model, LightningModule, [options.model])
        if not issubclass(cls, ZooModule):
            raise ValueError(f"{options.model} is no ZooModule, which alone can be converted: derive it from zoo.ZooModule.")
    module = _read(options.source, options.config)
    if not options.official:
        print(f"wrote {type(module).__name__} to {module.save_pretrained(options.target, options.description, options.half)}")
        return
    print(f"wrote {module.write_official(options.target)} tensors of {type(module).__name__} to {options.target}")


def _check_target(target: Path, official: bool) -> None:
    """Refuse, before anything is read, a target that cannot be written or is meant otherwise."""
    for path in target.parents if official else (target, *target.parents):
        if path.is_file():
            raise ValueError(f"{path} is a file, where a folder is to be written: give another name.")
    if not official and target.suffix in WEIGHTS_SUFFIXES:
        raise ValueError(f"{target} is the name of a file, but a folder is written: name a folder, or add --official.")


def _read(source: Path, config: str | None) -> ZooModule:
    if config is not None:
        return _read_official(source, config)
    if source.exists() and (model := infer_official(source)) is not None:
        return ZooModule.from_official(source, {"model": model})
    if source.is_file() or (source.suffix in WEIGHTS_SUFFIXES and not source.is_dir()):
        return ZooModule.load_from_checkpoint(source)
    if source.is_dir() and not is_pretrained_folder(source):
        raise ValueError(
            f"{source} is a folder without {CONFIG_FILE}, so not one of save_pretrained: give a .ckpt file, or for officially"
            " released weights the file and --config NAME."
        )
    return ZooModule.from_pretrained(source)


def _read_official(source: Path, config: str) -> ZooModule:
    if is_pretrained_folder(source) or (source.is_file() and _holds_hyperparameters(source)):
        raise ValueError(f"{source} holds its own hyperparameters: leave out --config.")
    parsed = read_config(find_config(config))
    module = ZooModule.from_official(source, parsed)
    if leftovers := module.official_leftovers(parsed):
        print("\n".join([f"not taken over from {config}:", *(f"  {line}" for line in leftovers)]))
    return module


def _holds_hyperparameters(source: Path) -> bool:
    try:
        content = read_plain(source)
    except ValueError:  # the method's own reader may admit more, or says what is wrong
        return False
    stored = content.get(ZooModule.CHECKPOINT_HYPER_PARAMS_KEY) if isinstance(content, dict) else None
    return isinstance(stored, dict) and "_class_path" in stored
