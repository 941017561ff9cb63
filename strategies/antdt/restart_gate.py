"""Whether restarts pay: what they take against what they save in the rest of the job (section 2.5) [derived].

Workers: the rest of the job takes ``H = remaining / throughput`` seconds as it goes, and goes as the balanced step does, so that a
restart saves ``H (1 - T_after / T_before)``, with T the shortest possible step before and after. (The specification's
``H (1/c_med - 1/c_i) / sum 1/c_j`` is the first order of that, without fixed costs and least batches, and promises too much.)
Servers: a step gets shorter by as much as the slowest server does. Both count with the probability that a restart helps.

A restart takes R seconds if all wait, else the part of R that the absent worker's share of the speed is.
"""

import statistics
from collections.abc import Sequence

from strategies.antdt.cluster_view import ClusterView, NodeView

__all__ = ["server_restarts", "worker_restarts"]


def worker_restarts(view: ClusterView, bad: Sequence[NodeView], min_local_batch: int = 1) -> int:
    """How many of the bad workers, the worst first, to restart; 0 if it does not pay.

    Others take over what a slow worker cannot do, so that one more quick worker is worth little in a large group.

    Args:
        view: The cluster; workers are balanced, or soon will be.
        bad: Candidates, the worst first.
        min_local_batch: Least samples of a worker.
    """
    costs = view.costs()
    horizon = view.horizon
    if costs is None or horizon is None:
        return 0
    fixed, cost = list(costs[0]), list(costs[1])
    known = [worker.index for worker in view.workers if worker.cost is not None]
    usual = statistics.median(cost[number] for number in known)
    usual_fixed = statistics.median(fixed[number] for number in known)
    low = min(min_local_batch, view.global_batch // len(cost))

    speed = whole = sum(1 / c for c in cost)
    load = view.global_batch + sum(a / c for a, c in zip(fixed, cost, strict=True))
    floors = sorted((a + c * low for a, c in zip(fixed, cost, strict=True)), reverse=True)  # nobody is quicker than that
    floor_of = {number: fixed[number] + cost[number] * low for number in (node.index for node in bad)}
    before = max(load / speed, floors[0])

    best, chosen, absent = 0.0, 0, 0.0
    for count, node in enumerate(bad, 1):
        own = cost[node.index]
        absent += 1 / own / whole
        speed += 1 / usual - 1 / own
        load += usual_fixed / usual - fixed[node.index] / own
        floors.remove(floor_of[node.index])
        after = max(load / speed, floors[0] if floors else 0.0, usual_fixed + usual * low)
        saved = view.restart_success * horizon * (1 - after / before)
        if (profit := saved - view.restart_seconds * (1.0 if view.group_restart else absent)) > best:
            best, chosen = profit, count
    return chosen


def server_restarts(view: ClusterView, bad: Sequence[NodeView], min_local_batch: int = 1) -> int:
    """How many of the bad servers, the worst first, to restart; 0 if it does not pay.

    All steps wait for the slowest server, and nothing can be taken off it.
    """
    if view.remaining is None:
        return 0
    steps = view.remaining / view.global_batch
    bad_names = {node.node for node in bad}
    times = [node.seconds for node in view.servers if node.seconds is not None]
    others = max((node.seconds for node in view.servers if node.seconds is not None and node.node not in bad_names), default=0.0)
    worst = [node.seconds or 0.0 for node in bad]
    best, chosen = 0.0, 0
    for count in range(1, len(bad) + 1):
        left = max([*worst[count:], others, statistics.median_low(times)])
        saved = view.restart_success * steps * (worst[0] - left)
        if (profit := saved - view.restart_seconds) > best:
            best, chosen = profit, count
    return chosen
