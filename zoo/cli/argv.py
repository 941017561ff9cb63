"""The words of a command: stage, configurations, checkpoint, typed options."""

import re
from pathlib import Path
from typing import Any

__all__ = ["STAGES", "import_paths", "run_name", "split_configs", "stage_first", "take_ckpt_path", "typed_value"]


STAGES = ("fit", "validate", "test", "predict")


def stage_first(argv: list[str]) -> list[str]:
    """The stage before its options, wherever it is typed; help on a component, which is the same for all, is that of fit."""
    for at, word in enumerate(argv):
        if word in STAGES and (at == 0 or argv[at - 1] not in ("-c", "--config")):
            return [word, *argv[:at], *argv[at + 1 :]]
    return ["fit", *argv] if any(re.match(r"--[\w.]+\.help(=|$)", word) for word in argv) else argv


def split_configs(argv: list[str]) -> tuple[list[str], list[str]]:
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


def typed_value(argv: list[str], option: str) -> str | None:
    """The value that is typed for an option, None if it is not typed."""
    for at, word in enumerate(argv):
        if word == option and at + 1 < len(argv):
            return argv[at + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def import_paths(argv: list[str]) -> set[str]:
    """Dotted names that are typed, also inside of values in JSON."""
    return {path for word in argv for path in re.findall(r"(?<![\w./])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w/])", word)}


def take_ckpt_path(argv: list[str]) -> tuple[str | None, list[str]]:
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


def run_name(configs: list[str], typed: list[str], parsed: list[dict[str, Any]], ckpt: str | None) -> str:
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
    if model := typed_value(typed, "--model"):
        return model.rpartition(".")[2].lower()
    return names[0] if names else "run"
