"""Weights come back for the examples and tokens that they were written for, and for no others."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kpod.artefacts import TokenWeights
from zoo.kpod.token_heatmap import heatmap

PRINTS = {"tokenizer": "aa", "data": "bb"}
STEPS = torch.tensor([[-1, 0, 0, 1, -1], [-1, -1, 0, -1, -1]])


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.integers(0, 12), st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), min_size=1))
def test_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: dict[int, list[float]]) -> None:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    TokenWeights.of_rows(rows, PRINTS).save(path)
    found = TokenWeights.read(path, "aa", "bb")
    assert found.metadata == PRINTS and [file.name for file in path.parent.iterdir()] == [path.name]
    for index, row in rows.items():
        steps = torch.tensor([[-1, *[0] * len(row), -1]])
        assert found.lookup(torch.tensor([index]), steps).tolist() == [[0, *row, 0]]


def test_batch_is_aligned_with_its_tokens_and_folds_are_joined(tmp_path: Path) -> None:
    TokenWeights.of_rows({0: [0.5], 2: [0.1, 0.2, 0.3]}, PRINTS).save(tmp_path / "0")
    TokenWeights.of_rows({1: [0.9, 0.8]}, PRINTS).save(tmp_path / "1")
    both = TokenWeights.read([tmp_path / "1", tmp_path / "0"], "aa", "bb")
    found = both.lookup(torch.tensor([2, 0]), STEPS)
    torch.testing.assert_close(found, torch.tensor([[0, 0.1, 0.2, 0.3, 0], [0, 0, 0.5, 0, 0]]), rtol=0, atol=0)
    assert both.offsets.tolist() == [0, 1, 3, 6]
    with pytest.raises(ValueError, match="0 has weights of example 0, as a file before it"):
        TokenWeights.read([tmp_path / "0", tmp_path / "0"], "aa", "bb")


@pytest.mark.parametrize("index", [0, 1, 7, -1])
def test_other_examples_and_other_numbers_of_tokens_are_refused(index: int) -> None:
    weights = TokenWeights.of_rows({0: [0.5], 2: [0.1]}, PRINTS)
    with pytest.raises(ValueError, match=rf"Example {index} has 3 tokens in its rationale and {int(index == 0)} weights"):
        weights.lookup(torch.tensor([index]), STEPS[:1])


def test_files_of_other_tokenizers_and_data_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    TokenWeights.of_rows({0: [0.5]}, PRINTS).save(path)
    for names, words in (("xx", "bb"), "another tokenizer"), (("aa", "xx"), "other data"):
        with pytest.raises(ValueError, match=f"w.safetensors has weights of {words}") as error:
            TokenWeights.read(path, *names)
        assert len(str(error.value)) <= 300
    with pytest.raises(FileNotFoundError, match="zoo predict of a TokenWeighter"):
        TokenWeights.read(tmp_path / "none", "aa", "bb")
    with pytest.raises(ValueError, match="No rationale has weights"):
        TokenWeights.of_rows({}, PRINTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="is no file of token weights"):
        TokenWeights.read(path, "aa", "bb")
    TokenWeights(torch.tensor([0, 3]), torch.ones(1), PRINTS).save(path)
    with pytest.raises(ValueError, match="its offsets do not fit its 1 weights"):
        TokenWeights.read(path, "aa", "bb")


def test_page_shows_tokens_as_text() -> None:
    page = heatmap([("example 3", ["<b>", " + 2"], [0.25, 1.0])])
    assert "&lt;b&gt;</span>" in page and "<b>" not in page
    assert 'rgba(255, 140, 0, 0.25)" title="0.250"' in page and "<script" not in page
