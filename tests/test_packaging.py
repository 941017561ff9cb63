"""The wheel holds everything: outside the checkout the command line lists, trains and samples."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from datamodules.conversations.rationale_files import read_rationales, source_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder with the unpacked wheel, built from the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, so that no build folder appears in the tree.
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "tree")], check=True)
    changed = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=ROOT, capture_output=True, check=True).stdout
    if changed:
        subprocess.run(["git", "apply", "--whitespace=nowarn"], cwd=folder / "tree", input=changed, check=True)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "tree", check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_only_the_packages_and_their_data_are_installed(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"zoo", "datamodules", "strategies"}
    configs = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.relative_to(installed / "zoo/configs") for path in (installed / "zoo/configs").rglob("*.yaml")} == configs
    for path in (ROOT / "zoo").glob("*/weights/*/*"):
        assert (installed / path.relative_to(ROOT)).stat().st_size == path.stat().st_size


def test_the_shipped_rationales_are_read_from_the_wheel_with_their_notice(installed):
    shipped = source_path("gsm-symbolic")
    file = installed / shipped.relative_to(ROOT)
    assert read_rationales(file) == read_rationales(shipped)
    assert file.with_name("rationale_files.py").is_file() and file.with_name("gsm_symbolic.NOTICE").is_file()


@pytest.mark.slow
def test_it_lists_trains_and_samples_outside_the_checkout(installed, tmp_path):
    assert "bfn-digits" in run(installed, tmp_path, "-m", "zoo", "list")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    fit = ["fit", "-c", "bfn/digits", "--trainer.max_steps", "3", *quiet]
    predict = ["predict", "-c", "bfn/digits", "--ckpt_path", "bfn-digits", "--data.predict_samples", "4", *quiet]
    run(installed, tmp_path, "-c", f"import sys; from zoo.__main__ import main; sys.exit(main({fit}) or main({predict}))")
    assert (tmp_path / "runs/bfn/digits/checkpoints/last.ckpt").exists()
    assert list((tmp_path / "runs/bfn/digits/predictions").glob("*.png"))
