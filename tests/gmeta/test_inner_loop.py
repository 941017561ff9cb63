"""Meta gradients: what they equal, in which limits, and that no graph is cut in silence."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from zoo.ctr import ClickNetwork, DCNNetwork, DLRMNetwork, FieldEmbedding, XDeepFMNetwork
from zoo.gmeta import Adaptation, Variant, meta_loss, query_logits, task_bias, task_rows
from zoo.gmeta.inner_loop import Order
from zoo.nn.row_lookup import LocalRows, Rows

DIMS = [5, 7, 4]
NETWORKS: dict[str, Callable[[], ClickNetwork]] = {
    "dlrm": lambda: DLRMNetwork(DIMS, 2, 4, [6], [8, 5], 0.0),
    "xdeepfm": lambda: XDeepFMNetwork(DIMS, 2, 4, [3], [8, 5], 0.0),
    "dcn": lambda: DCNNetwork(DIMS, 2, 4, 2, [8], 0.0),
}
VARIANTS = get_args(Variant)


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def samples(num_tasks: int, size: int, seed: int, ragged: bool = True) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_tasks, size, generator=random) < (0.7 if ragged else 2)
    mask[:, -1] = True
    return {
        "sparse": torch.stack([torch.randint(dim, (num_tasks, size), generator=random) for dim in DIMS], dim=-1),
        "dense": torch.randn(num_tasks, size, 2, generator=random),
        "label": torch.randint(2, (num_tasks, size), generator=random).double(),
        "mask": mask,
    }


def fetched(network: ClickNetwork, support: Mapping[str, Any], query: Mapping[str, Any]) -> tuple[Rows, dict[str, Any]]:
    numbers = network.row_numbers(support["sparse"]), network.row_numbers(query["sparse"])
    rows = LocalRows().fetch(network.row_tables(), numbers)
    return rows, {"support": support, "query": query, "rows": task_rows(*numbers, support["mask"], query["mask"])}


def weights(network: nn.Module, adaptation: nn.Module) -> list[nn.Parameter]:
    return [*network.parameters(), *adaptation.parameters()]


def gradients(
    network: ClickNetwork, adaptation: Adaptation, steps: int = 1, order: Order = "second", vmap: bool = True, tasks: int = 5
) -> tuple[Tensor, list[Tensor]]:
    loss_T = meta_loss(network, *fetched(network, samples(tasks, 4, 1), samples(tasks, 3, 2)), adaptation, steps, order, vmap)
    return loss_T.detach(), list(torch.autograd.grad(loss_T.mean(), weights(network, adaptation), materialize_grads=True))


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Relative to the norm of the first."""
    flat = [torch.cat([each.flatten() for each in each_list]) for each_list in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_tasks_at_once_are_tasks_one_by_one(name: str, variant: Variant) -> None:
    network = NETWORKS[name]()
    adaptation = Adaptation(network, variant, 0.3)
    for order, steps in (("first", 1), ("second", 2)):
        at_once, one_by_one = (gradients(network, adaptation, steps, order, vmap) for vmap in (True, False))  # type: ignore[arg-type]
        assert gap([at_once[0], *at_once[1]], [one_by_one[0], *one_by_one[1]]) < 1e-15


def unrolled(network: ClickNetwork, tasks: Mapping[str, Any], steps: int, rate: float, adapts: Callable[[str], bool]) -> Tensor:
    """Losses (T,) by autograd over copies of the whole network, tables and all."""
    losses = []
    for task in range(len(tasks["support"]["mask"])):
        copy: dict[str, Tensor] = dict(network.named_parameters())

        def loss(name: str, copy: dict[str, Tensor], task: int = task) -> Tensor:
            a_set = {key: value[task][tasks[name]["mask"][task]] for key, value in tasks[name].items()}
            logit = functional_call(network, copy, (a_set["sparse"], a_set["dense"]))
            return binary_cross_entropy_with_logits(logit, a_set["label"])

        for _ in range(steps):
            names = [key for key in copy if adapts(key)]
            grads = torch.autograd.grad(loss("support", copy), [copy[key] for key in names], create_graph=True)
            copy = {**copy, **{key: copy[key] - rate * grad for key, grad in zip(names, grads, strict=True)}}
        losses.append(loss("query", copy))
    return torch.stack(losses)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    ("variant", "adapts"),
    [
        ("maml", lambda name: True),
        ("melu", lambda name: name.startswith(("top", "output"))),
        ("anil", lambda name: name.startswith("output")),
        ("rows", lambda name: name == "embedding.table.weight"),
    ],
)
def test_they_equal_autograd_through_copies_of_the_whole_network(
    variant: Variant, adapts: Callable[[str], bool], steps: int
) -> None:
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, variant, 0.3)
    loss_T, ours = gradients(network, adaptation, steps)
    theirs_T = unrolled(network, {"support": samples(5, 4, 1), "query": samples(5, 3, 2)}, steps, 0.3, adapts)
    assert gap([loss_T], [theirs_T.detach()]) < 1e-14
    assert gap(ours, list(torch.autograd.grad(theirs_T.mean(), list(network.parameters())))) < 1e-15


