"""Folders of weights to share, in the layout of Hugging Face; read here without torch."""

from pathlib import Path

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "fetch_repository", "is_pretrained_folder"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def fetch_repository(name: str, patterns: list[str]) -> Path:
    """Folder of a repository of the Hugging Face hub, fetched once, then cached.

    Args:
        name: ``"organisation/name"``.
        patterns: of the files that are wanted.

    Raises:
        FileNotFoundError: there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no local folder and could not be fetched from the hub ({type(error).__name__}):"
            " check the name and the connection, or give a folder."
        ) from error


def is_pretrained_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder written by ``save_pretrained``."""
    return (Path(path) / CONFIG_FILE).is_file()
