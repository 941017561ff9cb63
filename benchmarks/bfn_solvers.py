"""Samplers of a Bayesian flow network at equal numbers of network calls.

``python -m benchmarks.bfn_solvers --data digits`` (or ``digits_k4``) trains the model of ``configs/bfn/<data>.yaml`` once per
seed; ``--data mnist`` and ``--data text`` take the shipped weights ``bfn-mnist`` and ``bfn-text`` and draw with three seeds of
noise. Every sampler draws the same sample ids (so the same noise) with 5 to 100 network calls. The result holds:

* images: the feature distance beside the real-data floor, at how many fewer calls the second-order ODE solver is as good as
  the ancestral sampler, and the share of the sampling time spent outside the network;
* text: the share of words that are spelled right, of words known from the training text, of distinct words and of
  duplicates, beside held-out text and a character 5-gram model of the same training text; and the bits per character that
  model and 5-gram model need for windows of held-out text.

Start and grid of the solvers are the configuration's; on the digits as continuous data the second-order solvers are also
measured with the published ones (eta 0.01, uniform grid).

Claim: Xue et al., ICML 2024 (arXiv 2404.15766), figures 3 and 4: 5 to 20 times fewer calls on CIFAR-10 and text8.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

import datamodules
import zoo
from benchmarks.character_ngram import CharacterNgram
from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from datamodules.text.letters import encode
from zoo.base.random import SampleRandom
from zoo.base.samples import as_sampled, to_uint8
from zoo.bfn import ODE2M
from zoo.cli.command import ZooCLI
from zoo.cli.configs import packaged_configs
from zoo.metrics import NUM_SAMPLES, feature_distances, real_data_floor
from zoo.metrics.mean_and_error import MeanAndError
from zoo.metrics.spelling import text_scores, vocabulary
from zoo.module import ZooModule

SAMPLERS = ("ancestral", "sde1", "sde_euler", "sde2m", "ode1", "ode_euler", "ode2m", "ode2s", "ode3m")
NFES = (5, 10, 20, 50, 100)
LEVELS = (20, 50)
"""Network calls of the ancestral sampler whose quality the second-order ODE solver has to reach with fewer; the bar is
set at the first."""
PUBLISHED_GRID = ("sde2m", "ode2m")
"""Second-order samplers that are measured with the published start and grid as well as with the configuration's."""
FLOOR = "real data (floor)"
HELD_OUT, NGRAM = "held-out text", "character 5-gram"
TEXT_FIGURES = ("spelling_accuracy", "vocabulary_accuracy", "distinct_words", "duplicates")
LIKELIHOOD_REPEATS = 8
"""Times and noises drawn for each window whose likelihood is bounded."""


@dataclass(frozen=True)
class Study:
    """What is measured for one kind of data.

    Attributes:
        config: Packaged configuration.
        count: Samples per sampler and number of calls.
        batch: Samples that are drawn at once; ``None``: all. Which they are does not depend on it, how long they take does:
            the features of few large images fit a CPU's cache.
        weights: Shipped weights; ``None``: trained anew for each seed.
        published: Whether the second-order samplers are also measured with the published start and grid.
        text: Whether the samples are texts.
        mixed: Whether the network runs in mixed precision, as ``zoo test`` runs the configuration.
        windows: Windows of held-out text whose bits per character are measured.
    """

    config: str
    count: int
    batch: int | None = None
    weights: str | None = None
    published: bool = False
    text: bool = False
    mixed: bool = False
    windows: int = 256


STUDIES = {
    "digits": Study("bfn/digits", NUM_SAMPLES, published=True),
    "digits_k4": Study("bfn/digits_k4", NUM_SAMPLES),
    "mnist": Study("bfn/mnist", 500, batch=50, weights="bfn-mnist"),
    "text": Study("bfn/text_small", 64, batch=16, weights="bfn-text", text=True, mixed=True),
}


