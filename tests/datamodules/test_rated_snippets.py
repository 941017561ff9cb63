"""Rated texts: their number, their halves, pairs that agree with the ratings, prompts that begin texts, and the tokenizer."""

import io
import itertools
import json
import statistics
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.train_bpe import ZOO, train_bpe
from datamodules import RatedSnippets
from datamodules.base.held_out import held_out
from datamodules.conversations.rated_texts import RatedText, draw_pairs, read_rated_texts
from datamodules.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def texts() -> list[RatedText]:
    return read_rated_texts()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("rlhf-vader-sft")


@pytest.fixture(autouse=True)
def read_once(texts, monkeypatch):
    monkeypatch.setattr("datamodules.conversations.rated_snippets.read_rated_texts", lambda: texts)


def batches(loader, count: int):
    return list(itertools.islice(loader, count))


def same(first, second) -> bool:
    return all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


# The texts


def test_four_corpora_have_their_texts_and_ratings(texts):
    assert Counter(text.corpus for text in texts) == {"movies": 10605, "products": 3708, "editorials": 5190, "tweets": 4200}
    assert sum(len(text.text.split()) for text in texts) == 408_892
    moments = {"movies": (0.00, 1.92), "products": (0.38, 1.63), "editorials": (-0.14, 0.88), "tweets": (0.51, 1.51)}
    for corpus, expected in moments.items():
        means = [text.mean for text in texts if text.corpus == corpus]
        assert (round(statistics.mean(means), 2), round(statistics.pstdev(means), 2)) == expected
    for text in texts:
        assert 15 <= len(text.ratings) <= 100 and -4 <= min(text.ratings) <= max(text.ratings) <= 4
        if text.corpus != "tweets":
            assert statistics.mean(text.ratings) == pytest.approx(text.mean, abs=1e-9)


def test_halves_and_held_out_texts_are_disjoint_and_whole(texts):
    sides = [
        {text.rated.text for text in side}
        for part in ("policy", "gold")
        for side in RatedSnippets(part=part, tokenizer="byte", seq_len=1024).splits
    ]
    assert all(not first & second for first, second in itertools.combinations(sides, 2))
    assert set.union(*sides) == {text.text for text in texts}
    shares = [len(side) / len(set.union(*sides)) for side in sides]
    assert shares == pytest.approx([0.45, 0.05, 0.45, 0.05], abs=0.01)


def test_a_half_says_nothing_about_what_is_held_out(texts):
    held = held_out([text.text for text in texts], 0.1)
    gold = held_out([f"gold {text.text}" for text in texts], 0.5)
    assert gold[held].mean() == pytest.approx(0.5, abs=0.03)


def archive(folder: Path, **changes: str | None) -> Path:
    """A tar with one text a corpus."""
    path = folder / "small.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
            for kind, line in (("GroundTruth", "1\t0.5\t fine \r\n"), ("anonDataRatings", "1\t0.5\t0.5\t[0, 1]\r\n")):
                line = changes.get(f"{name}_{kind}", line)
                if line is not None:
                    member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_{kind}.txt")
                    content = ("\ufeff" + line).encode()
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path


def test_a_damaged_archive_is_refused_by_name(tmp_path):
    assert read_rated_texts(archive(tmp_path))[-1] == RatedText("tweets", "fine", 0.5, (0, 1))
    for changes, message in (
        ({"tweets_anonDataRatings": None}, "no file hutto_ICWSM_2014/tweets_anonDataRatings.txt: remove the asset"),
        ({"tweets_GroundTruth": "1\t0.5\r\n"}, "Line 1 of .*tweets_GroundTruth.txt has 2 columns instead of 3"),
        ({"tweets_GroundTruth": "2\t0.5\tfine\r\n"}, "The text 2 of tweets has no ratings"),
        ({"tweets_GroundTruth": "1\tgood\tfine\r\n"}, "The text 1 of tweets"),
        ({"tweets_anonDataRatings": "1\t0.5\t0.5\t[]\r\n"}, "The text 1 of tweets has no ratings"),
        ({"tweets_anonDataRatings": "1\t0.5\t0.5\tmany\r\n"}, "The text 1 of tweets has no ratings"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_rated_texts(archive(tmp_path, **changes))
        assert len(str(error.value)) <= 300


# Pairs


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.lists(st.integers(-4, 4), min_size=1, max_size=5)), max_size=30),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_a_preferred_text_can_be_rated_higher(rows, rounds, seed):
    rated = [RatedText("movies", text, statistics.mean(ratings), tuple(ratings)) for text, ratings in rows]
    for source in ("raters", "means"):
        pairs = draw_pairs(rated, rounds, source, 0.5, seed)
        assert pairs == draw_pairs(rated, rounds, source, 0.5, seed)
        assert max(Counter(itertools.chain(*pairs)).values(), default=0) <= rounds
        for better, worse in pairs:
            assert rated[better].text != rated[worse].text
            if source == "means":
                assert rated[better].mean - rated[worse].mean >= 0.5
            else:
                assert max(rated[better].ratings) > min(rated[worse].ratings)


