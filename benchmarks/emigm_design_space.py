"""The design space of masked image generation in small: schedule, weight, encoder, truncation, guidance, head.

``python -m benchmarks.emigm_design_space`` trains the model of ``configs/emigm/digits.yaml`` and its variants, each for the same
number of steps and once per seed, and draws the same sample numbers from each:

* eMIGM, and one switch at a time away from it;
* MaskGIT- and MAR-like models, all with the diffusion head;
* a *fair* masked diffusion model (MDM: linear schedule, weight 1/t, a time for each sample, the sum over all tokens, a single
  encoder): its learning rate is the best of a sweep on the first seed, which goes on while the best lies at its end, and its
  samples are drawn by the better of eMIGM's schedule and its own. eMIGM keeps the rate of its configuration, whatever its own
  sweep, which is printed too, says.

Each row has the feature distance beside the real-data floor, the share of samples in which the shipped classifier sees the class
asked for, the transformer evaluations that an image really cost, and seconds. The trained eMIGM is then sampled with other
numbers of steps, schedules, guidance windows and head samplers. A token counts as diverged if it is not finite or lies beyond
6 standard deviations of the data. The DDPM head is measured as published, at a lower temperature, and with clipped data
estimates, which are ours. The bar holds the DPM-Solver against the published one, which diverges at this size of model; how it
compares with each of the others is a table of its own.

``--jobs N`` trains N models at once, each in a process of one thread. With ``--folder`` a killed benchmark goes on where it
was, and the weights of the eMIGM models stay there; each row names the commit that trained its model, since the certificate names
only the one that put the rows together. ``--digits-only`` times ``zoo fit -c configs/emigm/digits.yaml`` instead and
judges its samples. ``--data fashion_mnist`` is meant for a GPU.

Claim: You et al., ICML 2025 (arXiv 2503.07197), figures 2, 3, 7 and 8 and table 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import zoo
from benchmarks.bfn_solvers import data_of, now, train
from benchmarks.plots import Plot
from benchmarks.record import ROOT, Record, commit
from benchmarks.tables import Table
from zoo.base.checkpoint import is_pretrained_folder
from zoo.base.random import SampleRandom
from zoo.base.samples import as_sampled, to_uint8
from zoo.cli.configs import find_config
from zoo.emigm import EMIGM, Guidance, MaskSampler, sample_tokens
from zoo.emigm.patches import unpatchify
from zoo.metrics import NUM_SAMPLES, classifier_agreement, feature_distances, real_data_floor
from zoo.module import ZooModule

RECIPE, MDM = "eMIGM", "MDM, fair"
FLOOR = "real data (floor)"
ITERATIONS = (4, 8, 16)
AT = 8
"""Mask-prediction steps at which the bars are set."""
SCALE = 3.0
WINDOWS = {
    "none": Guidance(scale=1.0),
    "late (0.1, 0.3]": Guidance(SCALE, 0.1, 0.3),
    "half (0, 0.5]": Guidance(SCALE, 0.0, 0.5),
    "full (0, 1]": Guidance(SCALE, 0.0, 1.0),
}
NONE, LATE, _, FULL = WINDOWS
SCHEDULES = ("linear", "cosine", "exp", "log")
DPM_8, DDPM_100 = "DPM-Solver, 8 steps", "DDPM, 100 steps"
HEADS: dict[str, dict[str, Any]] = {
    DPM_8: {},
    "DPM-Solver, 14 steps": {"head_steps": 14},
    DDPM_100: {"head": "ddpm", "head_steps": 100},
    "DDPM, 100 steps, temperature 0.95": {"head": "ddpm", "head_steps": 100, "temperature": 0.95},
    "DDPM, 100 steps, clipped": {"head": "ddpm", "head_steps": 100, "head_clip": 3.0},
    "DDPM, 100 steps, clipped, temperature 0.95": {"head": "ddpm", "head_steps": 100, "temperature": 0.95, "head_clip": 3.0},
}
FAR = 6.0
"""Standard deviations beyond which a token has diverged."""
OWN = f"K = {AT}, own schedule"


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        switches: Arguments of the module that differ from the configuration's.
        own: Arguments of the sampler that go with this way to train, where they differ from eMIGM's.
    """

    switches: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    RECIPE: Variant(),
    "cosine schedule": Variant({"masking.schedule": "cosine"}, {"schedule": "cosine"}),
    "linear schedule": Variant({"masking.schedule": "linear"}, {"schedule": "linear"}),
    "poly-0.5 schedule": Variant({"masking.schedule": "poly-0.5"}, {"schedule": "poly-0.5"}),
    "log schedule": Variant({"masking.schedule": "log"}, {"schedule": "log"}),
    "no MAE": Variant({"use_mae": False}),
    "t_min 0": Variant({"masking.t_min": 0.0}),
    "t_min resampled": Variant({"masking.truncation": "resample"}),
    "fake token": Variant({"cfg_with_mask": False}),
    "ELBO weight": Variant({"weighting": "elbo"}),
    "MaskGIT-like": Variant(
        {
            "masking.schedule": "cosine",
            "masking.law": "fixed_count",
            "masking.t_min": 0.0,
            "use_mae": False,
            "cfg_with_mask": False,
        },
        {"schedule": "cosine"},
    ),
    "MAR-like": Variant({"masking.law": "mar_truncnorm", "cfg_with_mask": False}, {"count_law": "mar"}),
    MDM: Variant(
        {
            "masking.schedule": "linear",
            "masking.t_min": 0.0,
            "masking.time": "sample",
            "weighting": "elbo",
            "reduction": "sum_over_N",
            "use_mae": False,
        },
        {"schedule": "linear"},
    ),
    "MDM with weight 1": Variant(
        {
            "masking.schedule": "linear",
            "masking.t_min": 0.0,
            "masking.time": "sample",
            "reduction": "sum_over_N",
            "use_mae": False,
        },
        {"schedule": "linear"},
    ),
}


