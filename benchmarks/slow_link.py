"""Groups of processes on one machine with slow links between them: a network namespace for each group, behind a token bucket.

Processes of a group share a namespace, and the kernel carries what they send one another over its loopback; what leaves the group
goes through one virtual network card whose rate ``tc`` limits, and a bridge. So the rate is shared by the group, as one network
card of a node is. It needs root, and ``ip`` and ``tc`` of Linux. `sent_bytes` tells a rank what its group's card and loopback
have sent.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.record import ROOT

__all__ = ["SlowLinks", "sent_bytes", "unavailable"]

_NETWORK = "10.77.0"
_TCP = {
    # A steady sender with a small buffer: times vary less than with the kernel's defaults.
    "net.ipv4.tcp_congestion_control": "reno",
    "net.ipv4.tcp_wmem": "4096 65536 262144",
}


def unavailable() -> str | None:
    """Why slow links cannot be made here, in words; None if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} of the package iproute2 not found"
    try:
        with SlowLinks(2, 100):
            return None
    except (RuntimeError, OSError) as error:
        return str(error)


def sent_bytes() -> dict[str, int]:
    """Bytes that the network card and the loopback of this process's namespace have sent: ``inter`` and ``intra``."""
    found = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        found[name.strip()] = int(numbers.split()[8])
    return {"inter": found.get("eth0", 0), "intra": found.get("lo", 0)}


class SlowLinks:
    """A namespace for each group, while the context lasts.

    Args:
        num_groups: Groups, at most 200.
        megabits: Rate of each group's card, Mbit/s.

    Raises:
        RuntimeError: The kernel refuses, with what it said.
    """

    def __init__(self, num_groups: int, megabits: float) -> None:
        if not 1 <= num_groups <= 200 or megabits <= 0:
            raise ValueError(f"SlowLinks: num_groups={num_groups} must lie between 1 and 200, megabits={megabits} be positive.")
        self.num_groups = num_groups
        self.megabits = megabits
        # Removing a namespace takes the kernel a while, so that names are used once.
        self._name = f"z{os.getpid() % 10_000}{time.monotonic_ns() // 1_000_000 % 1_000:03d}"

    def __enter__(self) -> SlowLinks:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def _make(self) -> None:
        bridge = f"{self._name}b"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for group in range(self.num_groups):
            space, outer = self._space(group), f"{self._name}v{group}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", outer, "master", bridge, "up")
            _run("ip", "-n", space, "addr", "add", f"{_NETWORK}.{group + 1}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            bucket = ("tbf", "rate", f"{self.megabits:g}mbit", "burst", "256kb", "latency", "300ms")
            _run("ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", "eth0", "root", *bucket)
            for name, value in _TCP.items():
                _run("ip", "netns", "exec", space, "sysctl", "-qw", f"{name}={value}")

    def _remove(self) -> None:
        for group in range(self.num_groups):
            subprocess.run(["ip", "netns", "del", self._space(group)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._name}b"], capture_output=True)

    def _space(self, group: int) -> str:
        return f"{self._name}g{group}"

    def run(self, words: Sequence[str], group_size: int, timeout: float) -> str:
        """Run a module as all ranks, each in the namespace of its group; what rank 0 wrote to its standard output.

        The environment is that of torchrun with a node for each group, for ``init_process_group`` and Lightning alike.

        Args:
            words: The module and its arguments, as after ``python -m``.
            group_size: Processes of each group.
            timeout: Seconds until all are killed.

        Raises:
            RuntimeError: A rank failed, or they did not end in time; with the end of what it wrote.
        """
        world_size = self.num_groups * group_size
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
            probe.close()
            processes = []
            for rank in range(world_size):
                group, place = divmod(rank, group_size)
                environment = {
                    **os.environ, "RANK": str(rank), "LOCAL_RANK": str(place), "GROUP_RANK": str(group),
                    "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(group_size), "MASTER_ADDR": f"{_NETWORK}.1",
                    "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": self._name, "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                }  # fmt: skip
                command = ["ip", "netns", "exec", self._space(group), sys.executable, "-m", *words]
                with Path(folder, f"out{rank}").open("w") as out, Path(folder, f"err{rank}").open("w") as err:
                    processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err))
            deadline = time.monotonic() + timeout
            try:
                for rank, process in enumerate(processes):
                    if _wait(process, processes, deadline):
                        failed = next((r for r, p in enumerate(processes) if p.poll()), rank)
                        written = Path(folder, f"err{failed}").read_text()[-3000:]
                        raise RuntimeError(f"rank {failed} of {world_size} failed or did not end in {timeout:g} s:\n{written}")
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            return Path(folder, "out0").read_text()


def _wait(process: subprocess.Popen[bytes], others: Sequence[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Whether a process, or another one meanwhile, failed or took too long."""
    while True:
        try:
            return process.wait(timeout=0.2) != 0
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline or any(other.poll() for other in others):
                return True


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