def test_raters_prefer_a_text_as_often_as_their_ratings_say():
    good, bad = (0, 1, 1, 3), (-1, 0, 2, 2)
    wins = sum(a > b for a in good for b in bad)
    losses = sum(a < b for a in good for b in bad)
    rated = [RatedText("movies", "good", 1.25, good), RatedText("movies", "bad", 0.75, bad)]
    pairs = draw_pairs(rated, 4000, "raters", 0.0, seed=0)
    assert len(pairs) / 4000 == pytest.approx((wins + losses) / 16, abs=0.03)
    assert pairs.count((0, 1)) / len(pairs) == pytest.approx(wins / (wins + losses), abs=0.03)
    assert set(draw_pairs(rated, 20, "means", 0.5, seed=0)) == {(0, 1)}
    assert draw_pairs(rated, 20, "means", 0.6, seed=0) == []


def test_pairs_are_whole_texts_of_one_side_in_the_shape_of_preferences(texts, tokenizer):
    data = RatedSnippets(use="pairs", part="gold", preference="means", batch_size=8, seed=0)
    mean = {text.text: text.mean for text in texts if text.corpus in ("movies", "products")}
    sides = [{text.rated.text for text in side} for side in data.splits]
    for loader, side in ((data.train_dataloader(), sides[0]), (data.val_dataloader(), sides[1])):
        for batch in batches(loader, 5):
            assert batch["index"].shape == (8,)
            for chosen, rejected in zip(batch["chosen_input_ids"], batch["rejected_input_ids"], strict=True):
                better, worse = tokenizer.decode(chosen), tokenizer.decode(rejected)
                assert {better, worse} <= side and mean[better] - mean[worse] >= 0.5
            for name in ("chosen", "rejected"):
                ids, mask = batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"]
                assert ids.shape == batch["chosen_input_ids"].shape == mask.shape
                assert torch.equal(batch[f"{name}_labels"], ids.where(mask == 1, -100))
                assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == tokenizer.eos_id).all()
    first, other = (
        next(iter(RatedSnippets(use="pairs", corpora=["products"], pair_seed=seed).val_dataloader())) for seed in (0, 1)
    )
    assert not same(first, other), "another seed matches other texts"


# Text and prompts


def test_a_row_of_text_is_a_text_with_its_end_and_all_of_it_counts(tokenizer):
    data = RatedSnippets(corpora=["tweets"], batch_size=8, seed=0)
    side = {text.rated.text: text.rated for text in data.splits[0]}
    for batch in batches(data.train_dataloader(), 5):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert torch.equal(batch["labels"], ids.where(mask == 1, -100))
        assert ids.shape[1] == mask.sum(1).max()
        for row, length in zip(ids, mask.sum(1), strict=True):
            assert tokenizer.decode(row) in side and row[length - 1] == tokenizer.eos_id
            assert (row[length:] == tokenizer.pad_id).all()


@pytest.mark.parametrize("use", ["text", "pairs", "prompts"])
def test_the_same_seed_gives_the_same_batches(use):
    first, second, other = (
        next(iter(RatedSnippets(use=use, corpora=["products"], batch_size=4, seed=seed).train_dataloader())) for seed in (0, 0, 1)
    )
    assert same(first, second) and not torch.equal(first["index"], other["index"])