@dataclass(frozen=True)
class Study:
    """What is measured for one kind of data.

    Attributes:
        name: Name of the result.
        config: Packaged configuration.
        variants: Names of the variants.
        factors: Learning rates of the sweeps, over that of the configuration.
        further: How many rates a sweep may add beyond its ends, while the best lies there.
        count: Samples of each row.
        options: Further options of ``zoo fit``.
    """

    name: str
    config: str
    variants: tuple[str, ...] = tuple(VARIANTS)
    count: int = NUM_SAMPLES
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    further: int = 4
    options: tuple[str, ...] = ("--trainer.limit_val_batches=0",)

    @property
    def rate(self) -> float:
        """Learning rate of the configuration."""
        model = yaml.safe_load(find_config(self.config).read_text())["model"]
        return float(model["init_args"]["optimizer"]["init_args"]["lr"])

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of the sweeps."""
        return tuple(factor * self.rate for factor in self.factors)


STUDIES = {
    "digits": Study("emigm_design_space", "emigm/digits"),
    "fashion_mnist": Study("emigm_design_space_fashion_mnist", "emigm/fashion_mnist"),
}


@dataclass(frozen=True)
class Run:
    """One training: variant, learning rate and seed."""

    variant: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.rate:g}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """The run as a file name."""
        words = "".join(letter if letter.isalnum() else "_" for letter in self.variant)
        return f"{words}-{self.rate:g}-{self.seed}"


@dataclass(frozen=True)
class Judge:
    """The figures of a set of samples.

    Attributes:
        reference: Real images, uint8.
        extractor: Feature extractor, which is also the classifier.
        count: Number of samples.
    """

    reference: Tensor
    extractor: str
    count: int

    def __call__(self, images: Tensor, label_N: Tensor | None) -> dict[str, float | None]:
        """Feature distance and class accuracy of images in [0, 1]."""
        pixels = to_uint8(images).cpu()
        labels = None if label_N is None else label_N.cpu()
        return {
            "distance": feature_distances(pixels, self.reference, self.extractor, **self._subset).frechet_distance,
            "class_accuracy": classifier_agreement(pixels, self.extractor, labels).accuracy,
        }

    def floor(self) -> float:
        """Feature distance of real images from real images."""
        return real_data_floor(self.reference, self.extractor, self.count, **self._subset).frechet_distance

    @property
    def _subset(self) -> dict[str, int]:
        """The one subset of the kernel distance, which is not wanted, but must fit the samples."""
        return {"kid_subsets": 1, "kid_subset_size": min(500, self.count)}


@dataclass(frozen=True)
class Drawing:
    """Samples and what they cost.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        labels: Classes asked for (N,), or None.
        nfe: Transformer evaluations of an image, on average.
        diverged: Share of samples with a token that is not finite or beyond `FAR`.
        seconds: Time for all.
    """

    images: Tensor
    labels: Tensor | None
    nfe: float
    diverged: float
    seconds: float


@torch.inference_mode()
def draw(model: EMIGM, sampler: MaskSampler, count: int, seed: int) -> Drawing:
    """The samples 0 ... count - 1, as ``model.sample`` draws them, but with a look at their tokens."""
    index_N = torch.arange(count, device=model.device)
    network = model.network.eval()
    begin = now()
    tokens, calls = [], 0
    for block, index_B in enumerate(index_N.split(sampler.count_block)):
        counts = SampleRandom(seed, torch.tensor([block]))
        drawn = sample_tokens(network, sampler, SampleRandom(seed, index_B), counts, model.sample_labels(index_B))
        tokens.append(drawn.tokens)
        calls += drawn.nfe * len(index_B)
    x_NTC = torch.cat(tokens)
    images = model.codec.decode(unpatchify(x_NTC.nan_to_num(), model.codec.latent_shape, model.patch_size)).float()
    seconds = now() - begin
    return Drawing(images, model.sample_labels(index_N), calls / count, diverged_share(x_NTC), seconds)


def diverged_share(x_NTC: Tensor) -> float:
    """Share of samples, of normalised tokens (N, T, C), in which one is not finite or lies beyond `FAR`.

    >>> diverged_share(torch.tensor([[[0.0, -2.0]], [[7.0, 0.0]], [[float("nan"), 0.0]], [[-6.0, 6.0]]]))
    0.5
    """
    near_N = (x_NTC.abs() <= FAR).flatten(1).all(1)  # false where not a number
    return 1 - near_N.double().mean().item()


def arms_of(variant: Variant, sweep: bool) -> Iterator[tuple[str, str, MaskSampler]]:
    """What is drawn from a trained model: table, line and sampler.

    Args:
        variant: How it was trained.
        sweep: Whether to draw in all the ways that are compared on one model.
    """
    unguided = WINDOWS[NONE]
    for steps in ITERATIONS:
        yield "setting", f"K = {steps}", MaskSampler(steps, guidance=unguided)
    yield "setting", f"K = {AT}, late guidance", MaskSampler(AT, guidance=WINDOWS[LATE])
    if variant.own:
        yield "setting", OWN, MaskSampler(AT, guidance=unguided, **variant.own)
    if not sweep:
        return
    for name, steps in itertools.product(SCHEDULES, ITERATIONS):
        yield "schedule", name, MaskSampler(steps, schedule=name, guidance=unguided)  # type: ignore[arg-type]
    for (name, window), steps in itertools.product(WINDOWS.items(), ITERATIONS):
        yield "guidance", name, MaskSampler(steps, guidance=window)
    for name, options in HEADS.items():
        yield "head", name, MaskSampler(AT, guidance=unguided, **options)


def settings_of(run: Run, study: Study, sweep: bool) -> dict[str, Any]:
    """All that the figures of a run depend on, apart from the code."""
    return {
        "run": dataclasses.asdict(run),
        "switches": VARIANTS[run.variant].switches,
        "options": list(study.options),
        "config": hashlib.sha256(find_config(study.config).read_bytes()).hexdigest(),
        "count": study.count,
        "sweep": sweep,
    }


def earlier(run: Run, study: Study, folder: Path, sweep: bool) -> dict[str, Any] | None:
    """What an earlier attempt with the same settings has left in the folder."""
    path = folder / f"{run.file_name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("settings") == settings_of(run, study, sweep) else None


def measure_run(run: Run, study: Study, folder: Path, sweep: bool) -> dict[str, Any]:
    """Train and sample, unless an earlier attempt has.

    Args:
        run: What is trained.
        study: On what.
        folder: Where the figures are kept.
        sweep: Whether to draw in all the ways that are compared on one model, and to keep the weights.
    """
    if (found := earlier(run, study, folder, sweep)) is not None:
        return found
    variant, path = VARIANTS[run.variant], folder / f"{run.file_name}.json"
    switches = [f"--model.init_args.{name}={value}" for name, value in variant.switches.items()]
    options = [*switches, *study.options, f"--model.init_args.optimizer.init_args.lr={run.rate}", "--trainer.logger=false",
               "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
               "--trainer.enable_model_summary=false"]  # fmt: skip
    with tempfile.TemporaryDirectory() as room:
        begin = time.perf_counter()
        trained, data, steps = train(study.config, run.seed, Path(room), options)
        seconds = time.perf_counter() - begin
    model: Any = trained.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    judge = judge_of(model, data, study.count)
    draw(model, MaskSampler(2), min(64, study.count), run.seed)  # the first samples pay for allocations
    rows = []
    for table, name, sampler in arms_of(variant, sweep):
        drawing = draw(model, sampler, study.count, run.seed)
        rows.append(
            {
                "table": table,
                "arm": name,
                "iterations": sampler.num_iter,
                "planned_nfe": sampler.nfe,
                "nfe": drawing.nfe,
                **judge(drawing.images, drawing.labels),
                "sampling_seconds": drawing.seconds,
                "diverged_percent": 100 * drawing.diverged,
            }
        )
    if sweep:
        model.save_pretrained(folder / run.file_name)
    found = {
        "settings": settings_of(run, study, sweep),
        "commit": commit_name(),
        "steps": steps,
        "training_seconds": seconds,
        "floor": judge.floor(),
        "rows": rows,
    }
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(path)
    return found


def commit_name() -> str:
    """The commit that runs, and whether it is changed."""
    found = commit()
    return f"{str(found['id'] or 'none')[:10]}{' with local changes' if found['dirty'] else ''}"


def judge_of(model: Any, data: Any, count: int) -> Judge:
    """Judge of a model's samples."""
    return Judge(as_sampled(model, data.reference_images()), data.feature_extractor, count)


