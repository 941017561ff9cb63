"""The curriculum inside rationales: leading steps that each question still gives to the student, stage by stage.

With ``d`` the difficulties of steps, ``c_i(t)`` the number of leading steps that question i gives at stage t, and
``H(t) = sum_i sum_{j > c_i(t)} d_ij``, what the student has to write at stage t, in nats:

    D(t) = C0 + (B - C0) (t / T)^(p + 1),   C0 = c0 B,   B = sum of all d                          (budget)
    c_i(t) = c_i(t - 1) - delta_s for i in S(t), else c_i(t - 1);   delta_i: sum of d over the steps that i would take on
    S(t) = argmax_S -(dD - sum_S delta_i) + beta sum_k sqrt(|C_k & S|)   subject to   sum_S delta_i <= dD = D(t) - H(t - 1)

for clusters C_k of the questions. What a stage leaves of its budget is part of the next one's. After stage T nothing is given.
Source: arXiv 2405.16064, section 3.4, equations 9 to 13 (there D(t) by its slope u). The paper solves each stage by FTGP; here it
is greedy by density with augmentation (Greedy+), at least half of the best ``f = sum_S delta_i + beta sum_k sqrt(|C_k & S|)``:
guarantees need a function that is nowhere negative, which f is and f - dD is not.

Shape suffixes: N questions, M steps of all of them, T stages, K clusters, P prefixes of the greedy order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kpod.difficulty import Difficulties

__all__ = ["Init", "ProgressiveSchedule", "Schedule", "budget_curve", "objective", "select"]

Init = Literal["greedy", "proportional", "last_step"]

_GRID = 2.0**24  # difficulties are rounded to 1 / _GRID nats: their float64 sums are then exact up to 2^29 nats, in any order


class Schedule(NamedTuple):
    """A solved curriculum; curves in nats, float64.

    Attributes:
        given: int16 (T + 1, N), leading steps that are given at each stage; row 0 is the start.
        budget: (T + 1,), D(t).
        reached: (T + 1,), H(t).
        total: (), B.
        budget_term: (T,), ``-(dD - sum delta)`` of the selected questions, the first term of the objective.
        diversity_term: (T,), ``beta sum_k sqrt(|C_k & S|)``, the second one.
    """

    given: Tensor
    budget: Tensor
    reached: Tensor
    total: Tensor
    budget_term: Tensor
    diversity_term: Tensor

    @property
    def steps_left(self) -> int:
        """Steps still given at the last stage, all of which the student takes on after it."""
        return int(self.given[-1].sum())


@dataclass(frozen=True)
class ProgressiveSchedule:
    """Says which questions get harder at which stage.

    Attributes:
        stages: T; one stage is one epoch.
        p: Growth of the budget: 0 is linear, more is slower at first.
        c0: Share of the whole difficulty that the student writes at the start.
        beta: Weight of diversity. It is not free of scale: a question of a cluster with m selected ones adds about
            ``beta / (2 sqrt(m))``, which for thousands of questions matters to a stage's first hundreds only.
        delta_s: Steps by which a question gets harder at a stage; ``auto``: the most steps of a rationale over T, rounded up.
        init: Start: ``greedy`` selects within C0, from nothing to write, until nothing fits; ``proportional`` takes the longest
            tail of each question within c0 of its own difficulty; ``last_step`` takes one step of each, whatever c0 is.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> schedule = ProgressiveSchedule(stages=2, p=0.0, c0=0.5, beta=0.0).plan([[1.0, 1.0], [1.0, 1.0]], [0, 0])
        >>> schedule.given
        tensor([[1, 1],
                [0, 1],
                [0, 0]], dtype=torch.int16)
    """

    stages: int
    p: float = 0.5
    c0: float = 0.3
    beta: float = 12.0
    delta_s: int | Literal["auto"] = 1
    init: Init = "greedy"

    def __post_init__(self) -> None:
        if self.stages < 1 or not 0 <= self.p < math.inf or not 0 <= self.c0 <= 1 or not 0 <= self.beta < math.inf:
            raise ValueError(
                f"ProgressiveSchedule: stages={self.stages} must be at least 1, c0={self.c0} in [0, 1], p={self.p} and"
                f" beta={self.beta} finite and not negative."
            )
        if (self.delta_s != "auto" and self.delta_s < 1) or self.init not in get_args(Init):
            raise ValueError(
                f"ProgressiveSchedule: delta_s={self.delta_s!r} must be at least 1 or auto, and init={self.init!r} one of"
                f" {', '.join(get_args(Init))}."
            )

    def plan(self, difficulties: Difficulties | Sequence[Sequence[float]], labels: Sequence[int] | Tensor) -> Schedule:
        """Solve all stages.

        Args:
            difficulties: Difficulties of the steps of each question.
            labels: Cluster of each question, integers (N,).

        Raises:
            ValueError: If a question has no step, a difficulty is negative or not finite, or labels do not fit.
        """
        label_N = torch.as_tensor(labels, device="cpu")
        steps = _Steps(difficulties if isinstance(difficulties, Difficulties) else Difficulties.of_rows(difficulties))
        if label_N.shape != steps.count_N.shape or label_N.is_floating_point():
            raise ValueError(
                f"ProgressiveSchedule: {tuple(label_N.shape)} labels of {label_N.dtype} for {len(steps.count_N)} questions:"
                " give each question the number of its cluster."
            )
        delta_s = math.ceil(int(steps.count_N.max()) / self.stages) if self.delta_s == "auto" else self.delta_s
        budget = budget_curve(steps.total, self.stages, self.p, self.c0)
        given_N = self._start(steps, label_N, float(budget[0]), delta_s)
        given, reached, terms = [given_N], [steps.difficulty(given_N)], []
        for target in budget.tolist()[1:]:
            room = target - reached[-1]
            given_N, chosen, cost = self._harder(steps, given_N, label_N, room, delta_s)
            given.append(given_N)
            reached.append(steps.difficulty(given_N))
            terms.append(objective(cost, label_N[chosen], room, self.beta))
        budget_term, diversity_term = torch.tensor(terms, dtype=torch.float64).T
        return Schedule(
            given=torch.stack(given).to(torch.int16),
            budget=budget,
            reached=torch.tensor(reached, dtype=torch.float64),
            total=torch.tensor(steps.total, dtype=torch.float64),
            budget_term=budget_term.contiguous(),
            diversity_term=diversity_term.contiguous(),
        )

    def _harder(
        self, steps: "_Steps", given_N: Tensor, label_N: Tensor, budget: float, delta_s: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Given steps (N,) once the selected questions take on ``delta_s`` more; these questions, and the cost of each."""
        harder_N = (given_N - delta_s).clamp(min=0)
        cost_N = steps.tail(harder_N) - steps.tail(given_N)
        candidates = given_N.nonzero().squeeze(1)
        chosen = candidates[select(cost_N[candidates], label_N[candidates], budget, self.beta)]
        return given_N.index_copy(0, chosen, harder_N[chosen]), chosen, cost_N[chosen]

    def _start(self, steps: "_Steps", label_N: Tensor, budget: float, delta_s: int) -> Tensor:
        if self.init == "last_step":
            return steps.count_N - 1
        if self.init == "proportional":
            return steps.shortest_head(self.c0)
        given_N, chosen = steps.count_N, steps.count_N
        while len(chosen):
            given_N, chosen, _ = self._harder(steps, given_N, label_N, budget - steps.difficulty(given_N), delta_s)
        return given_N


