"""The global batch follows its ramp exactly, in the middle of epochs too, and each step has the gradient of its own samples."""

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from datamodules import ZooDataModule
from zoo import ZooModule
from zoo.base.checkpoint import read_checkpoint
from zoo.callbacks import BatchSizeWarmup, RunCheckpoint

TOKENS = 5


class Lines(ZooDataModule):
    """Seventy lines of five tokens."""

    def __init__(self, lines: int = 70, batch_size: int = 2) -> None:
        super().__init__(batch_size=batch_size)
        self.lines = lines

    def train_dataloader(self):
        ids = torch.randint(7, (self.lines, TOKENS), generator=torch.Generator().manual_seed(0))
        return self.train_loader([{"input_ids": row} for row in ids])


class Sum(ZooModule):
    """A linear model with SGD at rate 1, so that a step moves the weights by its gradient."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5))
        self.weight = nn.Parameter(torch.zeros(TOKENS, dtype=torch.float64))

    def losses(self, batch) -> Tensor:
        ids = batch["input_ids"].double()
        return (1 + ids @ self.weight).square() / 1e4

    def training_step(self, batch, batch_idx):
        return self.losses(batch).mean()


class Steps(Callback):
    """Keeps the ids of the samples of each optimizer step, and its gradient."""

    def __init__(self) -> None:
        self.lines: list[list[list[int]]] = [[]]
        self.gradients: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.lines[-1] += batch["input_ids"].tolist()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        weight = module.weight.detach().clone().requires_grad_()
        ids = torch.tensor(self.lines[-1]).double()
        loss = ((1 + ids @ weight).square() / 1e4).mean()
        self.gradients.append((module.weight.grad.clone(), torch.autograd.grad(loss, weight)[0]))
        self.lines.append([])

    @property
    def sizes(self) -> list[int]:
        return [len(lines) for lines in self.lines[: len(self.gradients)]]


def fit(warmup, *callbacks, steps=20, lines=70, ckpt_path=None, **options) -> tuple[Sum, Steps]:
    module, record = Sum(), Steps()
    trainer = Trainer(
        **{
            "max_steps": steps,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [warmup, record, *callbacks],
            **options,
        }
    )
    trainer.fit(module, Lines(lines), ckpt_path=ckpt_path)
    return module, record


def ramp(warmup: BatchSizeWarmup, steps: int, unit: int) -> list[int]:
    """The definition, step by step, without epochs."""
    sizes, seen = [], 0
    for _ in range(steps):
        grown = warmup.start + (warmup.end - warmup.start) * min(1.0, seen / warmup.tokens)
        sizes.append(unit * max(1, round(grown / unit)))
        seen += sizes[-1] * TOKENS
    return sizes


@pytest.mark.parametrize("options", [{"start": 2, "end": 14, "tokens": 300}, {"start": 4, "end": 10, "tokens": 1}])
def test_the_batch_grows_linearly_in_tokens(options):
    warmup = BatchSizeWarmup(**options)
    _, record = fit(warmup, lines=1000)
    assert record.sizes == ramp(warmup, 20, 2)
    assert record.sizes[0] == options["start"] and record.sizes[-1] == options["end"]
    assert options["tokens"] <= warmup.tokens_seen <= options["tokens"] + 5 * options["end"]


@pytest.mark.parametrize("lines", [1000, 70])
def test_each_step_has_the_mean_gradient_of_its_samples(lines):
    """None of the step before is left in it. The last step of an epoch is cut; Lightning divides it by the full number."""
    warmup = BatchSizeWarmup(start=2, end=12, tokens=400)
    _, record = fit(warmup, lines=lines)
    cut = [sum(record.sizes[: step + 1]) % lines == 0 for step in range(20)]
    assert any(cut) == (lines == 70) and len(set(record.sizes)) > 4
    for (ours, exact), size, is_cut, full in zip(
        record.gradients, record.sizes, cut, ramp_sizes(record.sizes, warmup), strict=True
    ):
        assert torch.allclose(ours, exact * (size / full if is_cut else 1), rtol=1e-10, atol=1e-15)
        assert is_cut or size == full


def ramp_sizes(sizes: list[int], warmup: BatchSizeWarmup) -> list[int]:
    """What each step's size should be, given what was seen before."""
    seen = [TOKENS * sum(sizes[:step]) for step in range(len(sizes))]
    return [2 * max(1, round(warmup.batch_size(tokens) / 2)) for tokens in seen]