def is_recipe(run: Run, study: Study) -> bool:
    """Whether a run trains eMIGM as the configuration says."""
    return run.variant == RECIPE and run.rate == study.rate


def row_of(found: Mapping[str, Any], table: str, arm: str, iterations: int = AT) -> dict[str, Any]:
    """The figures of one way to draw.

    Raises:
        KeyError: It was not measured.
    """
    for row in found["rows"]:
        if (row["table"], row["arm"], row["iterations"]) == (table, arm, iterations):
            return row
    raise KeyError(f"{table}: {arm}, K = {iterations}")


def distance_of(found: Mapping[str, Any]) -> float:
    """Unguided feature distance at `AT` steps, by the better of eMIGM's schedule and the variant's own."""
    return min(row["distance"] for row in found["rows"] if row["table"] == "setting" and row["arm"] in (f"K = {AT}", OWN))


class Bench:
    """Trains what a study needs, some models at once.

    Args:
        study: What is measured.
        folder: Where figures and weights are kept.
        words: This command's options, for child processes.
        jobs: Child processes of one thread each; with 1 everything happens in this process.
    """

    def __init__(self, study: Study, folder: Path, words: Sequence[str], jobs: int) -> None:
        self.study, self.folder, self.words, self.jobs = study, folder, list(words), jobs
        self.found: dict[Run, dict[str, Any]] = {}
        self.rates = {variant: list(study.rates) for variant in (MDM, RECIPE)}
        self.total = 0

    def run(self, runs: Sequence[Run]) -> None:
        """Train and sample all of these, and say how it goes."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.found]
        if self.jobs == 1:
            for run in missing:
                self._keep(run, self._one(run))
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = {pool.submit(self._one, run): run for run in missing}
            try:
                for done in as_completed(waiting):
                    self._keep(waiting[done], done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep(self, run: Run, found: dict[str, Any]) -> None:
        self.found[run] = found
        print(f"[{len(self.found)}/{self.total}] {run}: distance {distance_of(found):.2f},"
              f" trained in {found['training_seconds']:.0f} s", flush=True)  # fmt: skip

    def _one(self, run: Run) -> dict[str, Any]:
        sweep = is_recipe(run, self.study)
        if self.jobs > 1 and earlier(run, self.study, self.folder, sweep) is None:
            child = [sys.executable, "-m", "benchmarks.emigm_design_space", *self.words, "--folder", str(self.folder)]
            child += ["--child", run.variant, str(run.rate), str(run.seed)]
            log = self.folder / f"{run.file_name}.log"
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            with log.open("w") as file:
                done = subprocess.run(child, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RuntimeError(f"{run} failed with status {done.returncode}:\n{log.read_text()[-3000:]}")
        return measure_run(run, self.study, self.folder, sweep)

    def all(self, seeds: Sequence[int]) -> float:
        """Everything; returns the learning rate of the masked diffusion model."""
        study, first = self.study, seeds[0]
        own = [Run(variant, study.rate, seed) for variant in study.variants if variant != MDM for seed in seeds]
        sweeps = [Run(variant, rate, first) for variant in self.rates for rate in study.rates]
        self.total = len({*own, *sweeps}) + len(seeds) - 1
        self.run([*own[: len(seeds)], *sweeps, *own])
        while further := self.beyond(first):
            self.total += len(further)
            self.run(further)
        best = self.best(MDM, first)
        self.run([Run(MDM, best, seed) for seed in seeds])
        return best

    def best(self, variant: str, seed: int) -> float:
        """The learning rate with the least distance."""
        return min(self.rates[variant], key=lambda rate: distance_of(self.found[Run(variant, rate, seed)]))

    def beyond(self, seed: int) -> list[Run]:
        """A step further for each sweep whose best learning rate is its least or its greatest."""
        runs = []
        for variant, rates in self.rates.items():
            best = self.best(variant, seed)
            factor = 2.0 if best == max(rates) else 0.5 if best == min(rates) else None
            if factor is not None and len(rates) < len(self.study.rates) + self.study.further:
                rates.append(float(f"{factor * best:g}"))
                runs.append(Run(variant, rates[-1], seed))
        return runs


def tell(record: Record, bench: Bench, seeds: Sequence[int], best: float) -> None:
    """Add the rows: the variants, the learning rates, and the ways to draw from eMIGM."""
    study, found = bench.study, bench.found
    rates = {variant: best if variant == MDM else study.rate for variant in study.variants}
    for seed in seeds:
        for variant, rate in rates.items():
            result = found[Run(variant, rate, seed)]
            own = variant == MDM and row_of(result, "setting", OWN)["distance"] == distance_of(result)
            row = row_of(result, "setting", OWN if own else f"K = {AT}")
            record.row(seed=seed, variant=variant, learning_rate=f"{rate:g}", **figures(row), steps=result["steps"],
                       training_seconds=result["training_seconds"], trained_by=result.get("commit", "not recorded"))  # fmt: skip
            for row in result["rows"]:
                cells = figures(row)
                if row["table"] == "setting":
                    if row["arm"] in {f"K = {steps}" for steps in ITERATIONS}:
                        cells["mask_steps"] = row["iterations"]
                    record.row(seed=seed, trained_as=variant, setting=row["arm"], **cells)
                elif row["table"] == "guidance":
                    record.row(seed=seed, guidance=row["arm"], iterations=f"K = {row['iterations']}",
                               planned_nfe=row["planned_nfe"], **cells)  # fmt: skip
                else:
                    record.row(seed=seed, **{row["table"]: row["arm"]}, iterations=f"K = {row['iterations']}", **cells)
    for variant, swept in bench.rates.items():
        for rate in sorted(swept):
            result = found[Run(variant, rate, seeds[0])]
            record.row(seed=seeds[0], swept=variant, rate=f"{rate:g}", distance=distance_of(result))
    floor = found[Run(RECIPE, study.rate, seeds[0])]["floor"]
    record.row(variant=FLOOR, distance=floor)
    for steps in ITERATIONS:
        record.row(trained_as=FLOOR, setting=f"K = {steps}", mask_steps=steps, distance=floor)
        record.row(guidance=FLOOR, iterations=f"K = {steps}", planned_nfe=steps, distance=floor)


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """What every row of the result has."""
    names = ("distance", "class_accuracy", "nfe", "sampling_seconds", "diverged_percent")
    return {name: row[name] for name in names}


def judge_design(record: Record, seeds: Sequence[int]) -> None:
    """Work the bars out of the rows: medians over the seeds of ratios within a seed.

    Raises:
        ValueError: A row is missing.
    """

    def figure(name: str, seed: int, **keys: str) -> float:
        wanted = {"seed": seed, **keys}.items()
        for row in record.rows:
            if wanted <= row.items() and row.get(name) is not None:
                return float(row[name])  # type: ignore[arg-type]
        raise ValueError(f"The result has no {name} of {keys}, seed {seed}: measure everything before judging.")

    ratios: dict[str, list[float]] = {}
    for seed in seeds:
        at, ddpm = f"K = {AT}", [head for head in HEADS if head.startswith("DDPM")]
        late = {name: figure(name, seed, guidance=LATE, iterations=at) for name in ("distance", "nfe")}
        full = {name: figure(name, seed, guidance=FULL, iterations=at) for name in ("distance", "nfe")}
        mdm = min(figure("distance", seed, trained_as=MDM, setting=setting) for setting in (at, OWN))
        dpm = figure("distance", seed, head=DPM_8)
        dpm_over = {head: dpm / figure("distance", seed, head=head) for head in ddpm}
        values = {
            "fair_mdm_over_emigm": mdm / figure("distance", seed, trained_as=RECIPE, setting=at),
            "late_guidance_over_full_distance": late["distance"] / full["distance"],
            "late_guidance_over_full_nfe": late["nfe"] / full["nfe"],
            "dpm_8_over_ddpm_100": dpm_over[DDPM_100],
        }
        for head, ratio in dpm_over.items():
            record.row(seed=seed, against=head, dpm_8_over_it=ratio)
        for name, value in values.items():
            ratios.setdefault(name, []).append(value)
    for bar in record.bars:
        record.measure(bar, statistics.median(ratios[bar]))


def tables_of(study: Study) -> tuple[list[Table], list[Plot]]:
    """Tables and plots of the result."""
    samples = f"{study.count} samples"
    costs = ["distance", "class_accuracy", "nfe", "sampling_seconds"]
    tables = [
        Table(f"Ways to train, K = {AT} without guidance, {samples}", "variant",
              [*costs, "training_seconds", "steps", "learning_rate", "trained_by"]),
        Table("Feature distance by setting of the sampler", "trained_as", ["distance"], columns="setting"),
        Table("Class accuracy by setting of the sampler", "trained_as", ["class_accuracy"], columns="setting", digits=3),
        Table(f"Feature distance by learning rate, K = {AT} without guidance, one seed", "swept", ["distance"], columns="rate"),
        Table("eMIGM: feature distance by schedule of sampling", "schedule", ["distance"], columns="iterations"),
        Table(f"eMIGM: feature distance by guidance, scale {SCALE:g}", "guidance", ["distance"], columns="iterations"),
        Table("eMIGM: class accuracy by guidance", "guidance", ["class_accuracy"], columns="iterations", digits=3),
        Table("eMIGM: transformer evaluations by guidance", "guidance", ["nfe"], columns="iterations", digits=1),
        Table(f"eMIGM: samplers of the head, K = {AT} without guidance", "head", [*costs, "diverged_percent"]),
        Table("eMIGM: feature distance of the DPM-Solver head with 8 steps over that of", "against", ["dpm_8_over_it"]),
    ]  # fmt: skip
    return tables, [
        Plot("Feature distance by mask-prediction steps, without guidance", "mask_steps", "distance", "trained_as", log="xy",
             reference=FLOOR),
        Plot("eMIGM: feature distance by transformer evaluations", "planned_nfe", "distance", "guidance", log="xy",
             reference=FLOOR),
    ]  # fmt: skip


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """The folder, made if need be, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as room:
            yield Path(room)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()


