"""Ranking metrics by counting against torchmetrics' retrieval metrics and a top-k evaluation as RecBole does it.

``python -m benchmarks.ranking`` runs on one thread of a CPU: Recall, hit rate (with one target a user the same), NDCG and MRR
at 1, 5, 10 and 20 of 2,048 users with one target and 20 seen items each, vectors of width 384.

- Given scores: 20 users, for torchmetrics sorts every list. Its classes run in a ``MetricCollection``, which shares their states.
- The whole evaluation, product of users and items included: ours ranks by chunks of 4,096 items and 256 users. *Top-k as
  RecBole 1.2.1 does it* is our own writing of its steps, not RecBole: scores of a batch of 4,096 users and all items, seen ones
  set to ``-inf``, ``topk``, a matrix of hits of the same size, metrics of the gathered hits (without its loops over users, which
  favours it).
- Peak memory beyond vectors and program, in a process of its own, with 4,096 users and 50,000 items.

Vectors have whole numbers from -128 to 127, so that all products are exact in float32 and targets can be chosen whose score no
other item has: ranks then have one right answer, a count over the matrix of scores.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.functional import retrieval as functional
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.metrics import ItemTable, RankingMetrics, target_ranks

KS = (1, 5, 10, 20)
USERS, WIDTH, SEEN, FEW = 2048, 384, 20, 20
SIZES = (2_000, 50_000)
RECBOLE_BATCH, BATCH = 4096, 256
CLASSES = {"Recall": RetrievalRecall, "HitRate": RetrievalHitRate, "NDCG": RetrievalNormalizedDCG, "MRR": RetrievalMRR}
FUNCTIONS = {
    "Recall": functional.retrieval_recall,
    "HitRate": functional.retrieval_hit_rate,
    "NDCG": functional.retrieval_normalized_dcg,
    "MRR": functional.retrieval_reciprocal_rank,
}
OURS, TOP_K, TOP_K_SMALL = "ours", "top-k as RecBole 1.2.1 does it", f"top-k as RecBole does it, batches of {BATCH}"
OURS_LARGE = f"ours, batches of {RECBOLE_BATCH}"

Means = dict[str, float]


class Problem(NamedTuple):
    """Users, items, one target each without ties, seen items, and the true ranks."""

    users_BD: Tensor
    items_ID: Tensor
    target_B: Tensor
    seen_BS: Tensor
    rank_B: Tensor


def draw_vectors(count: int, random: torch.Generator) -> Tensor:
    """Vectors (count, D) of whole numbers, whose products float32 holds exactly."""
    return torch.randint(-128, 128, (count, WIDTH), generator=random).float()


def draw(users: int, items: int, seed: int) -> Problem:
    """Draw a problem: the target of every other user is among her best 8 items, that of the rest is any item."""
    random = torch.Generator().manual_seed(seed)
    users_BD, items_ID = draw_vectors(users, random), draw_vectors(items, random)
    seen_BS = torch.randint(items, (users, SEEN), generator=random)
    seen_BS[:, -1] = seen_BS[:, 0]
    targets, ranks = [], []
    for vectors_bD, seen_bS in zip(users_BD.split(BATCH), seen_BS.split(BATCH), strict=True):
        scores_bI = vectors_bD @ items_ID.T
        drawn_bN = torch.randint(items, (len(seen_bS), 8), generator=random)
        drawn_bN[::2] = scores_bI[::2].topk(8).indices[:, torch.randperm(8, generator=random)]
        score_bN = scores_bI.gather(1, drawn_bN)
        alone_bN = torch.stack([(scores_bI == score_b1).sum(1) for score_b1 in score_bN.split(1, 1)], 1) == 1
        first_b1 = alone_bN.int().argmax(1, keepdim=True)
        if not alone_bN.gather(1, first_b1).all():
            raise RuntimeError("a user has no item without ties: nothing is compared.")
        target_b1 = drawn_bN.gather(1, first_b1)
        seen_bS.masked_fill_(seen_bS == target_b1, -1)
        row_N, place_N = (seen_bS >= 0).nonzero(as_tuple=True)
        target_score_b1 = scores_bI.gather(1, target_b1)
        scores_bI[row_N, seen_bS[row_N, place_N]] = -torch.inf
        targets.append(target_b1[:, 0])
        ranks.append(1 + (scores_bI > target_score_b1).sum(1))
    return Problem(users_BD, items_ID, torch.cat(targets), seen_BS, torch.cat(ranks))


def means_of_ranks(rank_B: Tensor) -> Means:
    """Our metrics: means over users."""
    metric = RankingMetrics(KS)
    metric.update(rank_B, torch.zeros_like(rank_B, dtype=torch.long))
    means = {name.removeprefix("full-domain/"): value.item() for name, value in metric.compute().items() if name.count("/") == 1}
    return means | {f"HitRate@{k}": means[f"Recall@{k}"] for k in KS}


def ours(problem: Problem, batch: int = BATCH) -> tuple[Means, Tensor]:
    """Ranking by chunks: means and ranks."""
    table = ItemTable(problem.items_ID, batch_size=batch)
    rank_B = table.ranks(problem.users_BD, problem.target_B, seen_BS=problem.seen_BS)
    return means_of_ranks(rank_B), rank_B


def top_k(problem: Problem, batch: int = RECBOLE_BATCH) -> tuple[Means, Tensor]:
    """Evaluation by the k best items of whole rows of scores: means, and ranks, 0 beyond the k best."""
    hits = []
    for user_b in torch.arange(len(problem.users_BD)).split(batch):
        scores_bI = problem.users_BD[user_b] @ problem.items_ID.T
        row_N, place_N = (problem.seen_BS[user_b] >= 0).nonzero(as_tuple=True)
        scores_bI[row_N, problem.seen_BS[user_b][row_N, place_N]] = -torch.inf
        best_bK = scores_bI.topk(max(KS)).indices
        relevant_bI = torch.zeros_like(scores_bI, dtype=torch.int)
        relevant_bI[torch.arange(len(user_b)), problem.target_B[user_b]] = 1
        hits.append(torch.cat([relevant_bI.gather(1, best_bK), relevant_bI.sum(1, keepdim=True)], 1))
    hit_BK, relevant_B1 = torch.cat(hits).double().split([max(KS), 1], 1)
    place_K = torch.arange(1, max(KS) + 1)
    discount_K = 1 / (place_K + 1.0).double().log2()
    curves = {
        "Recall": hit_BK.cumsum(1) / relevant_B1,
        "HitRate": (hit_BK.cumsum(1) > 0).double(),
        "NDCG": (hit_BK * discount_K).cumsum(1) / discount_K[0],
        "MRR": (hit_BK / place_K).cummax(1).values,
    }
    means = {f"{metric}@{k}": curve_BK[:, k - 1].mean().item() for metric, curve_BK in curves.items() for k in KS}
    return means, (hit_BK * place_K).sum(1)


def given_ours(scores_BI: Tensor, target_B: Tensor) -> Means:
    """Our metrics of given scores."""
    target_B1 = target_B[:, None]
    return means_of_ranks(target_ranks(scores_BI.gather(1, target_B1)[:, 0], scores_BI.scatter(1, target_B1, -torch.inf)))


def given_classes(scores_BI: Tensor, target_B: Tensor) -> Means:
    """torchmetrics' classes on given scores."""
    collection = MetricCollection({f"{name}@{k}": metric(top_k=k) for name, metric in CLASSES.items() for k in KS})
    index_BI = torch.arange(len(scores_BI))[:, None].expand_as(scores_BI)
    relevant_BI = F.one_hot(target_B, scores_BI.shape[1])
    collection.update(scores_BI.flatten(), relevant_BI.flatten(), indexes=index_BI.flatten())
    return {name: value.item() for name, value in collection.compute().items()}