class _Steps:
    """Sums of difficulties over the last steps of questions."""

    def __init__(self, difficulties: Difficulties) -> None:
        offsets, values_M = difficulties.offsets.cpu(), difficulties.values.cpu().double()
        self.count_N = offsets.diff()
        if not len(self.count_N) or bool((self.count_N < 1).any()):
            where = f"question {int(self.count_N.argmin())} has no step" if len(self.count_N) else "there are no questions"
            raise ValueError(f"ProgressiveSchedule: {where}: leave questions without a rationale out of the data.")
        if not bool(((values_M >= 0) & values_M.isfinite()).all()):
            raise ValueError("ProgressiveSchedule: a difficulty is negative or not finite: check the losses of the student.")
        self._first_N = offsets[:-1]
        self._sum_M1 = F.pad(((values_M * _GRID).round() / _GRID).cumsum(0), (1, 0))
        self._end_N = self._sum_M1[offsets[1:]]
        self.total = float(self._sum_M1[-1])

    def tail(self, given_N: Tensor) -> Tensor:
        """Difficulty (N,) of the steps behind the given ones."""
        return self._end_N - self._sum_M1[self._first_N + given_N]

    def difficulty(self, given_N: Tensor) -> float:
        """H, the sum of `tail`."""
        return float(self.tail(given_N).sum())

    def shortest_head(self, share: float) -> Tensor:
        """Least number (N,) of given steps whose `tail` is at most a share of the question's difficulty."""
        question_M = torch.repeat_interleave(self.count_N)
        whole_N = self.tail(torch.zeros_like(self.count_N))
        is_more_M = self._end_N[question_M] - self._sum_M1[:-1] > share * whole_N[question_M]
        return torch.zeros_like(self.count_N).index_add(0, question_M, is_more_M.long())


def budget_curve(total: float, stages: int, p: float = 0.5, c0: float = 0.3) -> Tensor:
    """D(t) for t = 0 to T, float64 (T + 1,): from ``c0 B`` to B, exactly, linear for p = 0, else convex."""
    share_T1 = torch.linspace(0, 1, stages + 1, dtype=torch.float64) ** (p + 1)
    return total * (1 - (1 - c0) * (1 - share_T1))


def objective(cost_S: Tensor, label_S: Tensor, budget: float, beta: float) -> tuple[float, float]:
    """Both terms of the objective of a set, ``-(budget - sum delta)`` and ``beta sum_k sqrt(|C_k & S|)``."""
    counts = label_S.unique(return_counts=True)[1]
    return float(cost_S.sum()) - budget, beta * float(counts.double().sqrt().sum())


