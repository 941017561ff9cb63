"""Sources of pretrained language models: a folder, a GGUF file, a repository of the hub, or an asset of a package registry."""

import difflib
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.base.checkpoint import CONFIG_FILE, fetch_repository
from zoo.base.named_weights import NamedSource

__all__ = ["ADAPTER_FILE", "PretrainedSource", "cached", "find_source", "need_extra"]

ADAPTER_FILE = "adapter_config.json"
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def need_extra(package: str, purpose: str) -> None:
    """Refuse in a sentence what needs a package that is not installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'lightning-zoo[llm]'."
        )


@dataclass(frozen=True)
class PretrainedSource:
    """Files of a pretrained model.

    Attributes:
        name: What the user calls it.
        folder: Where configuration and weights lie.
        gguf: Name of the GGUF file in it; None: the layout of Hugging Face.
        adapter: Folder of an adapter in peft's format that belongs to it.
    """

    name: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` of transformers takes."""
        return {"pretrained_model_name_or_path": str(self.folder), **({"gguf_file": self.gguf} if self.gguf else {})}

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies with the weights, as in every GGUF file."""
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt", "vocab.json")
        return self.gguf is not None or any((self.folder / name).is_file() for name in names)

    @cached_property
    def named(self) -> NamedSource:
        """Name and SHA-256: that of the one file of weights, or of the digests of several in the order of their names."""
        files = [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))
        digests = []
        for path in files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return NamedSource(self.name, joined)


def find_source(name: str) -> PretrainedSource:
    """Find a pretrained model; what is not on this machine is fetched once.

    Args:
        name: A folder in the layout of Hugging Face or with an adapter of peft, a GGUF file, ``organisation/name`` on the hub,
            or an asset that ``zoo assets`` lists.

    Raises:
        FileNotFoundError: If nothing is found under that name, or a folder has no configuration.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return PretrainedSource(name, path.parent, path.name)
    if path.is_dir():
        return _in_folder(name, path)
    if name.count("/") == 1 and name[0] not in "/.~" and path.suffix != ".gguf":
        return _in_folder(name, fetch_repository(name, FETCHED))
    return _in_folder(name, _asset(name))


def _in_folder(name: str, folder: Path) -> PretrainedSource:
    if (folder / CONFIG_FILE).is_file():
        return PretrainedSource(name, folder)
    if (folder / ADAPTER_FILE).is_file():
        base = json.loads((folder / ADAPTER_FILE).read_text())["base_model_name_or_path"]
        found = find_source(base)
        return PretrainedSource(base, found.folder, found.gguf, adapter=folder)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return PretrainedSource(name, folder, files[0].name)
    raise FileNotFoundError(
        f"{folder} has no {CONFIG_FILE}, no {ADAPTER_FILE} and not exactly one GGUF file: give the folder that"
        " save_pretrained wrote, or the path of a GGUF file."
    )


def cached(*names: str) -> Path:
    """Path of a folder in the cache of the zoo, beside its assets."""
    from datamodules.assets.fetch import cache_folder

    return cache_folder().joinpath(*names)


def _asset(name: str) -> Path:
    from datamodules.assets.fetch import MANIFEST, fetch

    if name in MANIFEST:
        return fetch(name)
    near = difflib.get_close_matches(name, MANIFEST, n=1)
    hint = f"; did you mean the asset {near[0]}?" if near else ", such as the asset smollm2-135m."
    raise FileNotFoundError(
        f"There is no language model {name!r}: give a folder, a GGUF file, organisation/name of the hub or an asset's name{hint}"
    )
