"""The benchmark of the BFN solvers: equal-quality calls, time inside the network, likelihoods, and runs from end to end."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.bfn_solvers import (
    FLOOR,
    LIKELIHOOD_REPEATS,
    PUBLISHED_GRID,
    SAMPLERS,
    STUDIES,
    NetworkClock,
    bits_per_character,
    calls_at_distance,
    judge_images,
    main,
)
from benchmarks.record import Record
from zoo.bfn import BFN, CategoricalHead, DiscreteFlow, Network, TextCodec


@given(power=st.floats(0.2, 3.0), scale=st.floats(0.1, 1000.0), calls=st.floats(5.0, 100.0))
def test_interpolation_is_exact_for_a_power_law(power: float, scale: float, calls: float) -> None:
    curve = {nfe: scale * nfe**-power for nfe in (5, 10, 20, 50, 100)}
    assert calls_at_distance(curve, scale * calls**-power) == pytest.approx(calls, rel=1e-9)


def test_nothing_is_extrapolated() -> None:
    curve = {5: 8.0, 10: 4.0, 20: 2.0}
    assert calls_at_distance(curve, 100.0) == 5.0
    assert calls_at_distance(curve, 1.0) is None


def test_first_crossing_counts_where_a_curve_is_not_monotone() -> None:
    assert calls_at_distance({5: 8.0, 10: 2.0, 20: 4.0, 50: 1.0}, 2.0) == pytest.approx(10.0)


def test_clock_counts_the_time_inside_the_network_only(monkeypatch: pytest.MonkeyPatch) -> None:
    instant = 0.0

    class Busy(nn.Module):
        def forward(self, seconds: float) -> float:
            nonlocal instant
            instant += seconds
            return seconds

    monkeypatch.setattr("benchmarks.bfn_solvers.now", lambda: instant)
    network, outside = Busy(), Busy()
    with NetworkClock().watch([network]) as clock:
        network(2.0)
        outside(10.0)
        network(3.0)
    network(10.0)
    assert (clock.calls, clock.seconds) == (2, 5.0)


@pytest.mark.slow
@pytest.mark.parametrize("data", [name for name, study in STUDIES.items() if not study.text])
def test_smoke_run_measures_every_sampler_and_keeps_no_result(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # restored afterwards: seed_everything sets them for the whole process
    path = main(["--data", data, "--smoke"])
    assert path == Path(f"runs/benchmarks/bfn_solvers_{data}.json")
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row.get("distance") is not None]
    arms = [*SAMPLERS, *(f"{sampler}, published grid" for sampler in PUBLISHED_GRID if STUDIES[data].published)]
    assert {row["sampler"] for row in rows} == {*arms, FLOOR}
    assert len(rows) == 2 * len(arms) + 2
    if data != "digits_k4":  # few discrete samples of hardly trained weights can be the same by several samplers
        assert len({row["distance"] for row in rows}) == 2 * len(arms) + 1
    unmeasured = ["fewer_calls_at_equal_quality"] if data == "digits" else []
    assert [bar["name"] for bar in result["bars"] if bar["value"] is None] == unmeasured
    assert torch.get_default_dtype() == torch.float32


def test_a_sampler_without_a_row_is_an_error() -> None:
    record = Record("bfn_solvers_mnist", seeds=[0])
    for sampler in SAMPLERS[1:]:
        record.row(seed=0, sampler=sampler, nfe=10, distance=1.0, percent_outside_network=1.0)
    with pytest.raises(ValueError, match="no row of ancestral"):
        judge_images(record, [0])


class Uniform(Network):
    """Holds all characters equally likely."""

    def forward(self, state: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(state)


def test_bits_per_character_of_a_network_that_knows_nothing() -> None:
    """K beta(1) t (1 - 1 / K) nats at time t, and ln K for the reconstruction."""
    model = BFN(Uniform(), flow=DiscreteFlow(27, 0.75), head=CategoricalHead(), codec=TextCodec(8)).eval()
    lines = [word.ljust(8) for word in ("we", "few", "happy") for _ in range(100)]
    bits, error = bits_per_character(model, lines, seed=0, batch=64)
    at_one = 0.75**2 * 26 / math.log(2)
    assert error == pytest.approx(at_one / math.sqrt(12 * LIKELIHOOD_REPEATS * len(lines)), rel=0.2)
    assert abs(bits - (at_one / 2 + math.log2(27))) < 4 * error
    assert bits_per_character(model, lines, seed=0, batch=7) == pytest.approx((bits, error), rel=1e-6)