def select(cost_N: Tensor, label_N: Tensor, budget: float, beta: float, augment: bool = True) -> Tensor:
    """Greedy+ for ``max sum_S delta_i + beta sum_k sqrt(|C_k & S|)`` subject to ``sum_S delta_i <= budget``.

    The density of one more question of a cluster with m selected ones, ``1 + beta (sqrt(m + 1) - sqrt(m)) / delta``, is greatest
    for the cluster's cheapest, so a question's m is its rank in its cluster, and one sort finds the greedy order. Equal densities
    (all of them for ``beta = 0``): the smaller delta first, then the smaller index. What does not fit is passed over, and the
    costlier rest of its cluster with it. At every prefix, the empty one included, the best single addition that fits is tried,
    the dearest of a cluster; the best set seen wins, the greedy one if equal. Sorting, and K bisections a prefix.

    Args:
        cost_N: delta, float64, not negative.
        label_N: Clusters, integers.
        budget: Bound of the summed cost; nothing fits if negative.
        beta: Weight of diversity, not negative.
        augment: Try additions; without them a set may be arbitrarily far from the best.

    Returns:
        Indices of the selected questions in increasing order, int64.

    Example:
        >>> cost, label = torch.tensor([0.001, 1.0], dtype=torch.float64), torch.tensor([0, 0])
        >>> select(cost, label, 1.0, 0.0, augment=False), select(cost, label, 1.0, 0.0)
        (tensor([0]), tensor([1]))
    """
    if not len(cost_N):
        return torch.zeros(0, dtype=torch.int64)
    cost_N, order_N = cost_N.double().sort(stable=True)
    member_NK = F.one_hot(label_N[order_N].unique(return_inverse=True)[1])
    rank_N = (member_NK.cumsum(0) * member_NK).sum(1) - 1
    density_N = (beta * _root_gain(rank_N) / cost_N).nan_to_num(
        0.0, posinf=math.inf
    )  # less 1; 0 / 0 is a tie like all for beta = 0
    first_N = density_N.sort(descending=True, stable=True).indices
    picked: list[int] = []
    room = [budget]
    for place, cost in zip(first_N.tolist(), cost_N[first_N].tolist(), strict=True):
        if cost <= room[-1]:
            picked.append(place)
            room.append(room[-1] - cost)
    chosen = torch.tensor(picked, dtype=torch.int64)
    if augment:
        chosen = _augmented(chosen, torch.tensor(room, dtype=torch.float64), cost_N, order_N, member_NK, beta)
    return order_N[chosen].sort().values


def _augmented(picked_P: Tensor, room_P1: Tensor, cost_N: Tensor, order_N: Tensor, member_NK: Tensor, beta: float) -> Tensor:
    """The best of the greedy set and its prefixes with one addition each; all in places of the sorted costs.

    Args:
        picked_P: The greedy set in its order.
        room_P1: What each prefix leaves of the budget.
        cost_N: Sorted costs.
        order_N: Questions' indices in this order.
        member_NK: Their clusters, one-hot.
        beta: Weight of diversity.
    """
    count_P1K = F.pad(member_NK[picked_P].cumsum(0), (0, 0, 1, 0))
    value_P1 = room_P1[0] - room_P1 + beta * count_P1K.double().sqrt().sum(1)
    values, places = [], []
    for member_N, count_P1 in zip(member_NK.T, count_P1K.T, strict=True):
        place_C = member_N.nonzero().squeeze(1)  # of the cluster's questions, of which each prefix has the first ones
        cost_C = cost_N[place_C]
        dearest_P1 = torch.searchsorted(cost_C, room_P1, right=True) - 1
        cost_P1 = cost_C[dearest_P1.clamp(min=0)]
        same_P1 = torch.searchsorted(cost_C, cost_P1).maximum(count_P1).clamp(max=len(cost_C) - 1)  # the first of equal costs
        value = value_P1 + cost_P1 + beta * _root_gain(count_P1)
        values.append(value.masked_fill(dearest_P1 < count_P1, -math.inf))
        places.append(place_C[same_P1])
    value_P1K, place_P1K = torch.stack(values, 1), torch.stack(places, 1)
    if value_P1K.max() <= value_P1[-1]:
        return picked_P
    best = [(float(cost_N[place_P1K[p, k]]), int(order_N[place_P1K[p, k]]), p, int(place_P1K[p, k]))
            for p, k in (value_P1K == value_P1K.max()).nonzero().tolist()]  # fmt: skip
    _, _, prefix, place = min(best)
    return torch.cat([picked_P[:prefix], torch.tensor([place])])


def _root_gain(count: Tensor) -> Tensor:
    """``sqrt(m + 1) - sqrt(m)``, without cancellation."""
    return 1 / ((count + 1).double().sqrt() + count.double().sqrt())
