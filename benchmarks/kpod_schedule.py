"""The curriculum's selection against enumeration, and schedules of a data set of GSM8K's size.

``python -m benchmarks.kpod_schedule`` draws 1,500 selection problems of at most ten questions (log-normal costs, up to three
clusters, weight of diversity 0 or log-uniform to 12, any budget), of which the best set is found by enumeration, and compares
greedy selection with and without augmentation to it. Then it solves schedules for 7,473 questions of two kinds. *Synthetic* ones,
which the bars are about, have 1 + Poisson(2.6) steps, 3.6 on average, of log-normal difficulties of about one nat, and belong to
one of five clusters at random. Those of *GSM-Symbolic*, evenly spaced among those of at most 512 ids, have up to 18 steps, as
difficult as the shipped student finds them, and are clustered by that student's embedding. The time of a stage is that of the
whole schedule, with its start, divided by the number of stages.

Claim: arXiv 2405.16064, section 3.4, whose solver guarantees nearly half of the best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules import Rationales
from zoo import load
from zoo.kpod.clusters import kmeans
from zoo.kpod.difficulty import Difficulties, step_difficulties
from zoo.kpod.schedule import ProgressiveSchedule, select

PROBLEMS, LARGEST = 500, 10
QUESTIONS, CLUSTERS, REPEATS = 7473, 5, 5
SETTINGS = [(10, 1), (10, 2), (4, 1), (4, 2)]
STUDENT = "kpod-gsm-symbolic"
SYNTHETIC, REAL = "synthetic", "GSM-Symbolic"
GREEDY, AUGMENTED = "greedy", "Greedy+"


def draw_problem(generator: torch.Generator) -> tuple[Tensor, Tensor, float, float]:
    """Costs, clusters, budget and weight of diversity."""
    n, clusters = (int(torch.randint(1, most + 1, (), generator=generator)) for most in (LARGEST, 3))
    cost_N = (1.5 * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
    label_N = torch.randint(clusters, (n,), generator=generator)
    share, power, has_beta = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return cost_N, label_N, share * float(cost_N.sum()), 0.01 * 1200**power if has_beta > 0.25 else 0.0


def worth(member_QN: Tensor, cost_N: Tensor, label_N: Tensor, beta: float) -> Tensor:
    """``sum delta + beta sum_k sqrt(|C_k & S|)`` (Q,) of sets, one row each."""
    return member_QN @ cost_N + beta * (member_QN @ F.one_hot(label_N).double()).sqrt().sum(1)


def over_best(problem: tuple[Tensor, Tensor, float, float], augment: bool) -> float:
    """Worth of the selected set over that of the best one; 1 if nothing fits."""
    cost_N, label_N, budget, beta = problem
    n = len(cost_N)
    member_QN = ((torch.arange(2**n)[:, None] >> torch.arange(n)) % 2).double()
    best = worth(member_QN[member_QN @ cost_N <= budget], cost_N, label_N, beta).max()
    chosen_1N = torch.zeros(1, n, dtype=torch.float64).index_fill(1, select(*problem, augment=augment), 1.0)
    return float(worth(chosen_1N, cost_N, label_N, beta) / best) if best > 0 else 1.0


def draw_questions(count: int, seed: int) -> tuple[Difficulties, Tensor]:
    """Synthetic difficulties of the steps of questions, and their clusters."""
    generator = torch.Generator().manual_seed(seed)
    steps_N = 1 + torch.poisson(torch.full((count,), 2.6), generator=generator).long()
    values_M = (0.6 * torch.randn(int(steps_N.sum()), generator=generator, dtype=torch.float64) - 0.2).exp()
    return Difficulties(F.pad(steps_N.cumsum(0), (1, 0)), values_M), torch.randint(CLUSTERS, (count,), generator=generator)


@torch.no_grad()
def read_questions(count: int) -> tuple[Difficulties, Tensor]:
    """Difficulties of the steps of real rationales, by the shipped student, and vectors (N, D) of their questions."""
    student = load(STUDENT).eval()
    data = Rationales(tokenizer=STUDENT, val_fraction=0.0, num_train=count, max_length=512, too_long="skip", batch_size=64)
    data.setup("fit")
    rows: dict[int, Tensor] = {}
    vectors: dict[int, Tensor] = {}
    for batch in data.ordered_train_dataloader():
        losses_BS = F.pad(student.token_losses(batch).loss_BT, (1, 0))
        asked_BS1 = ((batch["labels"] < 0) & (batch["attention_mask"] > 0))[..., None]
        vector_BD = (student.backbone.input_embedding(batch["input_ids"]) * asked_BS1).sum(1) / asked_BS1.sum(1)
        indices = batch["index"].tolist()
        rows |= zip(indices, step_difficulties(losses_BS, batch["step_ids"]), strict=True)
        vectors |= zip(indices, vector_BD, strict=True)
    order = sorted(rows)
    return Difficulties.of_rows([rows[index] for index in order]), torch.stack([vectors[index] for index in order])


def measure_selection(record: Record, seeds: Sequence[int], problems: int) -> None:
    """Add the rows and bars of the comparison with enumeration."""
    ratios: dict[str, list[float]] = {GREEDY: [], AUGMENTED: []}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = [draw_problem(generator) for _ in range(problems)]
        for solver, found in ratios.items():
            now = [over_best(problem, augment=solver == AUGMENTED) for problem in drawn]
            found += now
            record.row(solver=solver, seed=seed, problems=problems, worst=min(now), mean=statistics.mean(now),
                       best_found=sum(ratio > 1 - 1e-9 for ratio in now) / problems)  # fmt: skip
    record.measure("worst_over_best", min(ratios[AUGMENTED]))
    record.measure("mean_over_best", statistics.mean(ratios[AUGMENTED]))
    record.measure("worst_without_augmentation", min(ratios[GREEDY]))


def measure_schedules(record: Record, seeds: Sequence[int], questions: int) -> None:
    """Add the rows and bars of whole schedules."""
    real, vectors_ND = read_questions(questions)
    seconds: list[float] = []
    gaps: list[float] = []
    for kind, seed in product((SYNTHETIC, REAL), seeds):
        data = draw_questions(questions, seed) if kind == SYNTHETIC else (real, kmeans(vectors_ND, CLUSTERS, seed))
        for stages, delta_s in SETTINGS:
            planner, taken = ProgressiveSchedule(stages, delta_s=delta_s), []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                schedule = planner.plan(*data)
                taken.append((time.perf_counter() - begin) / stages)
            gap_T1 = (schedule.budget - schedule.reached) / schedule.total
            if kind == SYNTHETIC:
                seconds.append(statistics.median(taken))
                gaps.append(float(gap_T1[:-1].max()))
            setting = f"T {stages}, delta_s {delta_s}"
            record.row(setting=f"{kind}, {setting}", seed=seed, ms_per_stage=1000 * statistics.median(taken),
                       gap_before_T_ppm=1e6 * float(gap_T1[:-1].max()), gap_at_T=float(gap_T1[-1]),
                       steps_left=schedule.steps_left, questions_left=int((schedule.given[-1] > 0).sum()))  # fmt: skip
            if delta_s == 1:
                for t, given_N in enumerate(schedule.given):
                    record.row(
                        mean_c_of=f"{kind}, {setting}", seed=seed, stage_over_T=t / stages, mean_c=float(given_N.double().mean())
                    )
                    for curve, values in (("D, budget", schedule.budget), (f"H, {kind}, {setting}", schedule.reached)):
                        record.row(curve=curve, seed=seed, stage_over_T=t / stages, share_of_B=float(values[t] / schedule.total))
        counts, edges = torch.histogram(data[0].values, bins=40, range=(0.0, 4.0))
        for count, edge in zip(counts.tolist(), edges.tolist(), strict=False):
            record.row(difficulties=kind, seed=seed, nats=round(edge + 0.05, 3), steps=count)
    record.measure("seconds_per_stage", max(seconds))
    record.measure("gap_before_last_stage", max(gaps))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kpod_schedule", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--smoke", action="store_true", help="few problems and questions; the result is not kept")
    options = parser.parse_args(arguments)
    seeds, problems, questions = ([0], 30, 200) if options.smoke else (list(range(options.seeds)), PROBLEMS, QUESTIONS)
    tables = [
        Table(f"Selected over best set, {problems} problems of at most {LARGEST} questions a seed", "solver",
              ["worst", "mean", "best_found"], digits=3),
        Table(f"Schedules of {questions:,} questions; gap: (D - H) / B, before stage T in millionths; left: after stage T",
              "setting", ["ms_per_stage", "gap_before_T_ppm", "gap_at_T", "steps_left", "questions_left"], digits=3),
    ]  # fmt: skip
    x = "stage_over_T"
    plots = [
        Plot("Budget D and reached H", x, "share_of_B", "curve", reference="D, budget"),
        Plot("Mean number of given steps", x, "mean_c", "mean_c_of"),
        Plot("Difficulties of steps", "nats", "steps", "difficulties"),
    ]
    record = Record("kpod_schedule", seeds=seeds, smoke=options.smoke, tables=tables, plots=plots)
    measure_selection(record, seeds, problems)
    measure_schedules(record, seeds, questions)
    return record.save()


if __name__ == "__main__":
    main()
