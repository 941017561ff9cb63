"""Known answers of each published convention: the answer "a b EOS pad" and one without an end."""

import pytest
import torch

from zoo.rlhf import CONVENTIONS, PPO, Experience, answer_mask, find_convention

TOKENS = torch.tensor([[5, 6, 2, 0], [5, 6, 7, 8], [2, 0, 0, 0]])
KL = torch.tensor([[0.1, 0.2, 0.3, 9.0], [0.1, 0.2, 0.3, 0.4], [0.6, 9, 9, 9]], dtype=torch.float64)
SCORE = torch.tensor([8.0, -1.0, 2.0], dtype=torch.float64)
# Tokens trained, states of the critic's loss, place of the score, and sum of a row's KL as a reward.
KNOWN = {
    "zoo": (["1110", "1111", "1000"], ["1110", "1111", "1000"], [2, 3, 0], [0.6, 1.0, 0.6], 5.0),
    "dschat": (["1100", "1111", "0000"], ["1100", "1111", "0000"], [2, 3, 0], [0.6, 1.0, 0.6], 5.0),
    "app": (["1110", "1111", "1000"], ["1110", "1111", "1000"], [2, 3, 0], [0.2, 0.25, 0.6], 8.0),
    "trl": (["1110", "1111", "1000"], ["1111", "1111", "1100"], [3, 3, 1], [0.6, 1.0, 0.6], 8.0),
}
BETA = {"zoo": 0.05, "dschat": 0.1, "app": 0.02, "trl": 0.05}


def bits(rows: list[str]) -> list[list[bool]]:
    return [[letter == "1" for letter in row] for row in rows]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_known_answers(name: str) -> None:
    trained, states, places, kl, top = KNOWN[name]
    mask, ended = answer_mask(TOKENS, [2])
    zero = torch.zeros(3, 4, dtype=torch.float64)
    experience = Experience(
        zero[:, :1].long(), zero[:, :1], TOKENS, mask, torch.arange(3), KL, SCORE, ended, reference_logp=zero, value=zero
    )
    algorithm = PPO(convention=name)  # type: ignore[arg-type]
    assert algorithm.action_mask(experience).tolist() == bits(trained)
    assert algorithm.value_mask(experience).tolist() == bits(states)
    assert algorithm.kl_coefficient == BETA[name]
    reward = algorithm.targets(experience, 1, 1.0).reward
    without = algorithm.targets(experience, 1, 0.0).reward
    assert [row.nonzero().item() for row in without] == places
    torch.testing.assert_close(without.sum(1), SCORE.clamp(max=top))
    torch.testing.assert_close((without - reward).sum(1), torch.tensor(kl, dtype=torch.float64))
    assert algorithm.whiten == {"zoo": "minibatch", "trl": "rollout"}.get(name, "none")


def test_an_answer_without_tokens_takes_no_score_anywhere() -> None:
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    for convention in CONVENTIONS.values():
        assert not convention.reward_mask(nothing).any()


def test_unknown_conventions_are_refused() -> None:
    with pytest.raises(ValueError, match="convention='verl' is not known: choose one of zoo, dschat, app, trl"):
        find_convention("verl")  # type: ignore[arg-type]
