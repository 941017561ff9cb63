"""Text in windows: what a pass covers, what a mixture holds, what documents see, and how a run resumes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import sweep

from datamodules import Text
from datamodules.base.datamodule import ZooDataModule
from datamodules.base.mixture import Mixture, apportion
from datamodules.text.prompts import DEFAULT_PROMPTS
from datamodules.text.token_files import write_token_file
from datamodules.text.token_windows import TokenWindows
from datamodules.text.tokenizer import ByteTokenizer
from zoo.base.hyperparameters import build

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZOO_CACHE", str(tmp_path / "cache"))


def rows(path: Path, count: int, letter: str, length: int = 30) -> str:
    """A source of ``count`` documents, each of a number and ``letter``."""
    path.write_text("".join(json.dumps({"text": f"{n:04}" + letter * length}) + "\n" for n in range(count)))
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, float]:
    return {rows(tmp_path / "a.jsonl", 60, "a"): 3.0, rows(tmp_path / "b.jsonl", 20, "b"): 1.0}


def windows_of(tmp_path: Path, texts: list[str], seq_len: int, **options: Any) -> TokenWindows:
    file = write_token_file(tmp_path / "ids.bin", map(BYTES.encode, texts), BYTES)
    return TokenWindows([file], BYTES, seq_len, mixture=(["s"], [1.0], None), **options)


# Windows

TEXTS = st.lists(st.text("abc é", min_size=1, max_size=12), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(2, 9), st.booleans(), st.booleans())
def test_a_pass_asks_for_every_id_and_byte_once(tmp_path_factory, texts, seq_len, packing, document_mask):
    windows = windows_of(tmp_path_factory.mktemp("ids"), texts, seq_len, packing=packing, document_mask=document_mask)
    stream = [number for text in texts for number in [*text.encode(), BYTES.eos_id]]
    asked, size = [], 0
    for index in range(len(windows)):
        row = windows[index]
        assert len(row["input_ids"]) == seq_len if packing else len(row["input_ids"]) <= seq_len
        real = row["attention_mask"].bool()
        assert torch.equal(row["input_ids"][~real], torch.full_like(row["input_ids"][~real], BYTES.pad_id))
        assert (row["labels"][~real] == -100).all()
        inside = row["input_ids"][real][1:].tolist()
        if not document_mask:
            assert torch.equal(row["labels"][real], row["input_ids"][real])
        asked += inside
        counted = row["labels"][1:]
        assert int(row["num_bytes"]) == int(((counted >= 0) & (counted < 256)).sum())
        size += int(row["num_bytes"])
    assert asked == stream
    first_bytes = len(texts) if document_mask else 0
    assert size == sum(len(text.encode()) for text in texts) - first_bytes


def test_packed_windows_are_these(tmp_path):
    windows = windows_of(tmp_path, ["abc", "d", "ef"], 5, document_mask=True)
    batch = windows.batch([0, 1, 2])
    e, p = BYTES.eos_id, BYTES.pad_id
    a, b, c, d, f, g = 97, 98, 99, 100, 101, 102
    assert batch["input_ids"].tolist() == [[e, a, b, c, e], [e, d, e, f, g], [g, e, p, p, p]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 0, 1, 0, 1], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[e, -100, b, c, e], [e, -100, e, -100, g], [g, e, -100, -100, -100]]
    assert batch["num_bytes"].tolist() == [2, 1, 0]
    assert batch["index"].tolist() == [0, 1, 2]
    open_windows = windows_of(tmp_path, ["abc", "d", "ef"], 5).batch([0, 1, 2])
    assert "position_ids" not in open_windows
    assert open_windows["labels"].tolist() == [[e, a, b, c, e], [e, d, e, f, g], [g, e, -100, -100, -100]]
    assert open_windows["num_bytes"].tolist() == [3, 3, 0]


def test_unpacked_windows_hold_one_document_after_an_eos(tmp_path):
    windows = windows_of(tmp_path, ["abcd", "e"], 4, packing=False)
    e, p = BYTES.eos_id, BYTES.pad_id
    assert windows.batch([0, 1, 2])["input_ids"].tolist() == [[e, 97, 98, 99], [99, 100, e, p], [e, 101, e, p]]
    assert windows.batch([2])["input_ids"].tolist() == [[e, 101, e]], "as wide as the longest"


@settings(deadline=None, max_examples=30)
@given(TEXTS, st.integers(2, 9), st.data())
def test_positions_begin_where_a_document_or_the_row_does(tmp_path_factory, texts, seq_len, data):
    windows = windows_of(tmp_path_factory.mktemp("ids"), texts, seq_len, document_mask=True)
    begins = {0} | {sum(len(t.encode()) + 1 for t in texts[:n]) for n in range(len(texts))}
    index = data.draw(st.integers(0, len(windows) - 1))
    row = windows[index]
    for place, position in enumerate(row["position_ids"].tolist()):
        at = index * (seq_len - 1) + place - 1
        if row["attention_mask"][place]:
            begin = place == 0 or at in begins
            assert (position == 0) == begin
            assert (row["labels"][place] == -100) == (begin and place > 0)
        if place and position:
            assert position == int(row["position_ids"][place - 1]) + 1


# Mixture


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 1000))
def test_shares_are_exact_but_for_rounding(weights, total):
    shares = apportion(total, weights)
    assert sum(shares) == total
    assert all(abs(share - total * w / sum(weights)) < 1 for share, w in zip(shares, weights, strict=True))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(3, 80), st.integers(0, 5))
def test_sources_are_walked_without_repetition_over_the_epochs(sizes, length, seed):
    mixture = Mixture([f"s{n}" for n in range(len(sizes))], sizes, [1.0] * len(sizes), length)
    epochs = [mixture.epoch_order(epoch, seed) for epoch in range(4)]
    assert all(len(epoch) == length for epoch in epochs)
    first = 0
    for size, share in zip(sizes, mixture.shares, strict=True):
        parts = [epoch[(epoch >= first) & (epoch < first + size)] - first for epoch in epochs]
        assert [len(part) for part in parts] == [share] * 4
        counts = torch.bincount(torch.cat(parts), minlength=size)
        assert counts.max() - counts.min() <= 1, "none comes again before all have come"
        first += size
    assert torch.equal(mixture.epoch_order(3, seed), epochs[3])


def test_orders_differ_between_epochs_seeds_and_sources():
    mixture = Mixture(["a", "b"], [50, 50], [1, 1], 100)
    orders = [tuple(mixture.epoch_order(epoch, seed).tolist()) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9
    a, b = (
        [index % 50 for index in part[0].tolist()]
        for part in (Mixture._walk("a", 50, 0, 50, 0), Mixture._walk("b", 50, 0, 50, 0))
    )
    assert a != b and sorted(a) == sorted(b) == list(range(50))


def test_mixtures_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="source b has no text to train on"):
        Mixture(["a", "b"], [5, 0], [1, 1])
    with pytest.raises(ValueError, match=r"weight of 0\.001, the source b gets none of the 10 windows of an epoch"):
        Mixture(["a", "b"], [5, 5], [1, 0.001])


# The DataModule


def epoch_of(loader: Any, epoch: int) -> list[dict[str, Any]]:
    loader.sampler.set_epoch(epoch)
    return [{name: value.tolist() for name, value in batch.items()} for batch in loader]


def test_an_epoch_has_the_shares_of_the_weights_and_batches_their_keys(pair):
    data = Text(sources=pair, seq_len=16, batch_size=5, windows_per_epoch=100, val_fraction=0.1)
    batches = epoch_of(data.train_dataloader(), 0)
    assert len(batches) == 20
    keys = {"input_ids", "labels", "attention_mask", "index", "num_bytes", "source", "retried"}
    assert batches[0].keys() == keys
    assert Counter(source for batch in batches for source in batch["source"]) == {0: 75, 1: 25}
    for batch in batches:
        for ids, source in zip(batch["input_ids"], batch["source"], strict=True):
            assert "ba"[source] not in BYTES.decode(ids)
    tensors = next(iter(data.train_dataloader()))
    assert all(value.dtype == torch.int64 for name, value in tensors.items() if name != "retried")
    assert tensors["retried"].dtype == torch.bool


@pytest.mark.parametrize(("length", "lost"), [(40, 0), (43, 3)])
def test_a_walk_gives_each_window_once_but_for_those_of_incomplete_batches(pair, length, lost):
    name, _ = pair
    data = Text(sources={name: 1.0}, seq_len=16, batch_size=4, val_fraction=0.0, windows_per_epoch=length)
    loader = data.train_dataloader()
    windows = len(loader.dataset)
    epochs = windows // length  # of the first walk
    assert epochs > 2
    given = Counter(index for epoch in range(epochs) for batch in epoch_of(loader, epoch) for index in batch["index"])
    assert set(given.values()) == {1} and len(given) == epochs * (length - lost)


def test_validation_is_the_held_out_text_whole_and_always_the_same(pair):
    mixed = Text(sources=pair, seq_len=16, batch_size=5, val_fraction=0.2, seed=1)
    separate = Text(sources=pair, seq_len=16, batch_size=7, val_fraction=0.2, seed=2, validate_per_source=True)
    held_out = [corpus.facts.val_bytes for corpus in mixed.corpora]
    whole = epoch_of(mixed.val_dataloader(), 0)
    assert sum(sum(batch["num_bytes"]) for batch in whole) == sum(held_out)
    assert "retried" not in whole[0]
    loaders = separate.val_dataloader()
    for number, (loader, size) in enumerate(zip(loaders, held_out, strict=True)):
        batches = epoch_of(loader, 0)
        assert sum(sum(batch["num_bytes"]) for batch in batches) == size
        assert {source for batch in batches for source in batch["source"]} == {number}
    assert len({source for batch in whole[:2] for source in batch["source"]}) == 2, "the first batches are a fair sample"
    assert epoch_of(mixed.test_dataloader(), 0) == whole
    trained = "".join(BYTES.decode(corpus.train.tokens) for corpus in mixed.corpora)
    documents = {n for batch in whole for ids in batch["input_ids"] for n in [BYTES.decode(ids)] if len(n) == 15}
    assert documents and not any(text in trained for text in documents if text[:4].isdigit())


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
@pytest.mark.parametrize(
    "options", sweep([{}, {"packing": False}, {"document_mask": True, "windows_per_epoch": 64}], quick=(0, 2))
)
def test_a_cut_epoch_resumes_exactly_with_any_number_of_workers(pair, options, workers):
    def loader(num_workers: int) -> Any:
        data = Text(sources=pair, seq_len=16, batch_size=4, num_workers=num_workers, seed=3, **options)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        return loader

    expected = epoch_of(loader(0), 2)
    cut = loader(workers[0])
    first = [{name: value.tolist() for name, value in batch.items()} for _, batch in zip(range(3), cut, strict=False)]
    state = json.loads(json.dumps(cut.state_dict()))
    resumed = loader(workers[1])
    resumed.load_state_dict(state)
    assert first + epoch_of(resumed, 2) == expected
    assert len(expected) > 10


def test_a_sample_that_is_put_back_is_the_same_in_the_next_epoch(pair):
    loader = Text(sources=pair, seq_len=16, batch_size=4, windows_per_epoch=40).train_dataloader()
    loader.sampler.set_epoch(0)
    batches = list(loader)
    loader.requeue(batches[-1]["index"].tolist(), 3, seed_key=0)
    loader.sampler.set_epoch(1)
    again = {
        int(index): (ids.tolist(), int(source))
        for batch in loader
        for index, ids, source, mark in zip(*(batch[k] for k in ("index", "input_ids", "source", "retried")), strict=True)
        if mark
    }
    last = batches[-1]
    assert again == {
        int(index): (ids.tolist(), int(source))
        for index, ids, source in zip(last["index"], last["input_ids"], last["source"], strict=True)
    }


def test_a_position_of_other_epochs_or_data_is_refused(pair):
    loader = Text(sources=pair, seq_len=16, batch_size=4, windows_per_epoch=40).train_dataloader()
    next(iter(loader))
    other = Text(sources=pair, seq_len=16, batch_size=4, windows_per_epoch=60).train_dataloader()
    with pytest.raises(ValueError, match="inside an epoch of 40 samples, this run's epochs have 60"):
        other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="resume with the same data"):
        Text(sources=pair, seq_len=12, batch_size=4, windows_per_epoch=40).train_dataloader().load_state_dict(loader.state_dict())


class Counts(L.LightningModule):
    """Counts the bytes it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.bytes = Counter()
        self.prompts: list[str] = []

    def training_step(self, batch, batch_idx):
        self.bytes["train"] += int(batch["num_bytes"].sum())
        return self.layer(batch["num_bytes"].float().unsqueeze(1)).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.bytes[f"val {dataloader_idx}"] += int(batch["num_bytes"].sum())

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_lightning_runs_one_pass_an_epoch_and_continues_prompts_out_of_the_box(pair, tmp_path):
    data = Text(sources=pair, seq_len=16, batch_size=1, val_fraction=0.2, validate_per_source=True)
    one = Text(sources={next(iter(pair)): 1.0}, seq_len=16, batch_size=1, val_fraction=0.2)
    for module_data in (data, one):
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        module = Counts()
        trainer.fit(module, datamodule=module_data)
        for number, corpus in enumerate(module_data.corpora):
            assert module.bytes[f"val {number}"] == corpus.facts.val_bytes
    assert module.bytes["train"] == one.corpora[0].facts.train_bytes
    (batch,) = trainer.predict(module, datamodule=Text(sources={"no such": 1.0}))
    assert batch["prompt"] == list(DEFAULT_PROMPTS)
    for ids, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], DEFAULT_PROMPTS, strict=True):
        assert BYTES.decode(ids[mask.bool()]) == prompt
        assert mask.tolist() == sorted(mask.tolist()), "padding is on the left"


