"""Recommenders on small real files: texts of each kind of model, losses, ranks on two processes, resume, prediction, index."""

import json
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, Trainer, seed_everything
from lm_models import TINY
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from datamodules import Interactions
from datamodules.interactions import interactions as data_module
from zoo.callbacks import JSONLWriter
from zoo.llmrec import ExportItemIndex, LLMRec, Popularity, SASRec
from zoo.llmrec.module import add_special
from zoo.lm import HFBackbone

QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1,
    "num_sanity_val_steps": 0,
}  # fmt: skip
WORDS = ["red", "blue", "old", "new", "house", "river", "song", "film"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "cache_folder", lambda: tmp_path / "cache")


def write(folder: Path) -> Path:
    """Two domains of 8 titles of two words; 12 users who take 9 items each."""
    generator = np.random.default_rng(0)
    source, taken = folder / "source", [generator.permutation(16)[:9] for _ in range(12)]
    source.mkdir()
    for domain, name in enumerate(("books", "films")):
        titles = [f"{WORDS[n % 4]} {WORDS[4 + (n // 2) % 4]}" for n in range(8)]
        (source / f"{name}.item").write_text(
            "item_id:token\ttitle:token_seq\n" + "".join(f"{name[0]}{n}\t{title}\n" for n, title in enumerate(titles))
        )
        rows = [
            f"u{user}\t{name[0]}{item % 8}\t{time}\n"
            for user, items in enumerate(taken) for time, item in enumerate(items.tolist()) if item // 8 == domain
        ]  # fmt: skip
        (source / f"{name}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    words = Backend(models.WordLevel({**special, **{word: 4 + n for n, word in enumerate([*WORDS, ";"])}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, roles in (("bert", {"cls": "[CLS]", "sep": "[SEP]"}), ("plain", {"eos": "[SEP]"})):
        (folder / name).mkdir()
        words.save(str(folder / name / "tokenizer.json"))
        config = {f"{role}_token": token for role, token in {**roles, "pad": "[PAD]", "unk": "[UNK]"}.items()}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    return source


def data_of(folder: Path, tokenizer: str | None = "bert", **options: Any) -> Interactions:
    source = folder / "source" if (folder / "source").exists() else write(folder)
    name = None if tokenizer is None else str(folder / tokenizer)
    return Interactions(**{"source": str(source), "tokenizer": name, "k_core": (1, 1), "batch_size": 8, **options})


def model(family: str = "bert", **options: Any) -> LLMRec:
    seed_everything(0, verbose=False)
    kind = "encoder" if family == "t5" else None
    backbone = HFBackbone(
        {
            **TINY[family],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        kind=kind,
    )
    return LLMRec(backbone, **{"optimizer": partial(torch.optim.SGD, lr=0.05), "ks": (1, 4), "item_batch_size": 5, **options})


def fit(module: Any, data: Interactions, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "default_root_dir": folder, "max_steps": 4, "enable_checkpointing": False, **options})
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize(
    ("family", "tokenizer", "pooling"), [("bert", "bert", "cls"), ("opt", "plain", "last"), ("t5", "plain", "last")]
)
def test_texts_of_each_kind_are_the_papers(family: str, tokenizer: str, pooling: str, tmp_path: Path) -> None:
    module, data = model(family), data_of(tmp_path, tokenizer)
    fit(module, data, tmp_path, max_steps=1)
    module.eval()
    batch = next(iter(data.val_dataloader()))
    titles = [data.catalogue.titles[item] for item in batch["history"][0].tolist() if item >= 0]
    ids = [data.tokenizer.encode(f"{title}; ") for title in titles]  # type: ignore[union-attr]
    text = [1, *chain.from_iterable(ids)] if pooling == "cls" else [*chain.from_iterable(ids), 2]
    hidden = module.backbone(torch.tensor([text]))[0, 0 if pooling == "cls" else -1]
    torch.testing.assert_close(module.users(batch)[0], hidden, atol=1e-5, rtol=1e-4)
    some = torch.tensor([9, 2, 9, 0])
    torch.testing.assert_close(module.items(some), torch.cat([module.items(one[None]) for one in some]), atol=1e-5, rtol=1e-4)


def test_special_tokens_stand_in_front_or_behind_and_left_padding_is_refused() -> None:
    ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])
    assert add_special(ids, mask, 1, in_front=True)[0].tolist() == [[1, 5, 6], [1, 7, 0]]
    found, seen = add_special(ids, mask, 2, in_front=False)
    assert found.tolist() == [[5, 6, 2], [7, 2, 0]] and seen.tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(ValueError, match="pad them on the right"):
        add_special(ids, mask.flip(1), 1, in_front=True)


