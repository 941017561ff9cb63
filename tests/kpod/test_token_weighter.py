"""Masks keep what they say; a predictor reads the prefix that it is given, in one row or in rows of its own."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_models import TINY
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.kpod.token_weighter import (
    DividedRows,
    MaskLearner,
    WeightHead,
    divide_rows,
    draw_prefixes,
    relaxed_mask,
)  # fmt: skip
from zoo.ling import LingBackbone
from zoo.ling.config import LingConfig
from zoo.lm import Backbone, HFBackbone

LING = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 24,
        "pad_token_id": 0, "eos_token_id": 2, "num_shared_experts": 1, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows() -> dict[str, Tensor]:
    """Two examples: 2 and 1 tokens of question, 4 and 3 of rationale, 3 and 2 of answer; one place of padding."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 2], [13, 14, 15, 16, 17, 2, 0, 0, 0]])
    steps = torch.tensor([[-1, -1, 0, 0, 1, 1, -1, -1, -1], [-1, 0, 0, 1, -1, -1, -1, -1, -1]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, 10, 11, 12, 2], [-100, 14, 15, 16, 17, 2, -100, -100, -100]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels, "step_ids": steps}


def backbone(family: str) -> Backbone:
    if family == "ling":
        return LingBackbone(LingConfig(**LING))
    return HFBackbone({**TINY[family], "decoder_start_token_id": 0})


def learner(family: str = "llama", **options: object) -> MaskLearner:
    torch.manual_seed(0)
    return MaskLearner(backbone(family), heads=2, **options).eval()  # type: ignore[arg-type]


def random(epoch: int = 0) -> SampleRandom:
    return SampleRandom(0, torch.arange(2), epoch)


# Masks


@settings(max_examples=10, deadline=None)
@given(st.floats(-4, 4), st.floats(0.05, 20))
def test_hard_mask_keeps_a_token_with_its_weight_at_every_temperature(logit: float, tau: float) -> None:
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mask = relaxed_mask(torch.full_like(uniform, logit), uniform, tau, hard=True)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    weight = torch.sigmoid(torch.tensor(logit)).item()
    assert mask.mean().item() == pytest.approx(weight, abs=5e-5)


def test_relaxed_mask_becomes_hard_as_the_temperature_falls_and_both_have_its_gradient() -> None:
    logit = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(relaxed_mask(logit, uniform, 1e-6), relaxed_mask(logit, uniform, 1.0, hard=True))
    soft, hard = (torch.autograd.grad(relaxed_mask(logit, uniform, 0.7, h).sum(), logit)[0] for h in (False, True))
    torch.testing.assert_close(soft, hard, rtol=0, atol=0)
    assert bool(torch.isfinite(relaxed_mask(logit, torch.zeros(50), 1.0)).all())


# Prefixes


def test_rows_are_taken_apart() -> None:
    divided = divide_rows(rows())
    assert divided.ids_BP.tolist() == [[5, 6, 7, 8, 9, 10], [13, 14, 15, 16, 17, 2]]
    assert divided.rationale_BP.long().tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]
    assert divided.question_B.tolist() == [2, 1] and divided.rationale_B.tolist() == [4, 3]
    assert divided.answer_BA.tolist() == [[11, 12, 2], [17, 2, -100]]


def test_prefixes_are_uniform_and_a_sample_has_its_own_in_every_batch() -> None:
    length = torch.full((20_000,), 5)
    drawn, weight = draw_prefixes(length, 3, SampleRandom(0, torch.arange(20_000)))
    share = torch.bincount(drawn.flatten()) / drawn.numel()
    torch.testing.assert_close(share[1:].double(), torch.full((5,), 0.2), rtol=0, atol=0.01)
    assert share[0] == 0 and torch.equal(weight, torch.full((20_000, 3), 1 / 3))
    alone, _ = draw_prefixes(length[:1], 3, SampleRandom(0, torch.tensor([77])))
    assert torch.equal(alone[0], drawn[77])
    every, weight = draw_prefixes(torch.tensor([3, 2]), "all", random())
    assert every.tolist() == [[1, 2, 3], [1, 2, 2]]
    torch.testing.assert_close(weight.double(), torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "ling", "t5"])
def test_all_prefixes_in_one_pass_are_passes_of_their_own(family: str) -> None:
    own, batch = learner(family), rows()
    divided = divide_rows(batch)
    keep = torch.rand(divided.ids_BP.shape, generator=torch.Generator().manual_seed(0))
    prefix, _ = draw_prefixes(divided.rationale_B, "all", random())
    together = own.answer_loss(divided, keep, prefix, torch.ones(prefix.shape))
    expected = torch.zeros(2)
    model = own.predictor.backbone
    for row in range(2):
        question, answer = int(divided.question_B[row]), divided.answer_BA[row]
        answer = answer[answer != -100]
        for k in prefix[row].tolist():
            end = question + k
            x = own.embedding(divided.ids_BP[row, :end])
            kept = keep[row, :end, None].where(divided.rationale_BP[row, :end, None], 1.0)
            x = (kept * x + (1 - kept) * own.mask_embedding)[None]
            if family == "t5":
                hidden = model(None, decoder_ids_BT=torch.cat([torch.tensor([0]), answer[:-1]])[None], embeddings_BTE=x)[0]
            else:
                x = torch.cat([x, model.input_embedding(answer[None, :-1])], 1)
                hidden = model(None, embeddings_BTE=x)[0, end - 1 :]
            expected[row] += torch.nn.functional.cross_entropy(model.logits(hidden), answer, reduction="sum")
    torch.testing.assert_close(together, expected, rtol=1e-10 if family in ("gpt2", "opt") else 1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "ling", "t5"])