@pytest.mark.parametrize("stop", [3, 7, 9, 12])
def test_a_resumed_run_is_the_whole_run(tmp_path, stop):
    runs = {}
    for name, stops in (("whole", [18]), ("cut", [stop, 18])):
        sizes, ckpt_path = [], None
        for steps in stops:
            warmup = BatchSizeWarmup(start=2, end=12, tokens=400)
            _, record = fit(
                warmup, RunCheckpoint(), steps=steps, ckpt_path=ckpt_path, default_root_dir=tmp_path / name,
                enable_checkpointing=True,
            )  # fmt: skip
            ckpt_path = tmp_path / name / "checkpoints" / "last.ckpt"
            sizes += record.sizes
        runs[name] = (sizes, warmup.state_dict(), read_checkpoint(ckpt_path)["state_dict"]["weight"])
    assert runs["whole"][:2] == runs["cut"][:2]
    assert torch.equal(runs["whole"][2], runs["cut"][2])


def test_sizes_that_are_no_multiples_are_rounded_and_named(caplog):
    warmup = BatchSizeWarmup(start=1, end=7, tokens=100)
    with caplog.at_level("INFO"):
        _, record = fit(warmup, lines=1000)
    assert record.sizes[0] == 2 and record.sizes[-1] == 8
    assert "start=1 is no multiple of 2 (batch_size 2 x 1 processes): it is taken as 2" in caplog.text
    assert "end=7 is no multiple of 2 (batch_size 2 x 1 processes): it is taken as 8" in caplog.text


def on_ranks() -> tuple[list[int], int, Tensor]:
    warmup = BatchSizeWarmup(start=4, end=16, tokens=300)
    module, record = fit(warmup, steps=12, lines=1000, devices=2, strategy="ddp")
    return record.sizes, warmup.tokens_seen, module.weight.detach()


def test_the_batch_of_all_ranks_counts(pool):
    warmup = BatchSizeWarmup(start=4, end=16, tokens=300)
    for sizes, seen, weight in pool.run(on_ranks, world_size=2):
        assert [2 * size for size in sizes] == ramp(warmup, 12, 4)
        assert seen >= 300 and weight.abs().sum() > 0


def test_what_cannot_work_is_refused():
    warmup = BatchSizeWarmup(start=2, end=4, tokens=10)
    with pytest.raises(ValueError, match="is 3 already: leave it at 1"):
        fit(warmup, accumulate_grad_batches=3)
    trainer = Trainer(max_steps=1, logger=False, accelerator="cpu")
    trainer.strategy.__class__ = DeepSpeedStrategy
    with pytest.raises(ValueError, match="DeepSpeed fixes the number of micro-batches"):
        warmup.setup(trainer, Sum(), "fit")
    manual = Sum()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="Sum optimizes manually"):
        warmup.setup(Trainer(logger=False, accelerator="cpu"), manual, "fit")
    unsized = torch.utils.data.DataLoader([{"input_ids": torch.zeros(2, TOKENS)}], batch_size=None)
    with pytest.raises(ValueError, match="does not tell its batch_size"):
        Trainer(logger=False, accelerator="cpu", max_steps=1, callbacks=[warmup], enable_checkpointing=False).fit(Sum(), unsized)
    rows = torch.utils.data.DataLoader([{"row": row} for row in torch.zeros(4, TOKENS)], batch_size=2)
    other = Sum()
    other.losses = lambda batch: (1 + batch["row"].double() @ other.weight).square()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match='have no "input_ids"'):
        Trainer(logger=False, accelerator="cpu", max_steps=1, callbacks=[warmup], enable_checkpointing=False).fit(other, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"start": 0, "end": 4, "tokens": 9}, "start=0"), ({"start": 8, "end": 4, "tokens": 9}, "not above end=4"),
     ({"start": 2, "end": 4, "tokens": 0}, "tokens=0")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchSizeWarmup(**options)