@pytest.mark.parametrize("variant", ["maml", "meta_sgd", "cbml"])
def test_second_order_is_the_slope_of_the_loss(variant: Variant) -> None:
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, variant, 0.3)
    parameters = weights(network, adaptation)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)  # no unit lies at the kink of its activation
    _, found = gradients(network, adaptation, 2)
    way = [torch.randn_like(parameter) for parameter in parameters]
    at = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, change in zip(parameters, way, strict=True):
                parameter.add_(change, alpha=sign * 1e-5)
        at.append(float(gradients(network, adaptation, 2)[0].mean()))
        with torch.no_grad():
            for parameter, change in zip(parameters, way, strict=True):
                parameter.sub_(change, alpha=sign * 1e-5)
    slope = sum(float((gradient * change).sum()) for gradient, change in zip(found, way, strict=True))
    assert (at[0] - at[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_first_order_is_another_gradient_and_the_same_loss() -> None:
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, "maml", 0.3)
    (loss_1, first), (loss_2, second) = (gradients(network, adaptation, 2, order) for order in ("first", "second"))
    assert gap([loss_1], [loss_2]) < 1e-15
    assert distance(second, first) > 0.05


@pytest.mark.parametrize("order", ["first", "second"])
def test_without_steps_it_is_the_loss_of_query(order: Order) -> None:
    network = NETWORKS["dlrm"]()
    _, found = gradients(network, Adaptation(network, "maml", 0.3), 0, order)
    query = samples(5, 3, 2)
    rows = [network(query["sparse"][t][m], query["dense"][t][m]) for t, m in enumerate(query["mask"])]
    loss = torch.stack(
        [binary_cross_entropy_with_logits(row, query["label"][t][query["mask"][t]]) for t, row in enumerate(rows)]
    ).mean()
    assert gap(found, list(torch.autograd.grad(loss, list(network.parameters())))) < 1e-15


class Quadratic(ClickNetwork):
    """``logit = |w|^2``; with a loss of logits alone, the inner loop is that of a quadratic function."""

    def __init__(self, size: int) -> None:
        super().__init__([1], 1)
        self.output = nn.Linear(size, 1, bias=False)

    def draw(self, random: Any) -> list[Tensor]:
        return []

    def forward(self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Any = (), vectors_BVE: Any = None) -> Tensor:
        return (self.output.weight.square().sum() / 2 - self.output.weight.sum()) * dense_BN[:, 0]


def test_quadratic_loss_has_a_known_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zoo.gmeta.inner_loop.masked_loss", lambda logit_B, label_B, mask_B: (logit_B * mask_B).sum() / mask_B.sum()
    )
    network = Quadratic(3)
    one = {"sparse": torch.zeros(1, 1, 1, dtype=torch.int64), "dense": torch.ones(1, 1, 1), "label": torch.zeros(1, 1)}
    one = {**one, "mask": torch.ones(1, 1, dtype=torch.bool)}
    rows, tasks = fetched(network, one, one)
    loss_T = meta_loss(network, rows, tasks, Adaptation(network, "maml", 0.1), 3)
    (found,) = torch.autograd.grad(loss_T.sum(), list(network.parameters()))
    # L = |phi|^2 / 2 - sum phi: phi* = 1, phi_k - 1 = (1 - a)^k (phi_0 - 1), gradient (1 - a)^k (phi_k - 1).
    left = 0.9**3 * (network.output.weight.detach() - 1)
    assert float(loss_T) == pytest.approx(float((left + 1).square().sum() / 2 - (left + 1).sum()), abs=1e-14)
    assert gap([found], [0.9**3 * left]) < 1e-15


