"""The mathematics of EDiT's penalty and outer step, and the rules of when replicas meet, without processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed import HashStore

from strategies.edit.blocks import REST, split_blocks
from strategies.edit.penalty import Detectors, Outer, Penalty, clip_factor, replica_weights
from strategies.edit.round_clock import RoundClock

NORMS = st.lists(st.floats(0, 1e6), min_size=1, max_size=6)


@given(NORMS, st.floats(0.1, 100))
def test_weights_are_the_softmax_of_minus_the_norms(norms: list[float], temperature: float) -> None:
    weights = replica_weights(norms, [False] * len(norms), [1] * len(norms), Penalty(temperature=temperature))
    expected = torch.softmax(-torch.tensor(norms, dtype=torch.float64) / temperature, 0)
    assert weights == pytest.approx(expected.tolist(), abs=1e-12)


@given(st.floats(0, 1e6), st.integers(1, 8))
def test_identical_replicas_weigh_the_same(norm: float, count: int) -> None:
    assert replica_weights([norm] * count, [False] * count, [3] * count, Penalty()) == [1 / count] * count


def test_a_replica_that_went_far_weighs_nothing() -> None:
    weights = replica_weights([1.0, 1.0, 1e6], [False] * 3, [1] * 3, Penalty())
    assert weights == [0.5, 0.5, 0.0]


def test_the_anomalous_weigh_nothing_and_all_anomalous_make_no_step() -> None:
    steps, nan = [4, 4, 4], math.nan
    assert replica_weights([1.0, nan, 1.0], [False, True, False], steps, Penalty()) == [0.5, 0.0, 0.5]
    # Equal weights: what the anomalous one would have had pulls towards the anchor.
    assert replica_weights([1.0, nan, 1.0], [False, True, False], steps, Penalty(weighted=False)) == [1 / 3, 0.0, 1 / 3]
    assert replica_weights([nan, nan], [True, True], steps[:2], Penalty()) is None


def test_step_weights_mix_in_the_share_of_steps() -> None:
    weights = replica_weights([2.0, 2.0], [False, False], [30, 10], Penalty(step_weight=0.5))
    assert weights == [0.5 * 0.5 + 0.5 * 0.75, 0.5 * 0.5 + 0.5 * 0.25]
    assert replica_weights([2.0, 9.0], [False, False], [30, 10], Penalty(step_weight=1.0)) == [0.75, 0.25]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outer_step_is_that_of_torch(momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    anchor = torch.randn(5, dtype=torch.float64)
    theirs = nn.Parameter(anchor.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=momentum, nesterov=nesterov and momentum > 0)
    buffer = torch.zeros_like(anchor) if momentum else None
    for _ in range(4):
        gradient = torch.randn(5, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimizer.step()
        Outer(0.7, momentum, nesterov).step(anchor, buffer, gradient)
        torch.testing.assert_close(anchor, theirs.detach(), rtol=1e-14, atol=1e-14)


@given(st.floats(0, 1e4), st.floats(0.1, 100))
def test_clipped_norm_is_within_the_limit_and_short_ones_stay(norm: float, clip: float) -> None:
    factor = clip_factor(torch.tensor(norm, dtype=torch.float64), clip).item()
    assert factor * norm <= clip
    assert factor == 1.0 or norm + 1e-6 > clip


@pytest.mark.parametrize("update", ["exclude", "include"])
def test_detectors_find_the_jump_of_one_replica(update: str) -> None:
    penalty = Penalty(ewma_alpha=0.1, ewma_warmup=5, detector_update=update)  # type: ignore[arg-type]
    detectors = Detectors(penalty, num_replicas=2, num_units=1)
    for step in range(20):
        assert detectors.judge([[1 + 0.01 * (step % 3)], [2.0 + 0.01 * (step % 2)]]) == [[False], [False]]
    assert detectors.judge([[1.0], [50.0]]) == [[False], [True]]
    assert detectors.judge([[math.nan], [math.inf]]) == [[True], [True]]
    # A lasting jump is accepted in time only if the detector learns of it.
    flags = [detectors.judge([[1.0], [50.0]])[1][0] for _ in range(60)]
    assert all(flags) == (update == "exclude")
    assert not Detectors(Penalty(skip_anomaly=False, ewma_warmup=1), 1, 1).judge([[1e9]])[0][0]


def test_detectors_round_trip_and_refuse_other_shapes() -> None:
    penalty = Penalty(ewma_alpha=0.2, ewma_warmup=3)
    one, other = Detectors(penalty, 2, 3), Detectors(penalty, 2, 3)
    for step in range(6):
        one.judge([[1.0 + step % 2, 2.0, 3.0], [1.0, 2.0 + step % 3, 3.0]])
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    with pytest.raises(ValueError, match=r"\(2, 3\) detectors \(replicas, units\), this run has \(3, 3\)"):
        Detectors(penalty, 3, 3).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"clip": -1.0}, "clip=-1.0 must be positive"),
        ({"step_weight": 1.5}, "step_weight=1.5 must lie"),
        ({"granularity": "layer"}, "granularity='layer' must be one of block, parameter, global"),
        ({"ewma_alpha": 0.0}, "alpha=0.0 must lie"),
    ],
)
def test_wrong_penalties_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Penalty(**wrong)  # type: ignore[arg-type]
    for options in ({"lr": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="EDiT: outer_"):
            Outer(**options)


# Blocks


class Tied(nn.Module):
    """An embedding that is the head too, two blocks that share a bias, experts inside of a block, frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])}) for _ in range(2)])
        self.layers[1]["experts"][0].bias = self.layers[0]["experts"][0].bias
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names(network: nn.Module) -> dict[str, list[str]]:
    return {block.name: [name for name, _ in block.parameters] for block in split_blocks(network)}


