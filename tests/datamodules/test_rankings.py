"""Rankings of several answers: batches, pairs as rankings of two, epochs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf.test_rlhf import DENSE

from datamodules import Preferences
from datamodules.text.tokenizer import ByteTokenizer
from zoo.ling import LingBackbone
from zoo.rlhf import RewardModel

EOS, PAD = ByteTokenizer().eos_id, ByteTokenizer().pad_id


def data(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Preferences:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = Preferences(path, **{"tokenizer": "byte", "seq_len": 128, "batch_size": 4, "val_fraction": 0.0, **options})
    module.setup("fit")
    return module


def rankings(count: int, answers: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}:", "ranking": ["a" * (k + 1) for k in range(answers)]} for n in range(count)]


def test_answers_are_in_their_order_behind_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "ranking": ["best", "b", "cc"]}, {"prompt": "longer", "ranking": ["x", "yy", "z"]}]
    batch = next(iter(data(tmp_path, rows, batch_size=2).train_dataloader()))
    assert batch["ranked_input_ids"].shape == batch["ranked_attention_mask"].shape == (2, 3, len("longeryy") + 1)
    for index, ids_KT, mask_KT in zip(
        *(batch[name] for name in ("index", "ranked_input_ids", "ranked_attention_mask")), strict=True
    ):
        for answer, ids_T, mask_T in zip(rows[index]["ranking"], ids_KT, mask_KT, strict=True):
            assert ids_T[mask_T == 1].tolist() == [*(rows[index]["prompt"] + answer).encode(), EOS]
            assert (ids_T[mask_T == 0] == PAD).all() and mask_T[: int(mask_T.sum())].all()


def test_messages_are_written_by_the_template(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "1+1?"}]
    ranking = [[{"role": "assistant", "content": text}] for text in ("2", "two", "3")]
    pair = {"prompt": prompt, "chosen": ranking[0], "rejected": ranking[2]}
    ranked = data(tmp_path, [{"prompt": prompt, "ranking": ranking}]).splits[0][0]
    pair = data(tmp_path, [pair]).splits[0][0]
    assert ranked.answers[::2] == [pair.chosen, pair.rejected]


@pytest.mark.parametrize("loss", ["last", "per_token"])
def test_a_ranking_of_two_is_a_pair(loss: Any, tmp_path: Path) -> None:
    model = RewardModel(LingBackbone(DENSE, scalar_head=True), loss).eval()
    found = []
    for ranked in (True, False):
        answers = [(f"good{n}", "bad" * (n + 1)) for n in range(4)]
        rows = [
            {"prompt": f"{n}", **({"ranking": pair} if ranked else dict(zip(("chosen", "rejected"), pair, strict=True)))}
            for n, pair in enumerate(answers)
        ]
        found.append(model.losses(next(iter(data(tmp_path, rows).train_dataloader()))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_every_ranking_is_met_once_an_epoch_and_a_run_that_is_cut_meets_the_rest(tmp_path: Path) -> None:
    def loader() -> Any:
        return data(tmp_path, rankings(12)).train_dataloader()

    whole = [batch["index"].tolist() for batch in loader()]
    assert sorted(index for batch in whole for index in batch) == list(range(12))
    cut, resumed = loader(), loader()
    first = [batch["index"].tolist() for _, batch in zip(range(1), cut, strict=False)]
    resumed.load_state_dict(cut.state_dict())
    assert first + [batch["index"].tolist() for batch in resumed] == whole


def test_a_prompt_is_for_training_or_for_validation_and_long_answers_follow_the_policy(tmp_path: Path) -> None:
    train, val = data(tmp_path, rankings(40) * 2, val_fraction=0.3).splits
    assert train and val and len(train) + len(val) == 80
    assert not {each.key for each in train} & {each.key for each in val}
    rows = [{"prompt": "p", "ranking": ["a", "b", "c" * 140]}, {"prompt": "q", "ranking": ["a" * 140, "a" * 150, "b"]}]
    with pytest.raises(ValueError, match=r"2 of 2 rows .* the longest 152"):
        data(tmp_path, rows)
    with pytest.warns(UserWarning, match="1 lose their end, 1 are left out"):
        kept = data(tmp_path, rows, too_long="truncate").splits[0]
    assert [list(map(len, each.answers)) for each in kept] == [[3, 3, 128]]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"ranking": ["a"]}, {}, "no list of 2 answers or more"),
        ({"ranking": "ab"}, {}, "no list of 2 answers or more"),
        ({"ranking": ["a", 5]}, {}, "neither all strings nor all lists"),
        ({"ranking": ["a", "b", "a"]}, {}, "two answers of its ranking are the same"),
        ({"ranking": ["a", "b"], "chosen": "a"}, {}, "a ranking, and chosen as well"),
        ({"ranking": ["a", "b"]}, {"packed": True, "solve_rates": (0.0, 1.0)}, "packed and solve_rates must be left out"),
        ({"ranking": ["a", "b", "c", "d"]}, {}, "rankings of 3 and rankings of 4: rank equally many answers"),
        ({"chosen": "a", "rejected": "b"}, {}, "pairs and rankings of 3: rank equally many"),
    ],
)
def test_rows_that_cannot_be_used_are_named_in_a_sentence(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    rows = [{"prompt": "p", **row}, *(rankings(1) if not options else [])]
    with pytest.raises(ValueError, match=message) as caught:
        data(tmp_path, rows, **options)
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300