@dataclass
class NetworkClock:
    """Seconds spent inside some networks.

    Attributes:
        seconds: Time inside, in seconds.
        calls: Number of calls.
    """

    seconds: float = 0.0
    calls: int = 0

    @contextmanager
    def watch(self, networks: Sequence[nn.Module]) -> Iterator[NetworkClock]:
        """Count every call of the networks while the context is open."""
        begin = 0.0

        def enter(*_: object) -> None:
            nonlocal begin
            begin = now()

        def leave(*_: object) -> None:
            self.seconds += now() - begin
            self.calls += 1

        handles = [network.register_forward_pre_hook(enter) for network in networks]
        handles += [network.register_forward_hook(leave) for network in networks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def now() -> float:
    """Seconds on a clock that the accelerator's queue cannot run ahead of."""
    if torch.cuda.is_initialized():  # whether a device is there would take long to find out, beside a step of a sampler
        torch.cuda.synchronize()
    return time.perf_counter()


def calls_at_distance(curve: dict[int, float], distance: float) -> float | None:
    """Network calls at which a sampler first comes as close as ``distance``, interpolated in the logarithms of both.

    Args:
        curve: Distance at each number of calls.
        distance: The distance to reach.

    Returns:
        The calls; the least of the curve if it begins closer than that (nothing is extrapolated); ``None`` if it never
        comes so close.

    Example:
        >>> round(calls_at_distance({5: 16.0, 10: 8.0, 20: 4.0}, 8.0), 6)
        10.0
    """
    calls = sorted(curve)
    if curve[calls[0]] <= distance:
        return float(calls[0])
    for few, many in itertools.pairwise(calls):
        if curve[many] <= distance:
            part = math.log(curve[few] / distance) / math.log(curve[few] / curve[many])
            return math.exp(math.log(few) + part * math.log(many / few))
    return None


def train(config: str, seed: int, folder: Path, options: Sequence[str]) -> tuple[ZooModule, LightningDataModule, int]:
    """Train the model of a packaged configuration as ``zoo fit`` does; returns model, data and applied steps."""
    cli = ZooCLI(["fit", "-c", config, "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), *options])
    return cli.model, cli.datamodule, cli.trainer.global_step


def data_of(config: str) -> Any:
    """The DataModule of a packaged configuration, ready for use."""
    section = yaml.safe_load(packaged_configs()[config].read_text())["data"]
    data = getattr(datamodules, section["class_path"])(**section.get("init_args", {}))
    data.prepare_data()
    data.setup("test")
    return data


class ImageScores:
    """Feature distance of images, at the grey levels that the model's samples have."""

    def __init__(self, model: Any, data: Any, count: int) -> None:
        self.reference, self.extractor, self.count = as_sampled(model, data.reference_images()), data.feature_extractor, count

    def __call__(self, samples: Sequence[Any]) -> dict[str, float]:
        """The figures of samples, given in batches."""
        images = to_uint8(torch.cat([batch.images for batch in samples]))
        return {"distance": feature_distances(images, self.reference, self.extractor, **self._subset).frechet_distance}

    def baselines(self, seed: int) -> dict[str, dict[str, float]]:
        """The figures of what samples are compared with."""
        floor = real_data_floor(self.reference, self.extractor, self.count, **self._subset)
        return {FLOOR: {"distance": floor.frechet_distance}}

    @property
    def _subset(self) -> dict[str, int]:
        """The one subset of the kernel distance, which is not wanted, but must fit the samples."""
        return {"kid_subsets": 1, "kid_subset_size": min(500, self.count)}


class TextScores:
    """Spelling and diversity of texts, and the bits per character of held-out windows."""

    def __init__(self, data: Any, count: int, windows: int) -> None:
        train_text, self.count = data.train_text(), count
        self.known_words, self.ngram = vocabulary(train_text), CharacterNgram(train_text)
        lines = data.reference_text()
        self.held_out, self.windows = (lines[:: max(1, len(lines) // number)][:number] for number in (count, windows))

    def __call__(self, samples: Sequence[Any]) -> dict[str, float]:
        """The figures of samples, given in batches."""
        return self._figures([text for batch in samples for text in batch.texts])

    def baselines(self, seed: int) -> dict[str, dict[str, float]]:
        """The figures of what samples are compared with."""
        ngram = self.ngram.sample(self.count, len(self.held_out[0]), seed)
        return {HELD_OUT: self._figures(self.held_out), NGRAM: self._figures(ngram)}

    def likelihoods(self, model: Any, seed: int, batch: int) -> dict[str, tuple[float, float]]:
        """Bits per character of the held-out windows, with standard error: the model's bound, and the 5-gram model's own."""
        ngram = torch.tensor([self.ngram.bits_per_character([window]) for window in self.windows])
        return {type(model).__name__: bits_per_character(model, self.windows, seed, batch), NGRAM: mean_and_error(ngram)}

    def _figures(self, lines: list[str]) -> dict[str, float]:
        scores = dataclasses.asdict(text_scores(lines, self.known_words))
        return {name: 100 * scores[name] for name in TEXT_FIGURES}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of values (N,), and its standard error."""
    metric = MeanAndError()
    metric.update(values)
    mean, error = metric.compute()
    return mean.item(), error.item()


@torch.inference_mode()
def bits_per_character(model: Any, lines: Sequence[str], seed: int, batch: int) -> tuple[float, float]:
    """Bound of a BFN on the likelihood of lines, in continuous time: bits per character, and standard error over the lines."""
    bounds = []
    for index_B in torch.arange(len(lines), device=model.device).split(batch):
        x = model.encode({"input_ids": torch.stack([encode(lines[index]) for index in index_B.tolist()])})
        draws = [SampleRandom(seed, index_B, epoch=repeat) for repeat in range(LIKELIHOOD_REPEATS)]
        bounds.append(torch.stack([model.loss(x, random) + model.reconstruction(x, random) for random in draws]).mean(0).cpu())
    return mean_and_error(torch.cat(bounds) * model.codec.units()["bits_per_char"])


@torch.inference_mode()
def draw(model: Any, index_N: Tensor, seed: int, sampler: str, nfe: int, batch: int) -> tuple[list[Any], dict[str, float]]:
    """Samples, batch by batch, and what they cost: calls for each, seconds for all, share of them outside the network."""
    with NetworkClock().watch(model.networks()) as clock:
        begin = now()
        samples = [model.sample(index_B, seed=seed, sampler=sampler, nfe=nfe) for index_B in index_N.split(batch)]
        seconds = now() - begin
    return samples, {"calls": samples[0].nfe, "seconds": seconds, "outside": 1 - clock.seconds / seconds}


def measure(record: Record, seed: int, model: Any, scores: ImageScores | TextScores, study: Study, nfes: Sequence[int]) -> None:
    """Add the rows of one seed."""
    index_N, batch = torch.arange(study.count, device=model.device), study.batch or study.count
    configured, published = model.solver, ODE2M(eta=0.01, grid="uniform")
    arms = [(sampler, sampler, configured) for sampler in SAMPLERS]
    if study.published:
        arms += [(f"{sampler}, published grid", sampler, published) for sampler in PUBLISHED_GRID]
    for arm, sampler, model.solver in arms:
        draw(model, index_N[:batch], seed, sampler, nfes[0], batch)  # the first call of each sampler pays for allocations
        for nfe in nfes:
            samples, cost = draw(model, index_N, seed, sampler, nfe, batch)
            if cost["calls"] != nfe:
                raise RuntimeError(f"{sampler} was asked for {nfe} network calls and made {cost['calls']}.")
            record.row(
                seed=seed, sampler=arm, nfe=nfe, **scores(samples),
                seconds=cost["seconds"], percent_outside_network=100 * cost["outside"],
            )  # fmt: skip
    for name, figures in scores.baselines(seed).items():
        for nfe in nfes:
            record.row(seed=seed, sampler=name, nfe=nfe, **figures)
    model.solver = configured
    if isinstance(scores, TextScores):
        for name, (bits, error) in scores.likelihoods(model, seed, batch).items():
            record.row(seed=seed, text_model=name, bits_per_character=bits, standard_error=error)


class Curves:
    """The figures of one seed's samplers, by the number of calls."""

    def __init__(self, record: Record, figure: str) -> None:
        self.record, self.figure = record, figure

    def __call__(self, seed: int, sampler: str) -> dict[int, float]:
        """Figure at each number of calls."""
        rows = [row for row in self.record.rows if row.get("seed") == seed and row.get("sampler") == sampler]
        return {int(row["nfe"]): float(row[self.figure]) for row in rows if row.get(self.figure) is not None}  # type: ignore[arg-type]


def judge_images(record: Record, seeds: Sequence[int]) -> None:
    """Work the bars of images out of the rows, and add a row of the calls at equal quality.

    Raises:
        ValueError: A sampler was not measured.
    """
    if missing := [sampler for sampler in SAMPLERS if not any(row.get("sampler") == sampler for row in record.rows)]:
        raise ValueError(f"The result has no row of {', '.join(missing)}: measure every sampler before judging.")
    curve = Curves(record, "distance")
    at_ten, at_five = [], []
    factors: dict[int, list[float]] = {level: [] for level in LEVELS}
    for seed in seeds:
        ancestral, ode2m, sde2m = (curve(seed, sampler) for sampler in ("ancestral", "ode2m", "sde2m"))
        at_ten.append(ode2m[10] / ancestral[10])
        at_five.append(min(ode2m[5], sde2m[5]) / ancestral[5])
        for level in LEVELS:
            if level in ancestral:
                calls = calls_at_distance(ode2m, ancestral[level])
                factors[level].append(level / calls if calls else 0.0)
                record.row(seed=seed, as_good_as=f"ancestral at {level}", calls_of_ode2m=calls, factor=factors[level][-1])
    at_bar = factors[LEVELS[0]]
    shares = {
        sampler: statistics.median(
            float(row["percent_outside_network"]) / 100  # type: ignore[arg-type]
            for row in record.rows
            if row.get("sampler") == sampler
        )
        for sampler in SAMPLERS
    }
    figures = {
        "ode2m_over_ancestral_at_10_nfe": statistics.median(at_ten),
        "second_order_over_ancestral_at_5_nfe": statistics.median(at_five),
        "fewer_calls_at_equal_quality": statistics.median(at_bar) if at_bar else None,
        "time_outside_network": max(shares.values()),
    }
    for bar in record.bars:  # the other figures are in the rows
        record.measure(bar, figures[bar])


def judge_texts(record: Record, seeds: Sequence[int], sampler: str, nfe: int) -> None:
    """Work the bar of text out of the rows: the model's own sampler against the 5-gram model."""
    curve = Curves(record, "spelling_accuracy")
    gaps = [curve(seed, sampler)[nfe] - curve(seed, NGRAM)[nfe] for seed in seeds]
    record.measure("spelling_above_5_gram", statistics.median(gaps))


def tables_of(study: Study) -> tuple[list[Table], list[Plot]]:
    """Tables and plots of a result."""
    if study.text:
        titles = {
            "spelling_accuracy": "Words spelled right (Hunspell en_US)",
            "vocabulary_accuracy": "Words that occur at least twice in the training text",
            "distinct_words": "Distinct words among all",
            "duplicates": "Lines that equal an earlier one",
        }
        tables = [
            Table(f"{title}, percent, by network calls, {study.count} samples", "sampler", [name], columns="nfe", digits=1)
            for name, title in titles.items()
        ]
        likelihood = f"Bits per character of {study.windows} held-out windows (BFN: bound in continuous time)"
        tables.append(Table(likelihood, "text_model", ["bits_per_character", "standard_error"], digits=3))
        return tables, [Plot("Percent of words spelled right by network calls", "nfe", "spelling_accuracy", "sampler", log="x",
                             reference=HELD_OUT)]  # fmt: skip
    return [
        Table(f"Feature distance by network calls, {study.count} samples", "sampler", ["distance"], columns="nfe"),
        Table(f"Network calls of ode2m at equal quality ({NFES[0]}: so many or fewer)", "as_good_as",
              ["calls_of_ode2m", "factor"], digits=1),
        Table(f"Percent of the time outside the network, {study.batch or study.count} at once", "sampler",
              ["percent_outside_network"], columns="nfe", digits=1),
    ], [Plot("Feature distance by network calls", "nfe", "distance", "sampler", log="xy", reference=FLOOR)]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bfn_solvers", description=__doc__)
    parser.add_argument("--data", choices=sorted(STUDIES), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the result is not kept")
    options = parser.parse_args(arguments)
    study, seeds, nfes, short = STUDIES[options.data], options.seeds, NFES, []
    if options.smoke:
        study = dataclasses.replace(study, count=8 if study.text else 100 if study.weights is None else 10, windows=8)
        seeds, nfes, short = seeds[:1], NFES[:2], ["--trainer.max_steps", "20", "--trainer.limit_val_batches", "0"]
    tables, plots = tables_of(study)
    if study.weights is None:
        tables.append(Table("Training", "seed", ["steps", "training_seconds"], digits=0))
    record = Record(f"bfn_solvers_{options.data}", seeds=seeds, smoke=options.smoke, tables=tables, plots=plots)
    for seed in seeds:
        data: Any
        if study.weights is not None:
            model, data = zoo.load(study.weights), data_of(study.config)
        else:
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                model, data, steps = train(study.config, seed, Path(folder), short)
                record.row(seed=seed, steps=steps, training_seconds=time.perf_counter() - begin)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        scores = TextScores(data, study.count, study.windows) if study.text else ImageScores(model, data, study.count)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=study.mixed):
            measure(record, seed, model, scores, study, nfes)
    if study.text:
        solver: Any = model.solver
        judge_texts(record, seeds, type(solver).names[0], solver.nfe if solver.nfe in nfes else nfes[-1])
    else:
        judge_images(record, seeds)
    return record.save()


if __name__ == "__main__":
    main()
