"""Tables divided among ranks: nothing but the place of their rows changes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from gmeta_runs import CASES, DIMS, Drawn, model, run, same, trainer
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers import BertConfig, BertModel

from strategies import HybridStrategy
from strategies.divided_rows import DividedRows
from strategies.hybrid import RowExchange
from strategies.traffic import Traffic
from zoo.ctr import DLRM
from zoo.nn.row_lookup import LocalRows, places
from zoo.nn.row_optimizers import RowAdagrad
from zoo.strategy_contract import row_link

MAML: dict[str, Any] = {"inner_steps": 2}


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, Any]:
    return run(tmp_path, MAML)


@pytest.mark.parametrize("variant", ["maml", "cbml"])
def test_four_ranks_are_one_process(variant: str, pool: RankPool, tmp_path: Path) -> None:
    alone = run(tmp_path, CASES[variant])
    for found in pool.run(run, tmp_path, CASES[variant], {"partition": "block"}, world_size=4):
        same(alone, found, 1e-10)


def test_single_precision_agrees_as_well(pool: RankPool, tmp_path: Path) -> None:
    alone = run(tmp_path, MAML, precision="32-true")
    for found in pool.run(run, tmp_path, MAML, "hybrid", world_size=2, precision="32-true"):
        same(alone, found, 1e-6)


def several(folder: Path, cases: list[dict[str, Any]], strategies: list[Any]) -> list[dict[str, Any]]:
    return [run(folder, options, strategy) for options in cases for strategy in strategies]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", CASES)
def test_every_order_and_number_of_steps(variant: str, world_size: int, pool: RankPool, tmp_path: Path) -> None:
    cases = [{**CASES[variant], "first_order": order, "inner_steps": k} for order in (False, True) for k in (1, 2, 3)]
    alone = several(tmp_path, cases, ["auto"])
    layouts = [{"partition": "mod"}, {"partition": "block"}]
    for found in pool.run(several, tmp_path, cases, layouts, world_size=world_size):
        for number, one in enumerate(found):
            same(alone[number // len(layouts)], one, 1e-10)


def all_switches(folder: Path) -> list[dict[str, Any]]:
    found = []
    for strategy in (
        {"lookup": "two_call"},
        {"lookup": "per_task", "partition": "block"},
        {"dedup": False},
        {"dedup": False, "lookup": "two_call", "outer": "gather"},
        {"bucket": "per_tensor"},
    ):
        with Traffic() as traffic:
            found.append(run(folder, MAML, strategy))
        assert (traffic.num_bytes("gather") > 0) == ("outer" in strategy)
    return found


def test_switches_change_nothing(pool: RankPool, tmp_path: Path, alone: dict[str, Any]) -> None:
    for found in pool.run(all_switches, tmp_path, world_size=2):
        for one in found:
            same(alone, one, 1e-10)


ADAGRAD: dict[str, Any] = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "row_optimizer": partial(RowAdagrad, lr=0.1)}


@pytest.mark.parametrize(
    ("options", "fit_options"),
    [
        (ADAGRAD, {}),
        ({**ADAGRAD, "row_optimizer": partial(torch.optim.SGD, lr=0.5)}, {"gradient_clip_val": 0.05}),
        (MAML, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
    ],
    ids=["row_adagrad", "sparse_clipped", "clipped_accumulated"],
)
def test_optimizers_and_clipping(options: Any, fit_options: Any, pool: RankPool, tmp_path: Path) -> None:
    alone = run(tmp_path, options, **fit_options)
    for found in pool.run(run, tmp_path, options, "hybrid", world_size=2, **fit_options):
        same(alone, found, 1e-10)


@pytest.mark.parametrize("options", [MAML, ADAGRAD], ids=["adam", "row_adagrad"])
def test_a_checkpoint_of_two_continues_on_any_number(options: Any, pool: RankPool, tmp_path: Path) -> None:
    whole = run(tmp_path, options, max_epochs=2)
    file = tmp_path / "two.ckpt"
    pool.run(run, tmp_path, options, "hybrid", world_size=2, save=file, steps=2)
    ends = [run(tmp_path, options, ckpt_path=file, steps=2, max_epochs=3)]
    for strategy in ("hybrid", {"partition": "block"}):
        ends += pool.run(run, tmp_path, options, strategy, world_size=4, ckpt_path=file, steps=2, max_epochs=3)
    stored = torch.load(file, weights_only=True)["state_dict"]
    assert stored["network.embedding.table.weight"].shape == whole["weights"]["network.embedding.table.weight"].shape
    for end in ends[1:]:
        same(ends[0], end, 1e-10)


# The exchange alone


def exchange_of(layout: Any, num_rows: int) -> tuple[RowExchange, list[nn.Parameter]]:
    module = nn.Module()
    tables = [nn.Parameter(torch.arange(num_rows * size).view(num_rows, size) * 1.0) for size in (3, 1)]
    for number, table in enumerate(tables):
        module.register_parameter(f"table{number}", table)
    group = dist.new_group()
    parts = DividedRows(module, tables, group, torch.device("cpu"), layout)  # type: ignore[arg-type]
    parts.divide()
    return RowExchange(parts, num_rows), tables


def fetch_and_push(layout: Any, sparse: bool) -> dict[str, Any]:
    """Rank 0 asks for rows, twice for some; others for none, or one that all ask for."""
    torch.set_default_dtype(torch.float64)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    exchange, tables = exchange_of(layout, 11)
    asked = [torch.tensor([[9, 2], [2, 10]]), torch.tensor([0])] if rank == 0 else [torch.full((rank % 2,), 2)]
    whole = [torch.arange(11 * size).view(11, size) * 1.0 for size in (3, 1)]
    with Traffic() as traffic:
        rows = exchange.fetch({"a": tables[0], "b": tables[1]}, asked, sparse)
        sum((value * (rank + 1)).sum() for value in rows.values.values()).backward()  # type: ignore[union-attr]
    for value, table in zip(rows.values.values(), whole, strict=True):
        assert torch.equal(value.detach(), table[rows.ids_U])
    for group in asked:
        assert torch.equal(rows.ids_U[places(rows.ids_U, group)], group)
    gradients = [table.grad.to_dense() for table in tables if table.grad is not None]
    for table, gradient in zip(tables, gradients, strict=True):
        table.data = gradient
    exchange.parts.unite()
    number = len(rows.ids_U)
    return {
        "gradients": [table.detach() for table in tables],
        "bytes": [t.num_bytes for t in traffic.transfers],
        "formula": [8 * ranks, 8 * number, 4 * 8 * number],
    }


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("layout", ["block", "mod"])
def test_gradients_are_means_over_ranks_and_bytes_as_said(layout: str, sparse: bool, pool: RankPool) -> None:
    wanted = torch.zeros(11)
    wanted[[0, 2, 9, 10]] += 1 / 3
    wanted[2] += 2 / 3
    found = pool.run(fetch_and_push, layout, sparse, world_size=3)
    for each in found:
        assert torch.allclose(each["gradients"][0], wanted[:, None].expand(11, 3), atol=1e-15)
        assert torch.allclose(each["gradients"][1], wanted[:, None], atol=1e-15)
        counts, ids, _, pushed = each["bytes"]
        assert [counts, ids, pushed] == each["formula"]
    # What one rank is sent, the others have served.
    assert sum(each["bytes"][2] for each in found) == sum(each["formula"][2] for each in found)


# Plain training, and models that are not ours


BERT: dict[str, Any] = {
    **{"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


class Titles(LightningModule):
    """BERT of transformers over words whose vectors are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.words = nn.Embedding(13, 8)
        self.network.bert = BertModel(BertConfig(**BERT))
        del self.network.bert.embeddings.word_embeddings
        self.network.head = nn.Linear(8, 1)

    def row_tables(self) -> dict[str, nn.Parameter]:
        return {"words.weight": self.network.words.weight}  # type: ignore[dict-item,union-attr]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids_BL, label_B = batch
        rows = row_link(self.trainer.strategy).fetch(self.row_tables(), [ids_BL])
        words_BLD = nn.functional.embedding(places(rows.ids_U, ids_BL), rows.values["words.weight"])
        logit_B = self.network.head(self.network.bert(inputs_embeds=words_BLD).pooler_output).squeeze(1)  # type: ignore[operator]
        loss = nn.functional.binary_cross_entropy_with_logits(logit_B, label_B)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def plain(folder: Path, kind: str) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    seed_everything(5, verbose=False)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    random = torch.Generator().manual_seed(0)
    sparse = torch.stack([torch.randint(dim, (24,), generator=random) for dim in DIMS], dim=1)
    label = (sparse[:, 0] % 2).to(torch.float64)
    if kind == "bert":
        module: LightningModule = Titles()
        rows: list[Any] = list(zip(sparse, label, strict=True))
    else:
        module = DLRM(DIMS, 1, 4, [4], [6], optimizer=partial(torch.optim.Adam, lr=1e-2))
        rows = [
            {"sparse": s, "dense": s[:1].double(), "label": y, "index": i}
            for i, (s, y) in enumerate(zip(sparse, label, strict=True))
        ]
    sampler = DistributedSampler(rows, shuffle=False) if ranks > 1 else None  # type: ignore[arg-type,var-annotated]
    loader = DataLoader(rows, batch_size=8 // ranks, sampler=sampler)  # type: ignore[arg-type]
    fit = trainer(folder, devices=ranks, strategy="hybrid", precision="64-true", max_epochs=2)
    fit.fit(module, loader)
    return {name: value.detach().clone() for name, value in LightningModule.state_dict(module).items()}


@pytest.mark.parametrize("kind", ["dlrm", "bert"])
def test_plain_training_and_a_model_of_transformers(kind: str, pool: RankPool, tmp_path: Path) -> None:
    alone = plain(tmp_path, kind)
    for found in pool.run(plain, tmp_path, kind, world_size=2):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


# Optimizers


@pytest.mark.parametrize("sparse", [False, True])
def test_row_adagrad_is_its_formula_and_leaves_other_rows(sparse: bool) -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(6, 3))
    wanted, sums = table.detach().clone(), torch.zeros(6)
    optimizer = RowAdagrad([table], lr=0.3, eps=1e-6)
    for rows in ([1, 4], [4, 4, 0]):
        gradient = torch.zeros(6, 3).index_add_(0, torch.tensor(rows), torch.randn(len(rows), 3))
        table.grad = gradient.to_sparse(1) if sparse else gradient
        optimizer.step()
        sums += gradient.square().mean(1)
        touched = gradient.abs().sum(1) > 0
        wanted[touched] -= (0.3 * gradient / (sums.sqrt() + 1e-6)[:, None])[touched]
        assert torch.equal(table.detach()[~touched], wanted[~touched])
    torch.testing.assert_close(table.detach(), wanted, rtol=0, atol=1e-14)


# Refusals


def refused(folder: Path, kind: str) -> str:
    torch.set_default_dtype(torch.float32)
    module: Any = model()
    options: dict[str, Any] = {"strategy": "hybrid", "devices": 2}
    if kind == "precision":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    elif kind == "average":
        options["callbacks"] = [WeightAveraging()]
    elif kind == "tables":
        module = BoringModel()
    elif kind == "optimizer":
        module = model(optimizer=partial(torch.optim.LBFGS, lr=0.1))
    try:
        trainer(folder, **options).fit(module, Drawn())
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("precision", "16-mixed"),
        ("average", "WeightAveraging averages weights"),
        ("tables", "BoringModel names none"),
        ("optimizer", "LBFGS may mix rows"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, says: str, pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(refused, tmp_path, kind, world_size=2):
        assert says in message
        assert len(message) <= 300


def test_unknown_switches_are_refused() -> None:
    with pytest.raises(ValueError, match="lookup='twice' must be one of fused"):
        HybridStrategy(lookup="twice")  # type: ignore[arg-type]


def test_one_process_keeps_tables_whole(tmp_path: Path) -> None:
    assert isinstance(HybridStrategy().row_link(), LocalRows)
