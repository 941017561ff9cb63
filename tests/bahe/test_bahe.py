"""BAHE on tiny language models: identities of the split, lists, padding, serving, FLOPs; the store; two processes; refusals."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import RankPool
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lm_models import TINY
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from torch.distributed import get_world_size, is_initialized
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamodules import TextHistories
from datamodules.text_histories import text_histories as data_module
from zoo.bahe import BAHE, Aggregator, AtomStore, AtomStoreRefresh, BlockSize, ClickHead, ClickRates, IDClicks, TokenCTR
from zoo.callbacks import JSONLWriter
from zoo.lm import HFBackbone
from zoo.lm.pooling import Pooling

QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1,
    "num_sanity_val_steps": 0,
}  # fmt: skip
FAMILIES = ("bert", "llama", "qwen2", "gpt2")
WORDS = ["red", "blue", "old", "new", "house", "river", "song", "film", "liked", "disliked", "warm", "cold"]
EXACT: dict[str, Any] = {"atol": 0, "rtol": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer of words, with a cls and a sep token; ``plain`` beside it has none."""
    folder = tmp_path_factory.mktemp("tokenizers")
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    words = Backend(models.WordLevel({**special, **{word: 4 + n for n, word in enumerate(WORDS)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, roles in (("plain", {}), ("bert", {"cls": "[CLS]", "sep": "[SEP]"})):
        if roles:
            words.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
            )
        (folder / name).mkdir()
        words.save(str(folder / name / "tokenizer.json"))
        (folder / name / "config.json").write_text('{"model_type": "bert"}')
        config = {f"{role}_token": token for role, token in {**roles, "pad": "[PAD]", "unk": "[UNK]"}.items()}
        (folder / name / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(folder / "bert")


def write_events(folder: Path, users: int = 12, events: int = 14) -> Path:
    """Events of two lists whose label is a matter of the text: "warm" is liked."""
    generator, rows = np.random.default_rng(0), []
    for time in range(events):
        for user in range(users):
            item = int(generator.integers(16))
            text = f"{WORDS[item % 4]} {WORDS[4 + item // 4]} {'warm' if item % 2 else 'cold'}"
            label = int(generator.random() < (0.9 if item % 2 else 0.1))
            rows.append(f"u{user},i{item},{time},{text},{label},{'liked' if label else 'disliked'}")
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,time,text,label,feature", *rows]) + "\n")
    return folder / "events.csv"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextHistories:
    monkeypatch.setattr(data_module, "cache_folder", lambda: tmp_path / "cache")
    return data_of(tmp_path)


def data_of(folder: Path, **options: Any) -> TextHistories:
    source = folder / "events.csv" if (folder / "events.csv").exists() else write_events(folder)
    return TextHistories(**{"source": str(source), "history": 4, "batch_size": 8, **options})


def backbone(tokenizer: str, family: str = "bert", **options: Any) -> HFBackbone:
    return HFBackbone({**TINY[family], "_attn_implementation": "sdpa"}, kind="encoder", tokenizer=tokenizer, **options)


def model(tokenizer: str, store: Path, family: str = "bert", n_low: int = 2, **options: Any) -> BAHE:
    seed_everything(0, verbose=False)
    sizes = {"num_features": 2, "num_users": 12, "num_items": 16, "max_behaviors": 8}
    head = ClickHead("product", dnn=(8,), dropout=0.2)
    given: dict[str, Any] = {**sizes, "head": head, "optimizer": partial(torch.optim.Adam, lr=1e-2), **options}
    return BAHE(backbone(tokenizer, family), n_low, str(store), **given)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(**{**QUIET, "default_root_dir": folder, "max_epochs": 1, "enable_checkpointing": False, **options})


def ready(module: BAHE, data: TextHistories, folder: Path) -> dict[str, torch.Tensor]:
    """Give a module the data's store, and return a batch with histories."""
    trainer(folder).test(module, data, verbose=False)
    module.eval()
    return dict(data.dataset("test").batch(list(range(6))))  # type: ignore[arg-type]


def aggregator(family: str, n_low: int = 1, tokenizer: str = "", **options: Any) -> tuple[Aggregator, Any]:
    """Aggregator of a tiny model in float64, and the lower blocks."""
    torch.manual_seed(0)
    whole = HFBackbone({**TINY[family], "_attn_implementation": "sdpa"}, kind="encoder").double().eval()
    low, high = whole.split(n_low)
    return Aggregator(high, 16, max_behaviors=8, **options).double().eval(), low  # type: ignore[arg-type]


def sequences(count: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of behaviours, and which slots hold one: 6, 3 and 0 of them."""
    vectors = torch.randn(count, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = torch.arange(length) < torch.tensor([6, 3, 0])[:count, None]
    return vectors, there


# The upper blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_low", [0, 1, 3])
def test_reading_the_lower_blocks_tokens_is_the_whole_model(family: str, n_low: int) -> None:
    """Were atoms single tokens with their places in the text, BAHE would be the token-level model."""
    high, low = aggregator(family, n_low)
    whole, _ = aggregator(family, 0)
    ids = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    expected = whole.pooling(whole.high(aggregator(family, 0)[1](ids, mask.long()), mask.long()), mask)
    torch.testing.assert_close(high(low(ids, mask.long()), mask), expected, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count_and_an_empty_list_is_zero_with_finite_gradients(family: str) -> None:
    for pooling in ("mean", "last", "learned"):
        own, _ = aggregator(family, pooling=pooling)
        vectors, there = sequences()
        vectors.requires_grad_()
        found = own(vectors, there)
        assert found.isfinite().all() and not found[2].any()
        torch.testing.assert_close(own(vectors[1:2, :3], there[1:2, :3]), found[1:2], atol=1e-6, rtol=1e-6)
        other = torch.where(there[..., None], vectors, 7.0)
        torch.testing.assert_close(own(other, there), found, atol=1e-6, rtol=1e-6)
        found.square().sum().backward()
        assert vectors.grad is not None and vectors.grad.isfinite().all() and not vectors.grad[2].any()
        assert all(p.grad is None or p.grad.isfinite().all() for p in own.parameters())


@pytest.mark.parametrize(("family", "is_set"), [("bert", True), ("llama", False), ("gpt2", True)])
def test_without_positions_the_order_is_lost_unless_the_blocks_have_rotary_ones(family: str, is_set: bool) -> None:
    vectors, there = sequences(1)
    own, _ = aggregator(family, causal=False)
    for matrix in own.high.parameters():
        matrix.data *= 10 if matrix.dim() == 2 else 1  # attention of weights of deviation 0.02 is nearly a mean
    if is_set:
        torch.testing.assert_close(own(vectors.flip(1), there), own(vectors, there))
    if own.positions_MD is not None:  # the table starts at 0, the set; trained, the order counts
        torch.nn.init.normal_(own.positions_MD)
    assert (own.positions_MD is not None) == is_set
    assert (own(vectors.flip(1), there) - own(vectors, there)).abs().max() > 1e-3
    if not is_set:  # rotary positions are relative: shifted by a slot that no query sees
        shifted, seen = torch.cat([vectors[:, :1], vectors], 1), torch.ones(1, 1, 7, 7, dtype=torch.bool)
        seen[..., 0] = False
        torch.testing.assert_close(own.high(shifted, seen)[:, 1:], own.high(vectors, seen[..., 1:, 1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_aggregator_does_not_see_what_is_newer(family: str, causal: bool) -> None:
    own, _ = aggregator(family, causal=causal)
    own.pooling = Pooling("cls", 16)  # the oldest
    vectors, there = sequences(1)
    changed = torch.cat([vectors[:, :3], -vectors[:, 3:]], 1)
    assert (own(changed, there) - own(vectors, there)).abs().max().item() == pytest.approx(0, abs=1e-7) if causal else True
    assert causal or (own(changed, there) - own(vectors, there)).abs().max() > 1e-3
    default, _ = aggregator(family)
    default.pooling = own.pooling
    assert default.causal == (family != "bert")
    if causal == default.causal:
        torch.testing.assert_close(default(vectors, there), own(vectors, there), **EXACT)


def test_rescaling() -> None:
    vectors, there = sequences()
    rms, _ = aggregator("bert", rescale="rms")
    torch.testing.assert_close(rms(10 * vectors, there), rms(vectors, there), atol=1e-5, rtol=1e-5)
    learned, _ = aggregator("bert", rescale="learned")
    torch.testing.assert_close(learned(vectors, there), aggregator("bert")[0](vectors, there))
    learned.scale.data *= 2  # type: ignore[union-attr]
    torch.testing.assert_close(learned(vectors, there), aggregator("bert")[0](2 * vectors, there))


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_of_the_formula(family: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3} if family != "gpt2" else {"n_embd": 64}
    config = {**TINY[family], **sizes, "num_key_value_heads": 2, "_attn_implementation": "eager", "use_sliding_window": False}
    whole = HFBackbone({k: v for k, v in config.items() if family in ("llama", "qwen2") or "key_value" not in k}, kind="encoder")
    high = Aggregator(whole.split(1)[1], 64, max_behaviors=16)  # type: ignore[arg-type]
    # The counter does not know the fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        high(torch.randn(4, 16, 64), torch.ones(4, 16, dtype=torch.bool))
    formula = BlockSize.of(whole.network.config).flops([16] * 4, blocks=2)
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.02)


# The model


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_are_read_independently_and_scores_of_kept_vectors_are_the_whole_pass(
    family: str, tokenizer: str, data: TextHistories, tmp_path: Path
) -> None:
    module = model(tokenizer, tmp_path / "store", family, atom_pooling="mean")
    batch = ready(module, data, tmp_path)
    user, item = module.encode(batch["behaviors"], batch["item"])
    for place in range(2):
        alone, _ = module.encode(batch["behaviors"][:, [place]], batch["item"])
        torch.testing.assert_close(alone[:, 0], user[:, place], atol=1e-6, rtol=1e-5)
    swapped, _ = module.encode(batch["behaviors"].flip(1), batch["item"])
    torch.testing.assert_close(swapped.flip(1), user, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module.encode(batch["item"][:, None, None], batch["item"])[0][:, 0], item)
    found = module.predict_step(batch, 0)
    torch.testing.assert_close(module(batch).sigmoid(), found["probability"], atol=1e-6, rtol=1e-6)
    again = module.score(found["user_vectors"], found["item_vector"], batch)
    torch.testing.assert_close(again.sigmoid(), found["probability"], atol=1e-6, rtol=1e-6)
    empty = module.encode(torch.zeros_like(batch["behaviors"]), batch["item"])[0]
    assert not empty.any() and module({**batch, "behaviors": torch.zeros_like(batch["behaviors"])}).isfinite().all()


def test_stored_vectors_are_those_of_the_lower_blocks_in_batches_of_any_size(
    tokenizer: str, data: TextHistories, tmp_path: Path
) -> None:
    module = model(tokenizer, tmp_path / "store")
    ready(module, data, tmp_path)
    texts, encoder = data.atoms[1:], module.encoder
    whole = encoder(texts)
    encoder.batch_size = 1
    torch.testing.assert_close(encoder(texts), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(texts[::-1]), whole.flip(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.vectors(torch.arange(1, len(data.atoms))), whole, atol=1e-3, rtol=1e-3)
    assert not module.vectors(torch.tensor([0])).any()
    assert data.atoms[0] == "" and data.dedup_factor > 2


def test_atoms_by_themselves_are_blocks_of_a_packed_row(tokenizer: str, tmp_path: Path) -> None:
    module = model(tokenizer, tmp_path / "store", "llama")
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    block = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None] & torch.ones(5, 5, dtype=torch.bool).tril()
    whole = backbone(tokenizer, "llama", first_n=2).eval()
    packed = whole.split(2)[0].network(input_ids=ids, attention_mask=block, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))  # type: ignore[operator]
    alone = torch.cat([module.encoder.low(ids[:, :2]), module.encoder.low(ids[:, 2:])], 1)
    torch.testing.assert_close(packed.last_hidden_state, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("n_low", "head"), [(2, ClickHead("dcn", (8,), 0.0)), (3, ClickHead("none", (8,))),
                                             (0, ClickHead("product", (8,), id_dim=4))])  # fmt: skip
def test_training_moves_the_upper_part_alone(
    n_low: int, head: ClickHead, tokenizer: str, data: TextHistories, tmp_path: Path
) -> None:
    module = model(tokenizer, tmp_path / "store", n_low=n_low, head=head)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    frozen = module.encoder.fingerprint
    fit = trainer(tmp_path)
    fit.fit(module, data)
    assert module.encoder.fingerprint == frozen and not module.encoder.low.training
    assert AtomStore.open(tmp_path / "store").verify() == len(data.atoms) - 1
    moved = {name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"network", "aggregator"}
    trained = [name for name, p in module.named_parameters() if p.requires_grad and "aggregator.high" in name]
    assert len({name.split("layer.")[1][0] for name in trained}) == 3 - n_low if n_low < 3 else not trained
    fit.save_checkpoint(tmp_path / "one.ckpt")
    kept = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert not [name for name in kept["state_dict"] if "embeddings" in name or "low" in name]
    again, shared = BAHE.load_from_checkpoint(tmp_path / "one.ckpt"), BAHE.from_pretrained(module.save_pretrained(tmp_path / "s"))
    batch = ready(module, data, tmp_path)
    for other in (again, shared):
        ready(other, data, tmp_path)
        assert torch.equal(other(batch), module(batch))


def test_it_learns_from_texts_and_the_plain_baselines_stand_beside_it(
    tokenizer: str, data: TextHistories, tmp_path: Path
) -> None:
    module = model(tokenizer, tmp_path / "store", encoder_lr=1e-2)
    fit = trainer(tmp_path, max_epochs=8)
    fit.fit(module, data)
    (found,) = fit.test(module, data, verbose=False)
    names = ("auc", "log_loss", "gauc", "gauc_users", "gauc_left_out", "rates_auc")
    assert set(found) == {f"test/{name}" for name in names}
    assert found["test/auc"] > 0.7 and found["test/gauc_users"] + found["test/gauc_left_out"] <= 12
    train, test = (data.dataset(split) for split in ("train", "test"))  # type: ignore[arg-type]
    rates = ClickRates(*(train.column(name) for name in ("user_id", "item_id", "label")))
    score, label = rates(test.column("user_id"), test.column("item_id")), test.column("label")
    pairs = (score[label == 1][:, None] - score[label == 0]).sign()
    assert found["test/rates_auc"] == pytest.approx((pairs + 1).mean().item() / 2, abs=1e-6)


@pytest.mark.parametrize("kind", ["tokens", "ids"])
def test_baselines_learn_on_the_same_data_behind_the_same_head(
    kind: str, tokenizer: str, data: TextHistories, tmp_path: Path
) -> None:
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {"num_features": 2, "num_users": 12, "num_items": 16, "encoder_lr": 5e-3,
                               "optimizer": partial(torch.optim.Adam, lr=1e-2)}  # fmt: skip
    module: Any = IDClicks(ClickHead(dnn=(8,), dropout=0.0, id_dim=4), **options)
    if kind == "tokens":
        options["head"] = ClickHead("product", dnn=(8,), dropout=0.0)
        module = TokenCTR(backbone(tokenizer, activation_checkpointing=True), max_tokens=12, **options)
    fit = trainer(tmp_path, max_epochs=5, limit_val_batches=0)
    fit.fit(module, data)
    assert fit.test(module, data, verbose=False)[0]["test/auc"] > 0.7
    if kind == "tokens":
        ids, mask = module.sequences(torch.tensor([[1, 2, 3, 4], [1, 0, 0, 0], [0, 0, 0, 0]]))
        one = module.backbone.tokenizer(data.atoms[1])["input_ids"]
        assert ids.shape == (3, 12) and ids[1, : len(one)].tolist() == one and mask[2].sum() == 2
        assert ids[0, -1] == 2 and not module.encode(torch.zeros(1, 2, 4).long(), torch.tensor([1]))[0].any()


def test_a_hybrid_starts_with_the_predictions_of_the_model_on_ids(tokenizer: str, data: TextHistories, tmp_path: Path) -> None:
    ids: Any = IDClicks(ClickHead(dnn=(8, 4), dropout=0.0, id_dim=4), num_features=2, num_users=12, num_items=16)
    trainer(tmp_path, max_steps=5).fit(ids, datamodule=data)
    ids.trainer.save_checkpoint(tmp_path / "ids.ckpt")
    options = {"num_users": 12, "num_items": 16, "ids_from": tmp_path / "ids.ckpt"}
    hybrid = model(tokenizer, tmp_path / "store", head=ClickHead(dnn=(8, 4), dropout=0.0, id_dim=4), **options)
    trainer(tmp_path, max_steps=0).fit(hybrid, datamodule=data)
    batch = data.dataset("train").batch(range(6))
    torch.testing.assert_close(hybrid.eval()(batch), ids.eval()(batch))
    trainer(tmp_path, max_steps=2).fit(hybrid, datamodule=data)
    assert hybrid.network.dnn.layers[0].weight[:, 8:].abs().sum() > 0  # type: ignore[union-attr,index]
    other = model(tokenizer, tmp_path / "store", head=ClickHead(dnn=(8,), dropout=0.0, id_dim=4), **options)
    with pytest.raises(ValueError, match="is another one: train IDClicks with the same head"):
        trainer(tmp_path, max_steps=1).fit(other, datamodule=data)


def test_a_lower_part_that_is_trained_refreshes_its_store(tokenizer: str, data: TextHistories, tmp_path: Path) -> None:
    module = model(tokenizer, tmp_path / "store", train_low=True, encoder_lr=1e-2)
    folders = []
    use_store = module.use_store
    module.use_store = lambda: folders.append((store := use_store()).folder) or store  # type: ignore[method-assign,func-returns-value]
    fit = trainer(tmp_path, max_steps=7, max_epochs=-1, callbacks=[AtomStoreRefresh(every_n_steps=2)])
    before = module.encoder.fingerprint["weights"]
    fit.fit(module, data)
    assert module.encoder.fingerprint["weights"] != before
    assert len(set(folders)) == 4 and [folder.is_dir() for folder in folders] == [False, False, True, True]
    stale = module.vectors(torch.arange(1, 4))
    fit.save_checkpoint(tmp_path / "low.ckpt")
    again = BAHE.load_from_checkpoint(tmp_path / "low.ckpt")
    batch = ready(again, data, tmp_path)
    assert again._atoms.folder == folders[-1] and torch.equal(again.vectors(torch.arange(1, 4)), stale)  # type: ignore[union-attr]
    module.eval()
    assert torch.equal(again(batch), module(batch))


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def test_a_run_that_is_continued_ends_where_a_whole_one_does(tokenizer: str, data: TextHistories, tmp_path: Path) -> None:
    ends = []
    for path in (None, tmp_path / "4.ckpt"):
        module = model(tokenizer, tmp_path / "store")
        fit = trainer(tmp_path, max_steps=9, callbacks=[] if path else [SaveAt(tmp_path / "4.ckpt")], limit_val_batches=0)
        fit.fit(module, data, ckpt_path=path, weights_only=True)
        ends.append(LightningModule.state_dict(module))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def run(folder: Path, tokenizer: str) -> dict[str, Any]:
    """Fit, test and predict on the ranks of the present group."""
    data_module.cache_folder = lambda: folder / "cache"  # type: ignore[assignment]
    ranks = get_world_size() if is_initialized() else 1
    torch.set_default_dtype(torch.float64)
    module, data = model(tokenizer, folder / f"store{ranks}"), data_of(folder, batch_size=8 // ranks)
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "precision": "64-true"}
    fit = trainer(folder / f"run{ranks}", callbacks=[JSONLWriter()], **options)
    fit.fit(module, data)
    (test,) = fit.test(module, data, verbose=False)
    fit.predict(module, data, return_predictions=False)
    return {"weights": LightningModule.state_dict(module), "test": dict(test)}


def test_two_ranks_equal_one_process(pool: RankPool, tokenizer: str, tmp_path: Path) -> None:
    write_events(tmp_path)
    (one,) = pool.run(run, tmp_path, tokenizer, world_size=1)
    for rank in pool.run(run, tmp_path, tokenizer, world_size=2):
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, one["weights"][name], rtol=1e-9, atol=1e-9)
        assert rank["test"] == pytest.approx(one["test"], rel=1e-6)
    stores = [AtomStore.open(tmp_path / f"store{ranks}") for ranks in (1, 2)]
    whole = torch.arange(len(stores[0]) + 1)
    assert len(stores[0]) == len(stores[1]) and stores[0].fingerprint == stores[1].fingerprint
    torch.testing.assert_close(stores[0].read(whole), stores[1].read(whole), atol=1e-3, rtol=1e-3)
    lines = [[json.loads(line) for line in (tmp_path / f"run{n}/predictions/predictions.jsonl").read_text().splitlines()]
             for n in (1, 2)]  # fmt: skip
    assert [line["index"] for line in lines[0]] == list(range(len(lines[0]))) == [line["index"] for line in lines[1]]
    for own, other in zip(*lines, strict=True):
        assert own["probability"] == pytest.approx(other["probability"], abs=1e-6)
        assert np.shape(own["user_vectors"]) == (2, 16) and own["item_vector"] == pytest.approx(other["item_vector"], abs=1e-6)


# Refusals


@pytest.mark.parametrize(("options", "message"), [
    ({"n_low": 4}, r"n_low=4 must lie in 0 \.\.\. 3"),
    ({"family": "t5"}, "models of type t5 are not cut: take one of bert, .* split_network in zoo/lm/split.py"),
    ({"family": "llama", "pooling": "cls"}, "set causal=false"),
    ({"positions": "rotary"}, "positions='rotary' must be one of"),
    ({"num_features": None}, "num_features is missing"),
    ({"head": ClickHead(id_dim=4), "num_items": None}, "num_items is missing"),
])  # fmt: skip
def test_models_that_cannot_be_are_refused(options: dict[str, Any], message: str, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        model(tokenizer, tmp_path, **options)
    assert len(str(refusal.value)) <= 300
    with pytest.raises(ValueError, match="interaction='cnn' must be one of none, product, dcn"):
        ClickHead("cnn")  # type: ignore[arg-type]


def test_cls_without_such_a_token_is_refused(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a cls token, which this tokenizer lacks"):
        model(str(Path(tokenizer).with_name("plain")), tmp_path, atom_pooling="cls")


def test_stores_and_data_that_do_not_fit_are_refused(tokenizer: str, data: TextHistories, tmp_path: Path) -> None:
    module = model(tokenizer, tmp_path / "store")
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"holds vectors of .*n_low=2.* and those of .*n_low=1.* are needed"):
        trainer(tmp_path).fit(model(tokenizer, tmp_path / "store", n_low=1), data)
    with pytest.raises(ValueError, match=r"trained on vectors of max_tokens=32, but these are of max_tokens=7"):
        BAHE.load_from_checkpoint(tmp_path / "one.ckpt", max_tokens=7)
    others = data_of(tmp_path, item_template="a film: {text}")
    again = BAHE.load_from_checkpoint(tmp_path / "one.ckpt", store=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="trained on vectors of texts="):
        trainer(tmp_path).test(again, others, verbose=False)
    with pytest.raises(ValueError, match="up to 9 behaviours of a list, BAHE has 8 positions"):
        trainer(tmp_path).fit(model(tokenizer, tmp_path / "store"), data_of(tmp_path, history=9))
    with pytest.raises(ValueError, match=r"give --model\.num_features 2"):
        trainer(tmp_path).fit(model(tokenizer, tmp_path / "store", num_features=3), data)
    with pytest.raises(ValueError, match="the lower blocks do not change"):
        trainer(tmp_path, callbacks=[AtomStoreRefresh()]).fit(module, data)
    with pytest.raises(ValueError, match="8 positions, given are 9"):
        module.aggregator(torch.zeros(1, 9, 16), torch.ones(1, 9, dtype=torch.bool))


@pytest.mark.parametrize(("changed", "message"), [
    ({"label": torch.tensor([2.0])}, "the label 2 of a batch is not 0 or 1"),
    ({"behaviors": torch.zeros(1, 3, 4, dtype=torch.int64)}, r"needs batches with behaviors \(B, 2, M\)"),
    ({"item": torch.tensor([-1])}, "has others in item"),
    ({"user_id": torch.tensor([13])}, "has 13 rows for user_id, the batch has 13"),
])  # fmt: skip
def test_batches_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tokenizer: str, tmp_path: Path) -> None:
    module = model(tokenizer, tmp_path, head=ClickHead(dnn=(4,), id_dim=2))
    batch = {"behaviors": torch.zeros(1, 2, 4, dtype=torch.int64), "label": torch.ones(1)}
    batch |= {name: torch.zeros(1, dtype=torch.int64) for name in ("item", "user_id", "item_id", "index")}
    module.on_before_batch_transfer(batch, 0)
    with pytest.raises(ValueError, match=message):
        module.on_before_batch_transfer({**batch, **changed}, 0)
