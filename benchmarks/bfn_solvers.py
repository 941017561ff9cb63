"""Samplers of a Bayesian flow network at equal numbers of network calls.

``python -m benchmarks.bfn_solvers --data digits`` trains the model of ``configs/bfn/digits.yaml`` once per seed and draws
the same 2000 sample ids (so the same noise) with every sampler at 5 to 100 network calls. It reports the feature distance
beside the real-data floor, at how many fewer calls the second-order ODE solver is as good as the ancestral sampler, and
the share of the sampling time spent outside the network. Start and grid of the solvers are the configuration's; the
second-order ones are also measured with the published ones (eta 0.01, uniform grid).

Claim: Xue et al., ICML 2024 (arXiv 2404.15766), figure 3: 5 to 20 times fewer calls on CIFAR-10.
"""

from __future__ import annotations

import argparse
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
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from benchmarks.plots import Plot
from benchmarks.record import Record
from benchmarks.tables import Table
from zoo.bfn import ODE2M
from zoo.cli import ZooCLI
from zoo.metrics import NUM_SAMPLES, feature_distances, real_data_floor
from zoo.module import ZooModule
from zoo.sampling import to_uint8

CONFIGS = {"digits": "bfn/digits"}
SAMPLERS = ("ancestral", "sde1", "sde_euler", "sde2m", "ode1", "ode_euler", "ode2m")
NFES = (5, 10, 20, 50, 100)
LEVELS = (20, 50)
"""Network calls of the ancestral sampler whose quality the second-order ODE solver has to reach with fewer; the bar is
set at the first."""
PUBLISHED_GRID = ("sde2m", "ode2m")
"""Second-order samplers that are measured with the published start and grid as well as with the configuration's."""
FLOOR = "real data (floor)"


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
    if torch.cuda.is_available():
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


@torch.inference_mode()
def draw(model: Any, index_N: Tensor, seed: int, sampler: str, nfe: int) -> tuple[Tensor, dict[str, float]]:
    """Samples (N, C, H, W) as uint8, and what they cost: calls, seconds, share of them outside the network."""
    with NetworkClock().watch(model.networks()) as clock:
        begin = now()
        samples = model.sample(index_N, seed=seed, sampler=sampler, nfe=nfe)
        seconds = now() - begin
    return to_uint8(samples.images), {
        "calls": samples.nfe,
        "seconds": seconds,
        "outside": 1 - clock.seconds / seconds,
    }


def measure(record: Record, seed: int, model: Any, reference: Tensor, extractor: str, count: int, nfes: Sequence[int]) -> None:
    """Add the rows of one trained model."""
    index_N = torch.arange(count, device=model.device)
    configured, published = model.solver, ODE2M(eta=0.01, grid="uniform")
    arms = [(sampler, sampler, configured) for sampler in SAMPLERS]
    arms += [(f"{sampler}, published grid", sampler, published) for sampler in PUBLISHED_GRID]
    for arm, sampler, model.solver in arms:
        draw(model, index_N, seed, sampler, nfes[0])  # the first call of each sampler pays for allocations
        for nfe in nfes:
            images, cost = draw(model, index_N, seed, sampler, nfe)
            if cost["calls"] != nfe:
                raise RuntimeError(f"{sampler} was asked for {nfe} network calls and made {cost['calls']}.")
            distance = feature_distances(images, reference, extractor, kid_subsets=1).frechet_distance
            record.row(
                seed=seed, sampler=arm, nfe=nfe, distance=distance,
                seconds=cost["seconds"], percent_outside_network=100 * cost["outside"],
            )  # fmt: skip
    floor = real_data_floor(reference, extractor, count, kid_subsets=1).frechet_distance
    for nfe in nfes:
        record.row(seed=seed, sampler=FLOOR, nfe=nfe, distance=floor)
    model.solver = configured


def judge(record: Record, seeds: Sequence[int]) -> None:
    """Work the bars out of the rows, and add a row of the calls at equal quality."""

    def curve(seed: int, sampler: str) -> dict[int, float]:
        rows = [row for row in record.rows if row.get("seed") == seed and row.get("sampler") == sampler]
        return {int(row["nfe"]): float(row["distance"]) for row in rows if row.get("distance") is not None}  # type: ignore[arg-type]

    ratios, factors = [], {level: [] for level in LEVELS}  # type: ignore[var-annotated]
    for seed in seeds:
        ancestral, ode2m = curve(seed, "ancestral"), curve(seed, "ode2m")
        ratios.append(ode2m[10] / ancestral[10])
        for level in LEVELS:
            if level in ancestral:
                calls = calls_at_distance(ode2m, ancestral[level])
                factors[level].append(level / calls if calls else 0.0)
                record.row(seed=seed, as_good_as=f"ancestral at {level}", calls_of_ode2m=calls, factor=factors[level][-1])
    record.measure("ode2m_over_ancestral_at_10_nfe", statistics.median(ratios))
    at_bar = factors[LEVELS[0]]
    record.measure("fewer_calls_at_equal_quality", statistics.median(at_bar) if at_bar else None)
    shares = {
        sampler: statistics.median(
            float(row["percent_outside_network"]) / 100  # type: ignore[arg-type]
            for row in record.rows
            if row.get("sampler") == sampler
        )
        for sampler in SAMPLERS
    }
    record.measure("time_outside_network", max(shares.values()))


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bfn_solvers", description=__doc__)
    parser.add_argument("--data", choices=sorted(CONFIGS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the result is not kept")
    options = parser.parse_args(arguments)
    seeds = options.seeds[:1] if options.smoke else options.seeds
    nfes, count = ((5, 10), 500) if options.smoke else (NFES, NUM_SAMPLES)
    short = ["--trainer.max_steps", "20", "--trainer.limit_val_batches", "0"] if options.smoke else []
    record = Record(
        f"bfn_solvers_{options.data}",
        seeds=seeds,
        smoke=options.smoke,
        tables=[
            Table(f"Feature distance by network calls, {count} samples", "sampler", ["distance"], columns="nfe"),
            Table(f"Network calls of ode2m at equal quality ({nfes[0]}: so many or fewer)", "as_good_as",
                  ["calls_of_ode2m", "factor"], digits=1),
            Table(f"Percent of the time outside the network, {count} at once", "sampler", ["percent_outside_network"],
                  columns="nfe", digits=1),
            Table("Training", "seed", ["steps", "training_seconds"], digits=0),
        ],
        plots=[
            Plot("Feature distance by network calls", "nfe", "distance", "sampler", log="xy", reference=FLOOR),
        ],
    )  # fmt: skip
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            model, data, steps = train(CONFIGS[options.data], seed, Path(folder), short)
            record.row(seed=seed, steps=steps, training_seconds=time.perf_counter() - begin)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        reference, extractor = data.reference_images(), data.feature_extractor  # type: ignore[attr-defined]
        measure(record, seed, model, reference, extractor, count, nfes)
    judge(record, seeds)
    return record.save()


if __name__ == "__main__":
    main()