def test_arguments_are_kept_as_plain_data(pair):
    data = Text(sources=pair, seq_len=16, predict_prompts=Path("p.txt"))
    assert data.hparams["sources"] == pair
    assert data.hparams["predict_prompts"] == "p.txt"
    arguments = {name: value for name, value in data.hparams.items() if not name.startswith("_")}
    again = build(ZooDataModule, {"class_path": data.hparams["_class_path"], "init_args": arguments})
    assert isinstance(again, Text) and again.sources == pair and again.hparams == data.hparams
    assert Text().sources == {"python-stdlib": 1.0}


def test_bad_arguments_are_named(tmp_path, pair):
    for options, message in [
        ({"sources": {}}, "sources is empty"),
        ({"sources": {"shakespeare": -1.0}}, r"weight of the source shakespeare is -1\.0, and must be positive"),
        ({"sources": {"kjv": float("nan")}}, "weight of the source kjv is nan"),
        ({"seq_len": 0}, "seq_len is 0, and must be at least 2"),
        ({"windows_per_epoch": 0}, "windows_per_epoch is 0"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Text(**options)
    with pytest.raises(FileNotFoundError, match=r"There is no source '/no/where\.jsonl'"):
        Text(sources={"/no/where.jsonl": 1.0}).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"/no/where\.bin does not exist"):
        Text(sources={"/no/where.bin": 1.0}).setup("fit")
    with pytest.raises(ValueError, match="val_fraction is 0, so that nothing is held out"):
        Text(sources=pair, val_fraction=0.0).test_dataloader()
    assert Text(sources=pair, val_fraction=0.0).val_dataloader() == []
    write_token_file(tmp_path / "one.bin", [[1, 2, 3]], BYTES)
    with pytest.raises(ValueError, match="has a single document, of which nothing can be held out"):
        Text(sources={str(tmp_path / "one.bin"): 1.0}).val_dataloader()


def test_ids_of_a_file_are_mixed_with_text(tmp_path, pair):
    write_token_file(tmp_path / "c.bin", [[99] * 30] * 20, BYTES)
    sources = {**pair, str(tmp_path / "c.bin"): 4.0}
    data = Text(sources=sources, seq_len=16, batch_size=8, windows_per_epoch=80, val_fraction=0.1)
    batches = epoch_of(data.train_dataloader(), 0)
    seen = Counter(source for batch in batches for source in batch["source"])
    assert seen == {0: 30, 1: 10, 2: 40}
    assert all(set(BYTES.decode(ids)) == {"c"} for batch in batches
               for ids, source in zip(batch["input_ids"], batch["source"], strict=True) if source == 2)  # fmt: skip
    assert data.corpora[2].facts.val_bytes == 60