def given_functional(scores_BI: Tensor, target_B: Tensor) -> Means:
    """torchmetrics' functions on given scores, one user after another."""
    pairs = list(zip(scores_BI, F.one_hot(target_B, scores_BI.shape[1]), strict=True))
    return {
        f"{name}@{k}": torch.stack([function(scores_I, relevant_I, top_k=k) for scores_I, relevant_I in pairs]).mean().item()
        for name, function in FUNCTIONS.items()
        for k in KS
    }


GIVEN = {OURS: given_ours, "torchmetrics' classes": given_classes, "torchmetrics' functions": given_functional}
WHOLE = {OURS: ours, TOP_K: top_k, TOP_K_SMALL: partial(top_k, batch=BATCH)}
MEMORY = {OURS: ours, TOP_K: top_k, OURS_LARGE: partial(ours, batch=RECBOLE_BATCH), TOP_K_SMALL: partial(top_k, batch=BATCH)}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    gc.collect()
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def check_equal(arm: str, found: Means, expected: Means) -> None:
    """Refuse to compare times of figures that differ."""
    apart = max(abs(found[name] - value) for name, value in expected.items())
    if found.keys() != expected.keys() or apart > 1e-5:
        raise RuntimeError(f"{arm}: the metrics differ by {apart:.1g}: nothing is compared.")


def measure_given(record: Record, seeds: Sequence[int], items: int) -> None:
    """Add rows and bars of metrics of given scores."""
    ratios: dict[str, list[float]] = {arm: [] for arm in GIVEN}
    for seed in seeds:
        problem = draw(FEW, items, seed)
        scores_BI = problem.users_BD @ problem.items_ID.T
        expected = given_ours(scores_BI, problem.target_B)
        seconds = {}
        for arm, call in GIVEN.items():
            seconds[arm], found = timed(partial(call, scores_BI, problem.target_B))
            check_equal(arm, found, expected)
        for arm, taken in seconds.items():
            ratios[arm].append(taken / seconds[OURS])
            record.row(given=arm, seed=seed, items=items, ms_per_user=1000 * taken / FEW, times_ours=ratios[arm][-1])
    record.measure("over_torchmetrics_classes", statistics.median(ratios["torchmetrics' classes"]))
    record.measure("over_torchmetrics_functional", statistics.median(ratios["torchmetrics' functions"]))


