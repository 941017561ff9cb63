"""Local batches that make the slowest worker's step as short as possible, in whole samples, exactly (sections 2.5, 2.6).

[derived] Both problems ask for whole numbers n_i that sum to B and minimise the largest of times t_i(n_i), which grow with n_i.
Write down all pairs (worker, n) with their times: the best choice is the B pairs of least time. So a time T is searched for at
which nearly B pairs are ready, and the few that are missing are taken one by one, the soonest first.
"""

import heapq
from collections.abc import Callable, Sequence

__all__ = ["balance", "balance_micro"]


def balance(
    fixed: Sequence[float], cost: Sequence[float], total: int, low: Sequence[int], high: Sequence[int | None]
) -> list[int]:
    """Minimise ``max_i (a_i + c_i n_i)`` over whole ``n_i`` with ``sum n_i = B`` and ``L_i <= n_i <= U_i``.

    Without bounds and fixed costs this is the proportional rule ``n_i = B (1/c_i) / sum_j (1/c_j)``, rounded as well as can be.

    Args:
        fixed: a_i, seconds, not negative.
        cost: c_i, seconds a sample, positive.
        total: B.
        low: L_i.
        high: U_i; None for no limit.

    Returns:
        n_i. A worker that gets slower while the others stay as they are never gets more.

    Raises:
        ValueError: Numbers out of range, or bounds between which the total does not fit.

    Example:
        >>> balance([0, 0, 0, 0], [1, 1, 1, 4], 13, [1] * 4, [None] * 4)
        [4, 4, 4, 1]
    """
    upper = [total if limit is None else min(limit, total) for limit in high]
    _check(fixed, cost, total, low, upper)

    def most(time: float) -> list[int]:
        return [
            min(max(int((time - a) / c) if time > a else 0, least), limit)
            for a, c, least, limit in zip(fixed, cost, low, upper, strict=True)
        ]

    def seconds(i: int, n: int) -> float:
        return fixed[i] + cost[i] * n

    speed = [1 / c for c in cost]
    guess = (total + sum(a * v for a, v in zip(fixed, speed, strict=True))) / sum(speed)
    return _least_maximum(most, seconds, guess, total, low, upper)


def balance_micro(
    fixed: Sequence[float], cost: Sequence[float], cap: Sequence[int | None], total: int, low: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Minimise ``max_i (C_i a_i + c_i n_i)``, ``C_i = ceil(n_i / cap_i)``, over whole ``n_i >= L_i`` with ``sum n_i = B``.

    Args:
        fixed: a_i, seconds a micro-batch, not negative.
        cost: c_i, seconds a sample, positive.
        cap: cap_i, most samples of a micro-batch; None for no limit.
        total: B.
        low: L_i.

    Returns:
        n_i and C_i.

    Raises:
        ValueError: Numbers out of range, or a total below the sum of the least.

    Example:
        >>> balance_micro([0.010] * 4 + [0.015] * 4, [0.0025] * 4 + [0.0075] * 4, [128] * 4 + [96] * 4, 768, [1] * 8)
        ([144, 144, 144, 144, 48, 48, 48, 48], [2, 2, 2, 2, 1, 1, 1, 1])
    """
    _check(fixed, cost, total, low, [total] * len(cost))
    limits = [total if limit is None else limit for limit in cap]
    if len(limits) != len(cost) or min(limits) < 1:
        raise ValueError(f"balance_micro: cap={list(cap)} must give each of {len(cost)} workers at least 1, or None.")

    def seconds(i: int, n: int) -> float:
        return -(-n // limits[i]) * fixed[i] + cost[i] * n

    def most_of(i: int, time: float) -> int:
        a, c, limit = fixed[i], cost[i], limits[i]
        whole = int(max(time, 0.0) / (a + c * limit))  # micro-batches that are full
        if whole * limit >= total:
            return total
        return max(whole * limit, min(int(max((time - (whole + 1) * a) / c, 0.0)), (whole + 1) * limit))

    def most(time: float) -> list[int]:
        return [min(max(most_of(i, time), least), total) for i, least in enumerate(low)]

    guess = total / sum(1 / (a / limit + c) for a, c, limit in zip(fixed, cost, limits, strict=True))
    batch = _least_maximum(most, seconds, guess, total, low, [total] * len(cost))
    return batch, [-(-n // limit) for n, limit in zip(batch, limits, strict=True)]


def _least_maximum(
    most: Callable[[float], list[int]],
    seconds: Callable[[int, int], float],
    guess: float,
    total: int,
    low: Sequence[int],
    high: Sequence[int],
) -> list[int]:
    """The ``total`` pairs (worker, n) of least time; see the module.

    Args:
        most: For a time, the most that each worker can do in it, within the bounds.
        seconds: t_i(n), growing with n.
        guess: A time from which the search begins.
        total: B.
        low: L_i.
        high: U_i.
    """
    below, above, batch = 0.0, None, list(low)
    time = guess
    for _ in range(200):
        found = most(time)
        if (size := sum(found)) <= total:
            below, batch = time, found
            if total - size <= len(found):
                break
        else:
            above = time
        middle = 2 * time if above is None else (below + above) / 2
        if middle in (below, above):
            break
        time = middle
    missing = total - sum(batch)
    soonest = [(seconds(i, n + 1), i) for i, n in enumerate(batch) if n < high[i]]
    heapq.heapify(soonest)
    for _ in range(missing):
        _, i = soonest[0]
        batch[i] += 1
        if batch[i] < high[i]:
            heapq.heapreplace(soonest, (seconds(i, batch[i] + 1), i))
        else:
            heapq.heappop(soonest)
    return batch


def _check(fixed: Sequence[float], cost: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> None:
    if not len(fixed) == len(cost) == len(low) == len(high) or not cost:
        raise ValueError(
            f"balance: fixed, cost, low and high are for {len(fixed)}, {len(cost)}, {len(low)} and {len(high)} workers; they must"
            " be equally many, at least one."
        )
    if min(fixed) < 0 or not min(cost) > 0:
        raise ValueError(f"balance: fixed costs must not be negative (least {min(fixed)}), costs positive (least {min(cost)}).")
    if min(low) < 0 or any(least > most for least, most in zip(low, high, strict=True)) or not sum(low) <= total <= sum(high):
        raise ValueError(
            f"balance: {total} samples do not fit between the least, {sum(low)} in all, and the most, {sum(high)} in all."
        )