def test_encoding_each_title_once_changes_neither_loss_nor_gradients(tmp_path: Path) -> None:
    found = []
    for dedup in (True, False):
        module = model(dedup_candidates=dedup)
        fit(module, data_of(tmp_path), tmp_path, max_steps=1)
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [
    {"loss": "in_batch", "log_q": True}, {"loss": "full_domain"}, {"num_negatives": 30},
    {"similarity": "cosine", "temperature": 0.1, "exclude_history": True},
])  # fmt: skip
def test_losses_fall(options: dict[str, Any], tmp_path: Path) -> None:
    losses: list[float] = []
    module = SASRec(num_items=16, dropout=0.0, optimizer=partial(torch.optim.Adam, lr=0.05), ks=(1, 4), **options)
    step = module.training_step
    module.training_step = lambda *a: losses.append(float((loss := step(*a)).detach())) or loss  # type: ignore[method-assign,func-returns-value]
    fit(module, data_of(tmp_path, None), tmp_path, max_steps=40, limit_val_batches=0)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_popularity_ranks_by_the_targets_of_training(tmp_path: Path) -> None:
    data = data_of(tmp_path, None)
    found = Trainer(**QUIET).test(Popularity(ks=(1, 4), scopes=("domain", "all"), exclude_seen=True), data, verbose=False)[0]
    counts, values = data.catalogue.counts, []
    for batch in data.test_dataloader():
        for target, seen, domain in zip(batch["target"].tolist(), batch["seen"].tolist(), batch["domain"].tolist(), strict=True):
            first, last = data.catalogue.domain_offsets[domain : domain + 2].tolist()
            values.append(1 + sum(int(counts[i] >= counts[target]) for i in range(first, last) if i != target and i not in seen))
    assert found["test/full-domain/Recall@4"] == pytest.approx(np.mean([rank <= 4 for rank in values]))
    assert {"test/full-all/NDCG@4", "test/full-domain/MRR@1/books"} <= found.keys()