def test_a_row_of_both_sets_is_read_adapted() -> None:
    """With rows of query apart from those of support it would be another algorithm."""
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, "rows", 1.0)
    both = samples(2, 3, 1, ragged=False)
    rows, tasks = fetched(network, both, both)
    after_TEQ = query_logits(network, rows, tasks, adaptation, [0, 1])
    loss = [binary_cross_entropy_with_logits(after_TEQ[:, step], both["label"]) for step in (0, 1)]
    assert loss[1] < loss[0]
    elsewhere, both = {**both, "sparse": torch.full_like(both["sparse"], 3)}, {**both, "sparse": both["sparse"] % 3}
    rows, tasks = fetched(network, elsewhere, both)
    apart_TEQ = query_logits(network, rows, tasks, adaptation, [0, 1])
    assert torch.equal(apart_TEQ[:, 0], apart_TEQ[:, 1])


def test_melu_leaves_rows_alone_and_learns_them_by_both_sets() -> None:
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, "melu", 0.3)
    assert adaptation.dense == [f"{n}.{kind}" for n in ("top.layers.0", "top.layers.1", "output") for kind in ("weight", "bias")]
    assert not adaptation.rows_adapt
    support, query = samples(2, 3, 1, ragged=False), samples(2, 3, 2, ragged=False)
    support["sparse"], query["sparse"] = torch.full_like(support["sparse"], 3), query["sparse"] % 3
    found = {}
    for order in ("first", "second"):
        rows, tasks = fetched(network, support, query)
        loss_T = meta_loss(network, rows, tasks, adaptation, 1, order)
        (table,) = torch.autograd.grad(loss_T.mean(), list(network.row_tables().values()))
        found[order] = [
            float(table[numbers].abs().sum()) for numbers in (network.row_numbers(s["sparse"]) for s in (support, query))
        ]
    assert found["first"][0] == 0 < found["second"][0]
    assert found["first"][1] > 0


def test_reptile_goes_the_way_of_plain_descent() -> None:
    network = NETWORKS["dlrm"]()
    _, found = gradients(network, Adaptation(network, "reptile", 0.2), 1, tasks=1)
    _, plain = gradients(network, Adaptation(network, "joint", 0.2), 1, tasks=1)
    assert gap(found, plain) < 1e-14  # after one step (phi_0 - phi_1) / rate is the gradient on all samples


def test_learned_rates_move_both_ways() -> None:
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, "meta_sgd", 0.3)
    _, learned = gradients(network, adaptation, 2)
    _, fixed = gradients(network, Adaptation(network, "maml", 0.3), 2)
    assert gap(learned[:-1], fixed) < 1e-15
    assert bool((learned[-1] != 0).all())


def test_samples_that_are_not_there_change_nothing() -> None:
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, "cbml", 0.3)
    support, query = samples(4, 5, 1), samples(4, 3, 2)
    before = meta_loss(network, *fetched(network, support, query), adaptation, 2)
    gone = ~support["mask"]
    support["sparse"][gone], support["dense"][gone], support["label"][gone] = 3, 7.0, 1.0
    assert torch.equal(before, meta_loss(network, *fetched(network, support, query), adaptation, 2))


def test_rows_are_numbered_inside_of_their_task() -> None:
    support, query = samples(6, 4, 1), samples(6, 3, 2)
    network = NETWORKS["dlrm"]()
    numbers = network.row_numbers(support["sparse"]), network.row_numbers(query["sparse"])
    rows = task_rows(*numbers, support["mask"], query["mask"])
    for task in range(6):
        own = torch.cat([n[task][a_set["mask"][task]].flatten() for n, a_set in zip(numbers, (support, query), strict=True)])
        assert rows.numbers_TR[task].unique().tolist() == own.unique().tolist()
        for n, place, a_set in zip(numbers, (rows.support_TSF, rows.query_TQF), (support, query), strict=True):
            assert torch.equal(rows.numbers_TR[task][place[task]][a_set["mask"][task]], n[task][a_set["mask"][task]])


