"""Folders of runs: ``runs/<config>/``, one stable folder a configuration, with checkpoints, logs and pictures."""

import os
import shutil
from pathlib import Path

__all__ = ["METRICS", "archive_run", "find_checkpoint", "last_checkpoint", "put_back", "run_folder"]

RUNS = Path("runs")
CHECKPOINTS = "checkpoints"
EARLIER = "earlier"
METRICS = "metrics.csv"  # all that a run killed before its first checkpoint leaves


# What Lightning's strategies write into a folder: FSDP and ModelParallel, DeepSpeed, and torch's distributed checkpoints.
_SHARDED = ("meta.pt", "checkpoint", ".metadata")


def run_folder(name: str) -> Path:
    """The folder of a run: ``runs/<name>``, below the current folder."""
    return RUNS / name


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None if it has none."""
    found = list((folder / CHECKPOINTS).glob("*.ckpt"))
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), default=None)


def find_checkpoint(ckpt_path: str, folder: Path, stage: str) -> Path | None:
    """Resolve ``--ckpt_path``.

    Args:
        ckpt_path: ``last``, a file, or a folder that a sharding strategy wrote.
        folder: the run's folder.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        The checkpoint; None where ``fit`` starts a new run because there is no checkpoint yet.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint yet to validate, test or predict with.
        ValueError: a folder that is no sharded checkpoint.
    """
    if ckpt_path == "last":
        found = last_checkpoint(folder)
        if found is None and stage != "fit":
            raise FileNotFoundError(
                f"--ckpt_path last: {folder} holds no checkpoint yet, so there is nothing to {stage}: train first (zoo fit),"
                " or give the path of a checkpoint."
            )
        return found
    path = Path(ckpt_path)
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path {ckpt_path}: there is no such checkpoint file, pretrained folder or shipped model.")
    if path.is_dir() and not any((path / mark).exists() for mark in _SHARDED):
        newest = last_checkpoint(path)
        raise ValueError(
            f"--ckpt_path {ckpt_path} is a folder, but neither a pretrained one (config.json and model.safetensors) nor a sharded"
            f" checkpoint: give {newest or 'a .ckpt file'}, or write a pretrained folder with `zoo convert FILE FOLDER`."
        )
    return path


def archive_run(folder: Path) -> Path | None:
    """Move an earlier run out of the way of a new one, to ``<folder>/earlier/<n>``: nothing is overwritten.

    Returns:
        Where it lies now, or None if the folder held no run.
    """
    if last_checkpoint(folder) is None and not (folder / METRICS).exists():
        return None
    number = 1 + max((int(p.name) for p in (folder / EARLIER).glob("*") if p.name.isdigit()), default=-1)
    target = folder / EARLIER / str(number)
    target.mkdir(parents=True)
    for entry in _entries(folder):
        shutil.move(os.fspath(entry), os.fspath(target / entry.name))
    return target


def put_back(archived: Path) -> None:
    """Undo `archive_run`: what lies in the run's folder now is deleted, and the earlier run is there again.

    Args:
        archived: what `archive_run` returned.
    """
    folder = archived.parent.parent
    for entry in _entries(folder):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in archived.iterdir():
        shutil.move(os.fspath(entry), os.fspath(folder / entry.name))
    archived.rmdir()
    if not any(archived.parent.iterdir()):
        archived.parent.rmdir()


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder that belong to its own run."""

    def is_other_run(entry: Path) -> bool:
        # A folder of another run may lie inside (runs/bfn made with --model BFN, beside runs/bfn/digits of a config).
        traces = (trace for name in (CHECKPOINTS, METRICS) for trace in entry.glob(f"**/{name}"))
        return entry.is_dir() and entry.name != CHECKPOINTS and any(traces)

    return [entry for entry in folder.iterdir() if entry.name != EARLIER and not is_other_run(entry)]