def test_blocks_hold_each_trained_parameter_once_and_shared_ones_come_first() -> None:
    assert names(Tied()) == {
        REST: ["embedding.weight", "layers.0.experts.0.bias"],
        "layers.0": ["layers.0.experts.0.weight"],
        "layers.1": ["layers.1.experts.0.weight"],
    }
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {REST: ["0.weight", "0.bias", "1.weight", "1.bias"]}


def test_a_module_may_say_what_its_blocks_are() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def sync_blocks(self) -> list[nn.Module]:
            return [self.second, self.first]

    assert list(names(nn.Sequential(Own()))) == ["0.second", "0.first"]
    Own.sync_blocks = lambda self: [self, self.first]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="first lies inside"):
        split_blocks(Own())
    Own.sync_blocks = lambda self: [nn.Linear(1, 1)]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="names a Linear that is not a part of it"):
        split_blocks(Own())


def test_blocks_in_compiled_code_are_marked() -> None:
    network = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)]))
    network[0][0].compile()
    assert [block.compiled for block in split_blocks(network)] == [True, False]


# Rounds of A-EDiT


def test_a_round_ends_by_the_clock_of_one_replica_and_all_learn_it_after_their_step() -> None:
    store, now = HashStore(), [0.0]
    slow, fast = (RoundClock(store, 10.0, 5, None, 2, decides, lambda: now[0]) for decides in (True, False))
    for clock in (slow, fast):
        clock.start_round(0)
    now[0] = 11.0
    assert not slow.step() and [fast.step() for _ in range(3)] == [False] * 3  # late, but four steps are too few
    assert not fast.step()  # the fifth, but this clock does not decide
    assert slow.step() and fast.step()
    for clock in (slow, fast):
        clock.start_round(7)
    assert not slow.step() and not fast.step()  # a new round, from now on


def test_the_budget_ends_the_last_round_in_time_for_one_more_step_of_each() -> None:
    store = HashStore()
    clocks = [RoundClock(store, 1e9, 1, 20, 2, rank == 0, lambda: 0.0) for rank in range(2)]
    for clock in clocks:
        clock.start_round(10)
    taken = 0
    while not any(clock.step() for clock in clocks[: 1 + taken % 2]):
        taken += 1
        assert taken < 20
    total = 10 + int(store.add("0", 0)) % (1 << 40)
    assert 20 <= total + 2 <= 21 and clocks[0].is_spent(total + 2)
    with pytest.raises(ValueError, match="seconds=-1"):
        RoundClock(store, -1, 1, None, 1, True)