def test_vectors_of_ids_are_read_as_the_ids(family: str) -> None:
    model, ids = backbone(family).eval(), rows()["input_ids"]
    mask = (ids > 0).long()
    by_vectors = model(None, mask, embeddings_BTE=model.input_embedding(ids))
    torch.testing.assert_close(by_vectors, model(ids, mask), rtol=0, atol=0)


# What is read


def test_nothing_masked_is_the_plain_rationale_and_everything_masked_hides_it() -> None:
    own = learner("gpt2")
    divided = divide_rows(rows())
    full = (divided.rationale_B[:, None], torch.ones(2, 1))
    ids, labels = rows()["input_ids"], rows()["labels"].where(rows()["step_ids"] < 0, -100)
    logits = own.predictor.backbone.logits(own.predictor.backbone(ids))[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(own.answer_loss(divided, torch.ones(2, 6), *full), plain)
    own.embedding.weight.requires_grad_()
    loss = own.answer_loss(divided, torch.zeros(2, 6), *full).sum()
    gradient = torch.autograd.grad(loss, own.embedding.weight)[0].abs().sum(1)
    assert gradient[[5, 6, 13]].min() > 0 and gradient[[7, 8, 9, 10, 14, 15, 16]].max() == 0
    other = divided._replace(ids_BP=divided.ids_BP.where(~divided.rationale_BP, 30))
    hidden = [own.answer_loss(each, torch.zeros(2, 6), *full) for each in (divided, other)]
    assert torch.equal(*hidden)


def test_tokens_behind_the_prefix_and_padding_are_not_read() -> None:
    own, divided = learner("llama"), divide_rows(rows())
    prefix, weight = torch.tensor([[2], [1]]), torch.ones(2, 1)
    ids = divided.ids_BP.clone()
    ids[0, 4:], ids[1, 2:] = 33, 34
    losses = [own.answer_loss(each, torch.ones(2, 6), prefix, weight) for each in (divided, divided._replace(ids_BP=ids))]
    assert torch.equal(*losses)
    narrow = DividedRows(*(part[1:] for part in divided))
    narrow = narrow._replace(
        ids_BP=narrow.ids_BP[:, :4], rationale_BP=narrow.rationale_BP[:, :4], answer_BA=narrow.answer_BA[:, :2]
    )
    alone = own.answer_loss(narrow, torch.ones(1, 4), prefix[1:], weight[1:])
    torch.testing.assert_close(alone, losses[0][1:], rtol=1e-6, atol=0)


def test_weights_depend_on_the_rationale_alone_and_the_parts_of_the_loss_are_means() -> None:
    own, divided = learner("llama"), divide_rows(rows())
    found = own(divided, random(), "all")
    other = divided._replace(ids_BP=divided.ids_BP.where(divided.rationale_BP, 31))
    weight_BP = own.logits(divided).sigmoid()
    assert torch.equal(own.logits(other).sigmoid()[divided.rationale_BP], weight_BP[divided.rationale_BP])
    assert 0.5 < weight_BP[divided.rationale_BP].mean() < 0.95  # 0.82 but for the weights' part
    unmasked = own(divided, random(), "all", masked=False)
    assert unmasked[1].tolist() == [1, 1] and bool((found[1] < 1).all())
    (found[0] + found[1]).sum().backward()
    trained = {name for name, p in own.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert {"mask_embedding", "head.query_key_value.weight", "head.perceptron.3.bias"} <= trained
    assert "embedding.weight" not in trained


def test_draws_are_those_of_the_sample_in_any_batch() -> None:
    own, divided = learner("gpt2"), divide_rows(rows())
    both = own(divided, SampleRandom(0, torch.tensor([4, 9]), 1), 2)
    second = DividedRows(*(part[1:] for part in divided))
    alone = own(second, SampleRandom(0, torch.tensor([9]), 1), 2)
    for one, two in zip(alone, both, strict=True):
        torch.testing.assert_close(one, two[1:])


def test_predictor_of_another_width_and_kind() -> None:
    narrow = HFBackbone({**TINY["llama"], "hidden_size": 8})
    own = MaskLearner(narrow, backbone("t5"), heads=2)
    assert own.predictor.projection.weight.shape == (16, 8)
    loss = own(divide_rows(rows()), random(), 2)[0]
    assert loss.shape == (2,) and bool(torch.isfinite(loss).all())
    with pytest.raises(ValueError, match="an encoder generates no text"):
        MaskLearner(narrow, HFBackbone(dict(TINY["bert"])), heads=2)
    with pytest.raises(ValueError, match="heads=8: twice that must divide the width 24"):
        WeightHead(24)


def test_predictor_is_a_copy_of_the_student() -> None:
    student = HFBackbone(dict(TINY["llama"]))
    before = copy.deepcopy(student.state_dict())
    own = MaskLearner(student, heads=2)
    for parameter in own.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
