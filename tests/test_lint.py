"""Style is part of the test run, types of the whole one (`make lint` checks both)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("words", ["ruff check", "ruff format --check", pytest.param("mypy", marks=pytest.mark.slow)])
def test_clean(words: str) -> None:
    tool, *options = words.split()
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"not measured: {tool} is not installed; pip install lightning-zoo[dev]")
    done = subprocess.run([sys.executable, "-m", tool, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"python -m {words}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