class Attends(ClickNetwork):
    """Attention over the vectors of a row, by the fused kernels."""

    def __init__(self) -> None:
        super().__init__(DIMS, 0)
        self.embedding = FieldEmbedding(DIMS, 0, 8)
        self.output = nn.Linear(8, 1)

    def draw(self, random: Any) -> list[Tensor]:
        return []

    def forward(self, sparse_BF: Tensor, dense_BN: Tensor, drawn: Any = (), vectors_BVE: Any = None) -> Tensor:
        x = self.embedding(sparse_BF, dense_BN)[:, None]
        logit_B: Tensor = self.output(nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2))).squeeze(1)
        return logit_B


def test_attention_is_differentiated_twice() -> None:
    network = Attends()
    loss_T = meta_loss(network, *fetched(network, samples(3, 4, 1), samples(3, 3, 2)), Adaptation(network, "maml", 0.3), 1)
    assert all(float(each.abs().sum()) > 0 for each in torch.autograd.grad(loss_T.sum(), list(network.parameters())))


@pytest.mark.parametrize("vmap", [True, False])
def test_it_adapts_in_inference_mode(vmap: bool) -> None:
    network = NETWORKS["xdeepfm"]()
    adaptation = Adaptation(network, "maml", 0.5)
    with torch.inference_mode():
        rows, tasks = fetched(network, samples(3, 4, 1), samples(3, 3, 2))
        found_TEQ = query_logits(network, rows, tasks, adaptation, [0, 1, 5], vmap)
    rows, tasks = fetched(network, samples(3, 4, 1), samples(3, 3, 2))
    plain_TEQ = query_logits(network, rows, tasks, adaptation, [0, 1, 5])
    assert found_TEQ.shape == (3, 3, 3)
    assert gap([found_TEQ], [plain_TEQ]) < 1e-14
    assert not torch.equal(found_TEQ[:, 0], found_TEQ[:, 1])


def test_bfloat16_keeps_rows_and_updates_in_float32() -> None:
    torch.set_default_dtype(torch.float32)
    network = NETWORKS["dlrm"]()
    adaptation = Adaptation(network, "maml", 0.3)
    sets = [{k: v.float() if v.is_floating_point() else v for k, v in samples(5, size, size).items()} for size in (4, 3)]
    rows, tasks = fetched(network, *sets)
    exact = meta_loss(network, rows, tasks, adaptation, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = meta_loss(network, rows, tasks, adaptation, 2)
    found = [torch.autograd.grad(each.mean(), list(network.parameters()), retain_graph=True) for each in (exact, rounded)]
    assert all(each.dtype == torch.float32 for each in found[1])
    assert 0 < distance(list(found[0]), list(found[1])) < 0.1


def test_the_constant_of_a_task_is_a_step_of_newton() -> None:
    logit, label = torch.randn(2, 5), torch.randint(2, (2, 5)).double()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    zero = torch.zeros(2, 1, requires_grad=True)

    def loss(bias: Tensor) -> Tensor:
        return (binary_cross_entropy_with_logits(logit + bias, label, reduction="none") * mask).sum() + bias.square().sum() / 2

    slope = torch.autograd.grad(loss(zero), zero)[0]
    curve = torch.autograd.functional.hessian(loss, zero.detach()).view(2, 2).diagonal()[:, None]
    assert gap([task_bias(logit, label, mask)], [-slope / curve]) < 1e-15


@pytest.mark.parametrize(
    ("variant", "rate", "says"),
    [("mamal", 0.1, "must be one of maml, melu"), ("maml", 0.0, "> 0"), ("melu", 0.1, "decision_layers")],
)
def test_bad_input_is_refused(variant: Any, rate: float, says: str) -> None:
    network = NETWORKS["dlrm"]()
    network.decision_layers = lambda: ("nothing",)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=says) as error:
        Adaptation(network, variant, rate)
    assert len(str(error.value)) <= 300
