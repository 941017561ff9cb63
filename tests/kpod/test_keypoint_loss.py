"""The loss without weights and given steps is fine-tuning as transformers has it; given steps are read and not learned."""

from collections.abc import Iterator

import pytest
import torch
from lm_models import TINY
from torch import Tensor

from zoo.kpod.keypoint_loss import keypoint_weights, move_given_steps, supervised_labels, weighted_nll
from zoo.lm import HFBackbone

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 2], [13, 14, 15, 16, 17, 18, 2, 0, 0]])
STEPS = torch.tensor([[-1, -1, 0, 0, 1, 2, -1, -1, -1], [-1, 0, 1, 1, 2, -1, -1, -1, -1]])
LABELS = IDS.where((STEPS >= 0) | torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0, 0]]).bool(), -100)
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": LABELS, "step_ids": STEPS}
GIVEN = torch.tensor([2, 1])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model() -> HFBackbone:
    return HFBackbone(dict(TINY["gpt2"])).eval()


def weights(seed: int = 0) -> Tensor:
    return torch.rand(IDS.shape, generator=torch.Generator().manual_seed(seed)).where(STEPS >= 0, 0.0)


def nll(logits: Tensor, given: Tensor, weight: Tensor, labels: Tensor = LABELS, **options: object) -> tuple[Tensor, Tensor]:
    factors = keypoint_weights(weight, STEPS, **options)  # type: ignore[arg-type]
    return weighted_nll(logits[:, :-1], supervised_labels(labels, STEPS, given)[:, 1:], factors[:, 1:])


NONE, ALL = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 3])


def test_loss_and_gradients_without_weights_and_given_steps_are_those_of_transformers() -> None:
    ours, theirs = model(), model()
    total, count = nll(ours.logits(ours(IDS)), NONE, torch.ones(IDS.shape))
    (total / count).backward()
    expected = theirs.network(input_ids=IDS, labels=LABELS).loss
    expected.backward()
    torch.testing.assert_close(total / count, expected, check_dtype=False, atol=1e-6, rtol=0)
    for (name, one), other in zip(ours.network.named_parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, atol=1e-6, rtol=0)


def test_only_the_answer_is_learned_with_weights_of_zero_or_all_steps_given() -> None:
    logits = model().logits(model()(IDS))
    answer = LABELS.where(STEPS < 0, -100)
    alone, number = weighted_nll(logits[:, :-1], answer[:, 1:], torch.ones(2, 8))
    zero, count = nll(logits, NONE, torch.zeros(IDS.shape))
    given, given_count = nll(logits, ALL, weights())
    torch.testing.assert_close(zero, alone)
    torch.testing.assert_close(given, alone)
    assert (int(number), int(given_count), int(count)) == (5, 5, 13)
    twice, _ = nll(logits, ALL, weights(), answer_weight=2.0)
    torch.testing.assert_close(twice, 2 * alone)


def test_given_steps_are_context() -> None:
    network = model()
    logits = network.logits(network(IDS)).detach().requires_grad_()
    loss, _ = nll(logits, GIVEN, weights())
    gradient = torch.autograd.grad(loss, logits)[0].abs().sum(-1)
    learned = supervised_labels(LABELS, STEPS, GIVEN) != -100
    assert torch.equal(gradient[:, :-1] > 0, learned[:, 1:]) and gradient[:, -1].max() == 0
    is_given = (STEPS >= 0) & ~learned
    other_labels, _ = nll(logits, GIVEN, weights(), labels=LABELS.where(~is_given, 30))
    assert torch.equal(other_labels, loss)
    changed = network.logits(network(IDS.where(~is_given, 30)))
    assert abs(float(nll(changed, GIVEN, weights())[0] - loss)) > 1e-3


def test_sums_over_disjoint_steps_add_up() -> None:
    logits = model().logits(model()(IDS))
    answer, _ = nll(logits, ALL, weights())
    parts = torch.zeros(())
    for step in range(3):
        only, _ = nll(logits, NONE, weights(), labels=LABELS.where(step == STEPS, -100))
        parts = parts + only
    torch.testing.assert_close(parts + answer, nll(logits, NONE, weights())[0])


def test_norm_and_floor() -> None:
    factors = keypoint_weights(weights(), STEPS, "mean1")
    for row in range(2):
        assert factors[row][STEPS[row] >= 0].mean().item() == pytest.approx(1)
    assert torch.equal(factors[STEPS < 0], torch.ones(int((STEPS < 0).sum())))
    torch.testing.assert_close(keypoint_weights(3 * weights(), STEPS, "mean1"), factors)
    assert keypoint_weights(weights(), STEPS, floor=0.4)[STEPS >= 0].min() == 0.4
    assert bool(torch.isfinite(keypoint_weights(0 * weights(), STEPS, "mean1")).all())


def test_encoder_reads_the_given_steps_and_the_decoder_writes_the_rest() -> None:
    moved = move_given_steps(BATCH, keypoint_weights(weights(), STEPS), GIVEN, start_id=1, pad_id=0)
    assert moved["input_ids"].tolist() == [[5, 6, 7, 8, 9], [13, 14, 0, 0, 0]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert moved["decoder_input_ids"].tolist() == [[1, 10, 11, 12, 2, 0], [1, 15, 16, 17, 18, 2]]
    assert moved["labels"].tolist() == [[-100, 10, 11, 12, 2, -100], [-100, 15, 16, 17, 18, 2]]
    assert torch.equal(moved["weights"][1, 1:4], weights()[1, 2:5]) and moved["weights"][1, 4] == 1


def test_loss_of_an_encoder_decoder_student_without_given_steps_is_that_of_transformers() -> None:
    student = HFBackbone({**TINY["t5"], "decoder_start_token_id": 0}).eval()
    moved = move_given_steps(BATCH, keypoint_weights(torch.ones(IDS.shape), STEPS), NONE, start_id=0, pad_id=0)
    vectors = student(moved["input_ids"], moved["attention_mask"], decoder_ids_BT=moved["decoder_input_ids"])
    total, count = weighted_nll(student.logits(vectors[:, :-1]), moved["labels"][:, 1:], moved["weights"][:, 1:])
    theirs = student.network(
        input_ids=moved["input_ids"], attention_mask=moved["attention_mask"], labels=moved["labels"][:, 1:].contiguous()
    ).loss
    torch.testing.assert_close(total / count, theirs, check_dtype=False, atol=1e-6, rtol=0)