def ranks(folder: Path, processes: int, sampled: int | None, options: dict[str, Any]) -> tuple[dict[str, float], list[Any]]:
    """Metrics after three steps, and the best scores of three histories."""
    data_module.cache_folder = lambda: folder / "cache"  # type: ignore[attr-defined]
    run = {**QUIET, "devices": processes, "strategy": "ddp" if processes > 1 else "auto", "default_root_dir": folder}
    module = model(exclude_seen=True, top_k=3, **options)
    data = data_of(folder, eval_negatives=sampled, predict_histories=folder / "own.jsonl", batch_size=8 // processes)
    trainer = Trainer(**{**run, "max_steps": 3, "enable_checkpointing": False, "callbacks": [JSONLWriter(f"{processes}.jsonl")]})
    trainer.fit(module, data)
    found = dict(trainer.validate(module, data, verbose=False)[0])
    trainer.predict(module, data, return_predictions=False)
    lines = (folder / "predictions" / f"{processes}.jsonl").read_text().splitlines()
    return found, [(row["user"], row["scores"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize(("sampled", "options"), [(None, {"loss": "in_batch", "gather": True}), (4, {})])
def test_two_processes_train_rank_and_predict_as_one(
    sampled: int | None, options: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    write(tmp_path)
    lines = [{"user": user, "history": history} for user, history in (("a", ["b1"]), ("b", ["f2", "b3"]), ("c", ["f5"]))]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, own = ranks(tmp_path, 1, sampled, options)
    assert [user for user, _ in own] == ["a", "b", "c"]
    for two, also in pool.run(ranks, tmp_path, 2, sampled, options, world_size=2):
        assert two.keys() == one.keys() and [user for user, _ in also] == [user for user, _ in own]
        assert all(scores == pytest.approx(best, abs=1e-5) for (_, scores), (_, best) in zip(also, own, strict=True))
        assert all(two[name] == pytest.approx(value, abs=1e-6) for name, value in one.items())


class SaveThird(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "third.ckpt")


def test_a_continued_run_is_the_same(tmp_path: Path) -> None:
    whole, again = model(), model()
    fit(whole, data_of(tmp_path), tmp_path, max_steps=6, callbacks=[SaveThird()])
    trainer = Trainer(**{**QUIET, "max_steps": 6, "enable_checkpointing": False})
    trainer.fit(again, data_of(tmp_path), ckpt_path=tmp_path / "third.ckpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_prediction_and_index_of_the_users_own_histories(tmp_path: Path) -> None:
    source = write(tmp_path)
    lines = [{"user": "a", "history": ["red house", "an unknown title"]}, {"user": "b", "history": ["b1"], "domain": "films"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = data_of(tmp_path, predict_histories=tmp_path / "own.jsonl")
    module = model(top_k=3, exclude_seen=True)
    trainer = Trainer(**{**QUIET, "default_root_dir": tmp_path, "callbacks": [JSONLWriter(), ExportItemIndex()]})
    trainer.predict(module, data, return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions" / "predictions.jsonl").read_text().splitlines()]
    assert [row["user"] for row in rows] == ["a", "b"] and all(len(row["items"]) == 3 for row in rows)
    assert all(item.startswith("f") for item in rows[1]["items"]) and "b0" not in rows[0]["items"]
    vectors = np.load(tmp_path / "index" / "embeddings.npy")
    torch.testing.assert_close(torch.from_numpy(vectors), module.eval().items(torch.arange(16)).detach(), atol=1e-5, rtol=1e-4)
    with (source / "films.item").open("a") as file:
        file.write("f8\tblue film\n")
    with (source / "films.inter").open("a") as file:
        file.write("".join(f"u{user}\tf8\t0.5\n" for user in range(3)))
    encoded: list[int] = []
    items = module.items
    module.items = lambda numbers: encoded.extend(numbers.tolist()) or items(numbers)  # type: ignore[method-assign,func-returns-value]
    module.trainer.datamodule = data_of(tmp_path)  # type: ignore[attr-defined]
    ExportItemIndex(tmp_path / "index").on_predict_end(module.trainer, module)
    assert len(encoded) == 1 and len(np.load(tmp_path / "index" / "embeddings.npy")) == 17
    other = model(similarity="cosine")
    other.trainer = module.trainer
    with pytest.raises(ValueError, match="an index of another similarity"):
        ExportItemIndex(tmp_path / "index").on_predict_end(module.trainer, other)


@pytest.mark.parametrize("family", ["bert", "opt", "t5"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_official_checkpoints_load_whole_or_not_at_all(family: str, tuning: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = {**TINY[family]}
    config = transformers.AutoConfig.for_model(source.pop("model_type"), **source)
    network = transformers.T5EncoderModel(config) if family == "t5" else transformers.AutoModel.from_config(config)
    if tuning == "lora":
        peft = pytest.importorskip("peft")
        network = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=16))
        torch.nn.init.normal_(next(p for n, p in network.named_parameters() if "lora_B" in n))
    state = {f"module.llm.{name}": parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    torch.save(state, tmp_path / "valid_best.pth")
    targets = {"bert": ["query", "value"], "opt": ["q_proj", "v_proj"], "t5": ["q", "v"]}[family]
    from zoo.lm import LoRA

    kind = "encoder" if family == "t5" else None
    module = LLMRec(HFBackbone(dict(TINY[family]), kind=kind, tuning=tuning, lora=LoRA(4, 16, targets=targets)))
    module.load_official(tmp_path / "valid_best.pth")
    trained = [p for n, p in module.backbone.network.named_parameters() if p.requires_grad and "pooler" not in n]
    assert sum(float(p.double().sum()) for p in trained) == pytest.approx(
        sum(float(p.double().sum()) for n, p in state.items() if "pooler" not in n)
    )
    state.pop(next(name for name in state if "pooler" not in name))
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"cut\.pth does not fit the \d+ trained weights \(lacks"):
        module.load_official(tmp_path / "cut.pth")


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        SASRec(num_items=3, temperature=0.0)
    with pytest.raises(ValueError, match="set loss to in_batch"):
        SASRec(num_items=3, gather=True)
    with pytest.raises(ValueError, match="num_items is missing"):
        SASRec()
    with pytest.raises(ValueError, match="give the data the tokenizer"):
        fit(model(), data_of(tmp_path, None), tmp_path)
    with pytest.raises(ValueError, match="k=30 is more than the 8 candidates"):
        fit(SASRec(num_items=16, ks=(30,)), data_of(tmp_path, None), tmp_path)
    with pytest.raises(ValueError, match="recommend_domain='toys' is none of the data's: books, films"):
        Trainer(**QUIET).predict(SASRec(num_items=16, recommend_domain="toys"), data_of(tmp_path, None))
    with pytest.raises(ValueError, match="Popularity learns nothing"):
        fit(Popularity(ks=(1,)), data_of(tmp_path, None), tmp_path)
    with pytest.raises(ValueError, match="call use_tokenizer first"):
        model().encode(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="loss='hinge' must be one of"):
        SASRec(num_items=3, loss="hinge")  # type: ignore[arg-type]