def measure_whole(record: Record, seeds: Sequence[int], users: int, sizes: Sequence[int]) -> None:
    """Add rows and bars of whole evaluations."""
    wrong = 0
    for items in sizes:
        ratios = []
        repeats = max(1, 10_000 // items)
        for seed in seeds:
            problem = draw(users, items, seed)
            seconds: dict[str, list[float]] = {arm: [] for arm in WHOLE}
            expected, rank_B = ours(problem)
            wrong += int((rank_B != problem.rank_B).sum())
            for repeat in range(repeats):
                for arm in list(WHOLE) if (seed + repeat) % 2 else list(reversed(WHOLE)):
                    taken, (found, found_B) = timed(partial(WHOLE[arm], problem))
                    check_equal(arm, found, expected)
                    seconds[arm].append(taken)
                    if arm == TOP_K and repeat == 0:
                        wrong += int((found_B != rank_B.where(rank_B <= max(KS), 0)).sum())
            for arm, times in seconds.items():
                record.row(arm=arm, seed=seed, items=items, seconds=statistics.median(times))
            ratios += [own / theirs for own, theirs in zip(seconds[OURS], seconds[TOP_K], strict=True)]
            small = [own / theirs for own, theirs in zip(seconds[OURS], seconds[TOP_K_SMALL], strict=True)]
            record.row(ratio_items=items, seed=seed, ours_over_top_k=statistics.median(ratios[-repeats:]),
                       ours_over_top_k_equal_batches=statistics.median(small))  # fmt: skip
        if f"time_over_top_k_{items}_items" in record.bars:
            record.measure(f"time_over_top_k_{items}_items", statistics.median(ratios))
    record.measure("ranks_that_differ", wrong)


def _status(name: str) -> float:
    """A size of this process, MiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024


def _peaks(queue: Any, users: int, items: int) -> None:
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    seen_BS, target_B = torch.randint(items, (users, SEEN), generator=random), torch.randint(items, (users,), generator=random)
    whole = Problem(draw_vectors(users, random), draw_vectors(items, random), target_B, seen_BS, target_B)
    few_B, few_BS = target_B[:64] % 300, seen_BS[:64] % 300
    few = Problem(whole.users_BD[:64], whole.items_ID[:300], few_B, few_BS, few_B)
    for arm, call in MEMORY.items():
        call(few)  # code and buffers of the libraries
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be used again, and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        call(whole)
        queue.put((arm, _status("VmHWM") - before))


def peaks_mib(users: int, items: int) -> dict[str, float]:
    """Largest resident memory of evaluations beyond what a process of their own held before, MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peaks, args=(queue, users, items))
    process.start()
    peaks = dict(queue.get(timeout=300) for _ in MEMORY)
    process.join()
    return peaks


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--smoke", action="store_true", help="few users and items; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = [0] if options.smoke else list(range(options.seeds))
    users, sizes = (64, (300, 2_000)) if options.smoke else (USERS, SIZES)
    memory_users, memory_items = (512, 5_000) if options.smoke else (RECBOLE_BATCH, SIZES[-1])
    torch.set_num_threads(1)
    tables = [
        Table(f"Metrics of given scores, {FEW} users, {sizes[-1]:,} items, 1 thread", "given", ["ms_per_user", "times_ours"]),
        Table(f"Whole evaluation of {users:,} users by number of items, seconds, 1 thread", "arm", ["seconds"], "items", 3),
        Table("Time of ours over that of top-k, medians of pairs", "ratio_items",
              ["ours_over_top_k", "ours_over_top_k_equal_batches"]),
        Table(f"Peak memory beyond vectors and program, {memory_users:,} users, {memory_items:,} items", "memory",
              ["mib"], digits=1),
    ]  # fmt: skip
    plots = [Plot(f"Whole evaluation of {users:,} users", "items", "seconds", "arm", log="xy")]
    record = Record("ranking", seeds=seeds, smoke=options.smoke, tables=tables, plots=plots)
    measure_given(record, seeds, sizes[-1])
    measure_whole(record, seeds, users, sizes)
    peaks = peaks_mib(memory_users, memory_items)
    for arm, peak in peaks.items():
        record.row(memory=arm, mib=peak)
    record.measure("memory_over_top_k_50000_items", peaks[OURS] / peaks[TOP_K])
    return record.save()


if __name__ == "__main__":
    main()
