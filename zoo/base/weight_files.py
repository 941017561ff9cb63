"""Files of weights in a folder of the layout of Hugging Face, whole or in shards."""

import json
from pathlib import Path

__all__ = ["INDEX_FILE", "weight_files"]

INDEX_FILE = "model.safetensors.index.json"
#: Where weights may lie in a folder, best first; an index names the files.
_NAMES = (INDEX_FILE, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def weight_files(path: str | Path) -> list[Path]:
    """The files of weights of a folder, each once.

    Args:
        path: a folder with ``model.safetensors`` or ``pytorch_model.bin``, whole or sharded by an index; or one such file.

    Raises:
        FileNotFoundError: there are no weights, or files that the index names are missing.
        ValueError: the index is damaged.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = next((path / name for name in _NAMES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"There are no weights in {path}: none of {', '.join(_NAMES)} is there.")
    if found.suffix != ".json":
        return [found]
    try:
        weight_map = dict(json.loads(found.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{found} is damaged ({type(error).__name__}): was the download complete?") from None
    count = {str(name): 0 for name in weight_map.values()}
    for name in weight_map.values():
        count[str(name)] += 1
    if outside := [name for name in count if Path(name).name != name]:
        raise ValueError(f"{found} names files outside of its folder ({', '.join(outside)}), which are not read.")
    if missing := [f"{name} ({number} tensors)" for name, number in count.items() if not (path / name).is_file()]:
        raise FileNotFoundError(f"Files that {found} names are missing: {', '.join(missing)}. Was the download complete?")
    return [path / name for name in count]
