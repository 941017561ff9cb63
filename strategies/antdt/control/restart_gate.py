"""Whether restarts pay: what they take against what they save (section 2.5) [derived].

Workers: the rest of the job takes ``H = remaining / throughput`` seconds as it goes, and goes as the balanced step does, so that
a restart saves ``H (1 - T_after / T_before)``, with T the shortest possible step before and after. (The specification's
``H (1/c_med - 1/c_i) / sum 1/c_j`` is the first order of that, without fixed costs and least batches, and promises too much.)
Servers: a step gets shorter by as much as the slowest server does. A restart takes R seconds if all wait, else the part of R that
the absent worker's share of the speed is; and it is never for nothing: a twentieth of R is the least that it must save.

Nobody knows how long a node will stay slow. We take what it has been so far, and at most H: so a node is restarted when what it
has cost reaches what the restart takes, which is never more than twice what would have been best (as for skis that may be rented
or bought). With H alone, episodes that end by themselves stop a whole group for nothing. What is saved counts with the
probability that a restart helps, from those that were seen.
"""

import statistics
from collections.abc import Sequence

from strategies.antdt.control.cluster_view import ClusterView, NodeView
from strategies.antdt.control.monitor import medians

__all__ = ["server_restarts", "worker_restarts"]

LEAST = 0.05  # of R


def worker_restarts(view: ClusterView, bad: Sequence[NodeView], min_local_batch: int = 1) -> int:
    """Number of bad workers to restart, the worst first; 0 if it does not pay.

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
    fixed, cost = costs
    devices = [worker.device for worker in view.workers]
    usual, usual_fixed = medians(cost, devices), medians(fixed, devices)
    low = min(min_local_batch, view.global_batch // len(cost))

    speed = whole = sum(1 / c for c in cost)
    load = view.global_batch + sum(a / c for a, c in zip(fixed, cost, strict=True))
    floors = sorted((a + c * low for a, c in zip(fixed, cost, strict=True)), reverse=True)  # nobody is quicker than that
    floor_of = {node.number: fixed[node.number] + cost[node.number] * low for node in bad}
    before = max(load / speed, floors[0])

    best, chosen, absent, saved, last = 0.0, 0, 0.0, 0.0, before
    least = LEAST * view.restart_seconds
    for count, node in enumerate(bad, 1):
        own, then, then_fixed = cost[node.number], usual[node.device], usual_fixed[node.device]
        absent += 1 / own / whole
        speed += 1 / then - 1 / own
        load += then_fixed / then - fixed[node.number] / own
        floors.remove(floor_of[node.number])
        after = max(load / speed, floors[0] if floors else 0.0, then_fixed + then * low)
        saved += view.restart_success * min(horizon, node.slow_seconds) * (last - after) / before
        last = after
        if (profit := saved - max(view.restart_seconds * (1.0 if view.group_restart else absent), least)) > best:
            best, chosen = profit, count
    return chosen


def server_restarts(view: ClusterView, bad: Sequence[NodeView], min_local_batch: int = 1) -> int:
    """Number of bad servers to restart, the worst first; 0 if it does not pay.

    All steps wait for the slowest server, and nothing can be taken off it.
    """
    horizon = view.horizon
    if horizon is None or not view.step_seconds:
        return 0
    names = {node.node for node in bad}
    times = [node.seconds for node in view.servers if node.seconds is not None]
    others = max((node.seconds for node in view.servers if node.seconds is not None and node.node not in names), default=0.0)
    worst = [node.seconds or 0.0 for node in bad]
    best, chosen, still = 0.0, 0, horizon
    for count, node in enumerate(bad, 1):
        still = min(still, node.slow_seconds)
        left = max([*worst[count:], others, statistics.median_low(times)])
        saved = view.restart_success * still * (worst[0] - left) / view.step_seconds
        if (profit := saved - view.restart_seconds) > best:
            best, chosen = profit, count
    return chosen