def test_prompts_are_the_beginnings_of_texts_with_their_ratings(texts, tokenizer):
    data = RatedSnippets(use="prompts", corpora=["editorials"], prompt_tokens=5, batch_size=16, seed=0)
    mean = {(text.corpus, text.text): text.mean for text in texts}
    for batch in [*batches(data.train_dataloader(), 3), *batches(data.val_dataloader(), 3)]:
        assert batch["input_ids"].shape == (16, 5) and (batch["attention_mask"] == 1).all()
        for ids, prompt, row in zip(batch["input_ids"], batch["prompt"], batch["rows"], strict=True):
            whole = tokenizer.encode(row["text"])
            assert whole[:5] == ids.tolist() and len(whole) > 5 and row["text"].startswith(prompt.rstrip("\ufffd"))
            assert row["mean"] == pytest.approx(mean[row["corpus"], row["text"]])
    text = RatedSnippets(corpora=["editorials"], batch_size=16, prompt_tokens=5)
    text.setup("predict")
    assert same(next(iter(text.predict_dataloader())), next(iter(data.val_dataloader()))), "predict, whatever the use"


def test_prompts_of_the_user_are_read_without_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.conversations.rated_snippets.read_rated_texts", None)
    path = tmp_path / "own.txt"
    path.write_text("This film\n")
    data = RatedSnippets(predict_prompts=path)
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["prompt"] == ["This film"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use": "pair"}, "use is 'pair', and must be one of text, pairs, prompts"),
        ({"part": "all"}, "part is 'all', and must be one of policy, gold"),
        ({"preference": "mean"}, "preference is 'mean', and must be one of raters, means"),
        ({"corpora": ["films"]}, "must be some of movies, products, editorials, tweets"),
        ({"corpora": []}, "must be some of"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 from 1 to less than seq_len"),
        ({"prompt_tokens": 256}, "prompt_tokens=256 from 1 to less than seq_len=256"),
        ({"pairs_per_text": 0}, "pairs_per_text=0 be at least 1"),
        ({"min_difference": -1.0}, "min_difference=-1.0 must not be negative"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RatedSnippets(**arguments)
    assert len(str(error.value)) <= 300


def test_long_texts_are_an_error_or_left_out_or_cut(texts, tokenizer):
    with pytest.raises(ValueError, match="more than seq_len=40 ids, the longest"):
        _ = RatedSnippets(corpora=["products"], seq_len=40).splits
    with pytest.warns(UserWarning, match="are left out"):
        kept = RatedSnippets(corpora=["products"], seq_len=40, too_long="skip").splits
    with pytest.warns(UserWarning, match="lose their end"):
        cut = RatedSnippets(corpora=["products"], seq_len=40, too_long="truncate").splits
    assert max(len(text.ids) for text in kept[0]) == 40 and all(text.ids[-1] == tokenizer.eos_id for text in kept[0])
    assert sum(map(len, cut)) > sum(map(len, kept)) and max(len(text.ids) for text in cut[0]) == 40


# The tokenizer


def test_the_shipped_tokenizer_is_found_by_name_with_its_special_tokens(tokenizer, texts):
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (2048, 0, 1, 2)
    assert 2 not in tokenizer.encode("<eos>") and tokenizer.encode("<eos>", special=True) == [2]
    sample = [text.text for text in texts[::50]] + ["naïve 你好 \x00\n\n "]
    for text, ids in zip(sample, tokenizer.encode_many(sample), strict=True):
        assert tokenizer.decode([*ids, 2, 0, 0]) == text
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    with pytest.raises(FileNotFoundError, match="neither `byte`, nor a folder"):
        load_tokenizer("rlhf-vader-sft2")


def test_training_again_gives_the_shipped_tokenizer_whatever_the_order(texts):
    again = json.loads(train_bpe(text.text for text in reversed(texts)).to_str())
    assert again["model"] == json.loads((ZOO / "rlhf/weights/rlhf-vader-sft/tokenizer.json").read_text())["model"]
