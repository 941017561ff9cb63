"""A warm process behaves as one of the real interpreter, but for the wait."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

REPORT = """
import json, multiprocessing, os, signal, sys
print(json.dumps([sys.argv[1:], os.getcwd(), __name__, os.environ.get("GIVEN"), sys.path[0] in ("", os.path.dirname(__file__)),
                  os.path.abspath(sys.path[1]), multiprocessing.parent_process() is None,
                  multiprocessing.get_start_method(), sys.stdin.read(),
                  [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]]))
print("heard", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture(autouse=True)
def interrupts() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and a real process would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("form", ["-c", "-m", "script"])
def test_words_folder_environment_streams_and_status_are_the_real_ones(tmp_path: Path, form: str) -> None:
    (tmp_path / "reporter.py").write_text(REPORT)
    code = REPORT.replace("__file__", "'/nowhere/x'")
    words = {"-c": ["-c", code], "-m": ["-m", "reporter"], "script": ["reporter.py"]}[form]
    command = [sys.executable, *words, "a", "--b=c"]
    environment = {**os.environ, "GIVEN": "this", "PYTHONPATH": str(tmp_path / "more")}
    environment.pop("PYTHONSTARTUP", None)
    real = subprocess.run(command, cwd=tmp_path, env=environment, input="typed", capture_output=True, text=True)
    warm = warm_python.run(command, cwd=tmp_path, env=environment, input="typed")
    assert (warm.returncode, warm.stdout, warm.stderr) == (real.returncode, real.stdout, real.stderr) and real.returncode == 3


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("import sys; sys.exit('reason')", 1, "reason"),
        ("import atexit; atexit.register(print, 'last', flush=True); print('first')", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); input()", -signal.SIGINT, "KeyboardInterrupt"),
    ],
)  # fmt: skip
def test_ends_are_the_real_ones(code: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", code]
    real, warm = subprocess.run(command, capture_output=True, text=True), warm_python.run(command)
    assert real.returncode == warm.returncode == status
    assert real.stdout == warm.stdout and said in real.stderr and said in warm.stderr


def test_a_process_that_runs_can_be_killed_and_its_pipes_read() -> None:
    code = "import sys; print(sys.stdin.readline().upper(), flush=True); sys.stdin.read()"
    with warm_python.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write("word\n")
        process.stdin.flush()
        assert process.stdout.readline() == "WORD\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.kill()
        assert process.wait(20) == -signal.SIGKILL


def test_another_program_is_refused() -> None:
    with pytest.raises(ValueError, match="can be started warm, not ls"):
        warm_python.run(["ls"])