def read_model(path: Path) -> EMIGM:
    """A trained model: a folder of weights or a ``.ckpt`` file, whose average it takes.

    Raises:
        TypeError: It is no eMIGM.
    """
    model = zoo.load(path) if is_pretrained_folder(path) else ZooModule.load_from_checkpoint(path)
    if not isinstance(model, EMIGM):
        raise TypeError(f"{path.name} holds a {type(model).__name__}, not an EMIGM.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def fit(folder: Path, seed: int, options: Sequence[str] = ()) -> tuple[Path, float]:
    """Type ``zoo fit -c configs/emigm/digits.yaml``; returns the checkpoint and the minutes from start to end."""
    words = [sys.executable, "-m", "zoo", "fit", "-c", "configs/emigm/digits.yaml", "--seed_everything", str(seed),
             "--trainer.default_root_dir", str(folder), *options]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"zoo fit failed with status {done.returncode}:\n{done.stdout[-3000:]}")
    return folder / "checkpoints" / "last.ckpt", (time.perf_counter() - begin) / 60


def digits_only(seeds: Sequence[int], smoke: bool, checkpoint: Path | None, folder: Path | None) -> Path:
    """Record how long the digits take, and whether the samples show the classes asked for; returns the result's path."""
    few, many = 100, 200 if smoke else NUM_SAMPLES
    minutes: list[float] = []
    tables = [
        Table("zoo fit -c configs/emigm/digits.yaml", "command", ["minutes"]),
        Table("Its samples, as zoo predict draws them", "samples",
              ["class_agreement", "distance", "nfe", "sampling_seconds"], digits=3),
    ]  # fmt: skip
    record = Record("emigm_digits", seeds=seeds if checkpoint is None else seeds[:1], smoke=smoke, tables=tables)
    data, agreements = data_of("emigm/digits"), []
    with kept(folder) as room:
        for seed in record.seeds:
            path = checkpoint
            if path is None:
                path, taken = fit(room / f"digits-{seed}", seed, ["--trainer.max_steps=20"] if smoke else [])
                minutes.append(taken)
                record.row(seed=seed, command="zoo fit", minutes=taken)
                print(f"seed {seed}: zoo fit took {taken:.2f} minutes", flush=True)
            model = read_model(path)
            for count in (few, many):
                drawing, judge = draw(model, model.sampler, count, seed), judge_of(model, data, count)
                seen = judge(drawing.images, drawing.labels)
                if count == few:
                    agreements.append(seen["class_accuracy"])
                record.row(seed=seed, samples=f"{count}", class_agreement=seen["class_accuracy"], nfe=drawing.nfe,
                           sampling_seconds=drawing.seconds, distance=seen["distance"] if count == many else None)  # fmt: skip
        record.row(samples=FLOOR, distance=judge.floor())
    if minutes:
        record.measure("fit_minutes", statistics.median(minutes))
    record.measure("class_agreement", statistics.median(agreement for agreement in agreements if agreement is not None))
    return record.save()


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emigm_design_space", description=__doc__)
    parser.add_argument("--data", choices=sorted(STUDIES), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of every variant; default: the configuration's")
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at once, each by a process of one thread")
    parser.add_argument("--folder", type=Path, help="keep figures and weights here, and go on from what is here")
    parser.add_argument("--digits-only", action="store_true", help="time zoo fit on the digits and judge its samples")
    parser.add_argument("--checkpoint", type=Path, help="with --digits-only: weights to judge instead of training")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the result is not kept")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.digits_only:
        return digits_only(options.seeds, options.smoke, options.checkpoint, options.folder)
    study, seeds = STUDIES[options.data], options.seeds
    steps, words = options.steps, ["--data", options.data]
    if options.smoke:
        study = dataclasses.replace(
            study,
            count=100,
            variants=(RECIPE, MDM),
            further=0,
            factors=(1.0, 2.0),
        )
        seeds, steps = seeds[:1], steps or 20
        words.append("--smoke")
    if steps is not None:
        study = dataclasses.replace(study, options=(*study.options, f"--trainer.max_steps={steps}"))
        words += ["--steps", str(steps)]
    with kept(options.folder) as folder:
        if options.child:
            variant, rate, seed = options.child
            run = Run(variant, float(rate), int(seed))
            measure_run(run, study, folder, is_recipe(run, study))
            return folder
        tables, plots = tables_of(study)
        record = Record(study.name, seeds=seeds, smoke=options.smoke, tables=tables, plots=plots)
        bench = Bench(study, folder, words, options.jobs)
        best = bench.all(seeds)
        tell(record, bench, seeds, best)
    judge_design(record, seeds)
    return record.save()


if __name__ == "__main__":
    main()
