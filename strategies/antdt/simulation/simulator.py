"""A cluster of thousands of workers that exists only as numbers, driven by the real controller and ledger (section 2.9).

Only time is modelled. A step of worker i takes ``T_i = C_i a + s_i c n_i`` seconds, with its slowness s_i as in
`strategies.antdt.simulation.slowness`. In lockstep (``bsp``) a step of all takes ``max_i T_i + t_srv max_j s_j + t_comm``; with b
backup workers the maximum leaves the b slowest out, whose gradients are dropped. Without lockstep (``asp``) each worker goes
through its shards at its own pace, and pays ``t_srv max_j s_j + t_comm`` for each batch; ``asp_static`` divides the data equally
beforehand.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from strategies.antdt.control.actions import AdjustBatch, BackupWorkers, KillRestart, Versioned
from strategies.antdt.control.controller import Controller
from strategies.antdt.control.monitor import Sample
from strategies.antdt.control.solutions import Oracle, Solution
from strategies.antdt.sharding.ledger import DatasetSpec, DataShardingService, Range, Semantics
from strategies.antdt.simulation.slowness import NodeSlowness, SlownessModel, read_slowness

__all__ = ["ClusterSim", "SimCluster", "SimResult"]

Mode = Literal["bsp", "asp", "asp_static"]


@dataclass(frozen=True)
class SimCluster:
    """The job and its machines.

    Attributes:
        workers: W.
        local_batch: B / W, samples of a worker in a step if all have as many.
        steps: Steps of B samples that the job has.
        cost: c, seconds a sample of a worker that is not slow.
        fixed: a, seconds a micro-batch.
        cap: Most samples of a micro-batch; None for no limit.
        communication: t_comm, seconds of a step.
        servers: Parameter servers.
        server_seconds: t_srv, seconds that a server takes for a step.
        noise: Standard deviation of a step's seconds, relative, drawn anew for each worker and step.
        restart_seconds: R.
        shard_steps: M, steps for which a worker fetches data at a time.
        lag: Steps from a decision for all workers until they work by it: reports, the exchange, and what is planned ahead.

    Raises:
        ValueError: Numbers out of range.
    """

    workers: int = 1000
    local_batch: int = 100
    steps: int = 1500
    cost: float = 0.01
    fixed: float = 0.0
    cap: int | None = None
    communication: float = 0.0
    servers: int = 0
    server_seconds: float = 0.2
    noise: float = 0.0
    restart_seconds: float = 60.0
    shard_steps: int = 20
    lag: int = 0

    def __post_init__(self) -> None:
        if min(self.workers, self.local_batch, self.steps, self.shard_steps) < 1 or not self.cost > 0:
            raise ValueError(f"{self}: workers, local_batch, steps and shard_steps must be at least 1, cost positive.")
        others = (self.communication, self.servers, self.server_seconds, self.noise, self.restart_seconds, self.lag)
        if min(self.fixed, *others) < 0:
            raise ValueError(
                f"{self}: fixed, communication, servers, server_seconds, noise, restart_seconds and lag must not be negative."
            )

    @property
    def global_batch(self) -> int:
        """B."""
        return self.workers * self.local_batch


@dataclass
class SimResult:
    """Result of a simulated job. All of it is simulated.

    Attributes:
        seconds: Job completion time.
        steps: Optimizer steps; of a job without lockstep, batches over W.
        restarts: On purpose.
        helpful: Of these, of nodes that were slow persistently and then no more.
        dropped: Samples whose gradients were dropped.
        repeated: Samples that were trained twice.
        bubble: Share of the workers' time that they waited.
        decisions: Versions that the controller gave out.
        timeline: Pairs (seconds, samples trained by then).
        events: The controller's log.
        ledger: Counts of samples at the end: ``todo``, ``doing``, ``done``, ``lost``, ``repeated``.
    """

    seconds: float = 0.0
    steps: int = 0
    restarts: int = 0
    helpful: int = 0
    dropped: int = 0
    repeated: int = 0
    bubble: float = 0.0
    decisions: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, int] = field(default_factory=dict)


class ClusterSim:
    """One job on one cluster under one solution.

    Args:
        cluster: The job and its machines.
        solution: What to do about stragglers; used up by the run.
        slowness: How slow nodes are: a model, or the path of a trace.
        seed: Of the model and of the noise.
        mode: Lockstep or not.
        server_slowness: The same for the servers; None: as the workers.
        group_restart: Whether the restart of a worker stops all; that of a server always does.
        decide_every: Seconds between decisions.
        samples: Samples of the job; None: ``steps`` times B.

    Example:
        >>> from strategies.antdt.control.solutions import StaticBSP
        >>> calm = SlownessModel(transient_rate=0, persistent_share=0)
        >>> cluster = SimCluster(workers=4, local_batch=8, steps=10, cost=0.5, fixed=1.0, communication=0.25)
        >>> ClusterSim(cluster, StaticBSP(), calm).run().seconds
        52.5
    """

    def __init__(
        self,
        cluster: SimCluster,
        solution: Solution,
        slowness: SlownessModel | str,
        seed: int = 0,
        *,
        mode: Mode = "bsp",
        server_slowness: SlownessModel | str | None = None,
        group_restart: bool = False,
        decide_every: float = 10.0,
        samples: int | None = None,
    ) -> None:
        if mode not in ("bsp", "asp", "asp_static"):
            raise ValueError(f"ClusterSim: mode={mode!r} must be bsp, asp or asp_static.")
        self.cluster, self.solution, self.mode, self.group_restart = cluster, solution, mode, group_restart
        self.samples = cluster.steps * cluster.global_batch if samples is None else samples
        self.workers = _nodes(slowness, "worker", cluster.workers, seed)
        self.servers = _nodes(slowness if server_slowness is None else server_slowness, "server", cluster.servers, seed)
        self.controller = Controller(
            solution,
            world_size=cluster.workers,
            global_batch=cluster.global_batch,
            caps=cluster.cap,
            decide_every=decide_every,
            group_restart=group_restart,
            restart_cost=cluster.restart_seconds,
        )
        semantics: Semantics = "exactly_once" if mode == "bsp" else "at_least_once"
        self.ledger = DataShardingService(DatasetSpec(n=self.samples, epochs=1), semantics)
        self.result = SimResult()
        self._noise = random.Random(f"{seed}/noise")
        self._now = 0.0
        self._left = self.samples
        self._decide_every = decide_every
        for role, nodes in (("worker", self.workers), ("server", self.servers)):
            for number, node in enumerate(nodes):
                self.controller.join(f"{role}:{number}", 0.0, device=node.device)

    def run(self) -> SimResult:
        """Simulate the job to its end."""
        if self.mode == "bsp":
            _Lockstep(self).run()
        else:
            _Free(self).run()
        result = self.result
        result.seconds, result.events = self._now, self.controller.events
        result.decisions = self.controller.version
        result.ledger = self.ledger.counts()[0]
        return result

    # ---- what both modes share ----------------------------------------------------------------------------------------

    def decide(self) -> list[Versioned]:
        """Let the controller decide, if it is time."""
        self.controller.progress(self._left, self.result.steps)
        if isinstance(self.solution, Oracle):
            self.solution.reveal([self.cluster.cost * node.factor for node in self.workers])
        return self.controller.tick(self._now)

    def move(self, kills: Sequence[Versioned]) -> list[int]:
        """Restart nodes elsewhere; returns the numbers of the workers among them."""
        moved = []
        for decision in kills:
            role, _, number = str(decision.node).partition(":")
            helped = (self.workers if role == "worker" else self.servers)[int(number)].move(self._now)
            self.result.restarts += 1
            self.result.helpful += helped
            if role == "worker":
                moved.append(int(number))
        return moved

    def server_seconds(self) -> float:
        """Of a step, now."""
        return self.cluster.server_seconds * max((node.factor for node in self.servers), default=0.0)

    def trained(self, samples: int) -> None:
        """Note progress."""
        self._left -= samples
        self.result.timeline.append((self._now, self.samples - self._left))

    def noisy(self) -> float:
        """A factor around 1."""
        return max(0.1, 1.0 + self.cluster.noise * self._noise.gauss(0.0, 1.0)) if self.cluster.noise else 1.0


class _Lockstep:
    """All workers take each step together."""

    def __init__(self, sim: ClusterSim) -> None:
        self.sim, count = sim, sim.cluster.workers
        self.gen = dict.fromkeys(range(count), sim.ledger.begin(range(count)))
        self.held: list[deque[Range]] = [deque() for _ in range(count)]
        self.stock = [0] * count  # samples held and not used
        self.used = [0] * count  # samples used and not committed
        self.returns: dict[int, float] = {}  # absent workers, and when they are back
        self.backup = 0
        self.coming: deque[tuple[int, Versioned]] = deque()  # decisions, and the step with which each comes into force
        self.busy = self.total = 0.0
        self.changes = [(0.0, i) for i in range(count)]  # when a worker's slowness changes next
        self.server_changes = [(0.0, j) for j in range(sim.cluster.servers)]
        self._take_plan()

    def run(self) -> None:
        sim, cluster = self.sim, self.sim.cluster
        self._advance()
        while sim._left > 0:
            self._come_back()
            self._come_into_force()
            counts = self._draw()
            micros = [1 if cap is None else max(1, -(-n // cap)) for n, cap in zip(counts, self.cap, strict=True)]
            fixed, cost = cluster.fixed, cluster.cost
            taken = [
                fixed * c + cost * node.factor * n if n else 0.0 for n, c, node in zip(counts, micros, sim.workers, strict=True)
            ]
            if cluster.noise:
                taken = [seconds * sim.noisy() for seconds in taken]
            slowest = self._wait(taken, counts)
            server = sim.server_seconds()
            wall = slowest + server + cluster.communication
            sim._now += wall
            self.total += wall
            self.busy += math.fsum(min(seconds, slowest) for seconds in taken)
            sim.result.steps += 1
            self.used = [used + n for used, n in zip(self.used, counts, strict=True)]
            self.stock = [stock - n for stock, n in zip(self.stock, counts, strict=True)]
            sim.trained(sum(counts))
            if sim.servers:
                ones = [1] * len(sim.servers)
                served = [cluster.server_seconds * node.factor for node in sim.servers]
                sim.controller.report_step("server", ones, ones, served, wall, sim._now)
            sim.controller.report_step("worker", counts, micros, taken, wall, sim._now)
            self._advance()
            self._obey(sim.decide())
            self._advance()
        for worker in range(cluster.workers):
            self._settle(worker)
        sim.result.bubble = 1 - self.busy / (self.total * cluster.workers)

    def _advance(self) -> None:
        _advance(self.sim.workers, self.changes, self.sim._now)
        _advance(self.sim.servers, self.server_changes, self.sim._now)

    def _draw(self) -> list[int]:
        """Samples of each worker in this step; fetches data, for at most the steps that are left (the quota rule)."""
        sim = self.sim
        present = sum(n for i, n in enumerate(self.batch) if i not in self.returns)
        steps_left = -(-sim._left // max(present, 1))
        for i, (stock, n) in enumerate(zip(self.stock, self.batch, strict=True)):
            if stock < n and i not in self.returns:
                self._settle(i)
                want = n * min(sim.cluster.shard_steps, steps_left) - stock
                while want > 0:
                    got = sim.ledger.fetch(i, self.gen[i], 0, (n, sim.cluster.global_batch), want).ranges
                    if not got:
                        break
                    self.held[i].extend(got)
                    size = sum(part.hi - part.lo for part in got)
                    self.stock[i] += size
                    want -= size
                    if self.stock[i] >= n:
                        break
        return [
            0 if i in self.returns else min(n, stock) for i, (n, stock) in enumerate(zip(self.batch, self.stock, strict=True))
        ]

    def _wait(self, taken: Sequence[float], counts: Sequence[int]) -> float:
        """Seconds until enough gradients are there; the others are dropped."""
        present = sum(1 for n in counts if n)
        backup = min(self.backup, present - 1)
        if backup < 1:
            return max(taken)
        late = heapq.nlargest(backup + 1, range(len(taken)), key=lambda i: taken[i])
        self.sim.result.dropped += sum(counts[i] for i in late[:-1])
        return taken[late[-1]]

    def _settle(self, worker: int) -> None:
        """Commit what was used."""
        used, items = self.used[worker], []
        held = self.held[worker]
        while used:
            part = held[0]
            size = min(used, part.hi - part.lo)
            items.append((part.sid, part.lo + size))
            used -= size
            held.popleft()
            if part.lo + size < part.hi:
                held.appendleft(Range(part.sid, part.lo + size, part.hi))
        if items:
            self.sim.ledger.commit(worker, self.gen[worker], items)
        self.used[worker] = 0

    def _obey(self, decisions: Sequence[Versioned]) -> None:
        sim = self.sim
        kills = [decision for decision in decisions if isinstance(decision.action, KillRestart)]
        others = [decision for decision in decisions if decision not in kills]
        self.coming += [(sim.result.steps + sim.cluster.lag, decision) for decision in others]
        self._come_into_force()
        if not kills:
            return
        moved = sim.move(kills)
        pause = sim.cluster.restart_seconds
        servers = [str(decision.node) for decision in kills if str(decision.node).startswith("server")]
        if servers or (sim.group_restart and moved):
            sim._now += pause
            self.total += pause
            for name in servers:
                sim.controller.join(name, sim._now)
        if sim.group_restart and moved:
            self._come_into_force(all_of_them=True)  # who begins anew begins with the newest plan
            for i in range(sim.cluster.workers):
                self._settle(i)
            gen = sim.ledger.begin(range(sim.cluster.workers))
            for i in range(sim.cluster.workers):
                self._lose(i)
                self.gen[i] = gen
                sim.controller.join(f"worker:{i}", sim._now)
        else:
            for i in moved:
                self._settle(i)
                sim.ledger.fail(i)
                self._lose(i)
                self.returns[i] = sim._now + (0.0 if servers else pause)

    def _come_into_force(self, all_of_them: bool = False) -> None:
        sim = self.sim
        while self.coming and (all_of_them or self.coming[0][0] <= sim.result.steps):
            decision = self.coming.popleft()[1]
            if isinstance(decision.action, AdjustBatch):
                self._take_plan()
            elif isinstance(decision.action, BackupWorkers):
                self.backup = decision.action.count
            sim.controller.applied(decision.version, sim.result.steps, sim._now)

    def _lose(self, worker: int) -> None:
        self.held[worker].clear()
        self.stock[worker] = 0

    def _come_back(self) -> None:
        for i in [i for i, time in self.returns.items() if time <= self.sim._now]:
            del self.returns[i]
            self.gen[i] = self.sim.ledger.join(i)
            self.sim.controller.join(f"worker:{i}", self.sim._now)

    def _take_plan(self) -> None:
        """New batches; whoever holds more than its share of the rest gives it back."""
        plan = self.sim.controller.plan
        self.batch: list[int] = plan["batch"]
        self.cap: list[int | None] = plan["cap"]
        steps_left = -(-self.sim._left // self.sim.cluster.global_batch)
        for i, n in enumerate(self.batch):
            excess = self.stock[i] - n * steps_left
            if excess > 0:
                self._settle(i)
                while excess > 0:
                    part = self.held[i].pop()
                    size = min(excess, part.hi - part.lo)
                    self.sim.ledger.release(i, self.gen[i], part.sid, part.hi - size)
                    if part.hi - size > part.lo:
                        self.held[i].append(Range(part.sid, part.lo, part.hi - size))
                    self.stock[i] -= size
                    excess -= size


class _Free:
    """Each worker goes at its own pace, shard by shard."""

    def __init__(self, sim: ClusterSim) -> None:
        self.sim, count = sim, sim.cluster.workers
        self.gen = dict.fromkeys(range(count), sim.ledger.begin(range(count)))
        self.doing: dict[int, tuple[float, float, list[Range]]] = {}  # begun, done, what
        self.events: list[tuple[float, int, int, str]] = []
        self.order = itertools.count()
        self.reported = [0] * count  # batches of what a worker is doing
        self.busy = 0.0
        self.batches = 0
        self.server_changes = [(0.0, j) for j in range(sim.cluster.servers)]

    def run(self) -> None:
        sim, count = self.sim, self.sim.cluster.workers
        if sim.mode == "asp_static":
            bounds = [sim.samples * i // count for i in range(count + 1)]
            self.static = [bounds[i + 1] - bounds[i] for i in range(count)]
        for worker in range(count):
            self._begin(worker)
        self._push(sim._decide_every, -1, "tick")
        while sim._left > 0:
            time, _, worker, what = heapq.heappop(self.events)
            if what == "done" and (worker not in self.doing or self.doing[worker][1] != time):
                continue  # it was killed
            sim._now = max(sim._now, time)
            if what == "tick":
                for each in self.doing:
                    self._report(each)
                _advance(sim.servers, self.server_changes, sim._now)
                self._obey(sim.decide())
                self._push(sim._now + sim._decide_every, -1, "tick")
            elif what == "join":
                self.gen[worker] = sim.ledger.join(worker)
                sim.controller.join(f"worker:{worker}", sim._now)
                self._begin(worker)
            elif what == "done":
                self._end(worker)
                self._begin(worker)
            else:
                self._begin(worker)
        sim.result.steps = self.batches // count
        sim.result.bubble = 1 - self.busy / (sim._now * count)

    def _push(self, time: float, worker: int, what: str) -> None:
        heapq.heappush(self.events, (time, next(self.order), worker, what))

    def _begin(self, worker: int) -> None:
        sim, cluster = self.sim, self.sim.cluster
        most = cluster.local_batch * cluster.shard_steps
        if sim.mode == "asp_static":
            most = min(most, self.static[worker])
            if not most:
                return
            self.static[worker] -= most
        share = (cluster.local_batch, cluster.global_batch)
        got: list[Range] = []
        while (want := most - sum(part.hi - part.lo for part in got)) > 0:
            answer = sim.ledger.fetch(worker, self.gen[worker], 0, share, want)
            got += answer.ranges
            if answer.state != "ranges" or sim.mode == "asp":
                break
        if not got:
            if sim.ledger.remaining:
                self._push(sim._now + sim._decide_every, worker, "ask")
            return
        batches = -(-sum(part.hi - part.lo for part in got) // cluster.local_batch)
        micros = 1 if cluster.cap is None else -(-cluster.local_batch // cluster.cap)
        size = sum(part.hi - part.lo for part in got)
        waits = batches * (sim.server_seconds() + cluster.communication + cluster.fixed * micros)
        node = sim.workers[worker]
        done = node.finish(sim._now + waits, cluster.cost * size * sim.noisy())
        self.doing[worker] = (sim._now, done, got)
        self.reported[worker] = 0
        self._push(done, worker, "done")

    def _end(self, worker: int) -> None:
        sim, cluster = self.sim, self.sim.cluster
        self._report(worker)
        begun, done, got = self.doing.pop(worker)
        size = sum(part.hi - part.lo for part in got)
        sim.ledger.commit(worker, self.gen[worker], [(part.sid, part.hi) for part in got])
        batches = -(-size // cluster.local_batch)
        self.batches += batches
        self.busy += done - begun
        sim.trained(size)
        sim.result.steps = self.batches // cluster.workers

    def _report(self, worker: int) -> None:
        """Tell the controller of the batches that a worker has done of its shard, by now."""
        sim, cluster = self.sim, self.sim.cluster
        begun, done, got = self.doing[worker]
        size = sum(part.hi - part.lo for part in got)
        batches = -(-size // cluster.local_batch)
        wall = (done - begun) / batches
        ready = batches if sim._now >= done else int((sim._now - begun) / wall)
        first, self.reported[worker] = self.reported[worker], max(ready, self.reported[worker])
        if ready <= first:
            return
        taken = max(wall - sim.server_seconds() - cluster.communication, 0.0) / size * batches
        sizes = [min(cluster.local_batch, size - cluster.local_batch * number) for number in range(first, ready)]
        step = self.batches // cluster.workers
        sim.controller.report(f"worker:{worker}", [Sample(step, n, 0.0, taken * n, wall) for n in sizes], begun + ready * wall)
        if worker == 0:
            for j, server in enumerate(sim.servers):
                seconds = cluster.server_seconds * server.factor
                sim.controller.report(f"server:{j}", [Sample(step, 1, 0.0, seconds, wall)] * len(sizes), sim._now)

    def _obey(self, decisions: Sequence[Versioned]) -> None:
        sim = self.sim
        kills = [decision for decision in decisions if isinstance(decision.action, KillRestart)]
        for decision in decisions:
            if decision not in kills:  # there is no global batch that could be balanced
                sim.controller.applied(decision.version, sim.result.steps, sim._now)
        if not kills:
            return
        for i in sim.move(kills):
            if i in self.doing:
                begun, done, got = self.doing.pop(i)
                size = sum(part.hi - part.lo for part in got)
                sim.result.repeated += int(size * (sim._now - begun) / (done - begun))
                if sim.mode == "asp_static":
                    self.static[i] += size
            sim.ledger.fail(i)
            self._push(sim._now + sim.cluster.restart_seconds, i, "join")
        servers = [str(decision.node) for decision in kills if str(decision.node).startswith("server")]
        if servers:
            self._pause(sim.cluster.restart_seconds)
            for name in servers:
                sim.controller.join(name, sim._now)

    def _pause(self, seconds: float) -> None:
        """Everybody waits for a server."""
        sim = self.sim
        sim._now += seconds
        self.events = [(time + seconds, order, worker, what) for time, order, worker, what in self.events]
        self.doing = {worker: (begun + seconds, done + seconds, got) for worker, (begun, done, got) in self.doing.items()}
        heapq.heapify(self.events)


def _nodes(slowness: SlownessModel | str, role: str, count: int, seed: int) -> list[NodeSlowness]:
    return slowness.draw(role, count, seed) if isinstance(slowness, SlownessModel) else read_slowness(slowness, role, count)


def _advance(nodes: Sequence[NodeSlowness], changes: list[tuple[float, int]], now: float) -> None:
    """Bring nodes up to now, of which ``changes`` is a heap of (when it changes next, number)."""
    while changes and changes[0][0] <= now:
        _, number = changes[0]
        nodes[number].advance(now)
        heapq.heapreplace(changes, (nodes[number].until, number))
