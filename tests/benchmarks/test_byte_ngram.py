"""The byte n-gram model: Kneser and Ney's formula, a distribution after every context, known entropies."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.byte_ngram import ByteNgram, bits_per_byte
from benchmarks.character_ngram import CharacterNgram


def vector(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def kneser_ney(text: bytes, context: bytes, byte: int, highest: bool = True) -> float:
    """The formula, by counting substrings one by one."""
    n = len(context) + 1
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    if not highest:  # different bytes before each n-gram
        grams = [longer[1:] for longer in {text[i : i + n + 1] for i in range(len(text) - n)}]
    count = Counter(grams)
    ones, twos = (sum(number == k for number in count.values()) for k in (1, 2))
    discount = ones / (ones + 2 * twos) if ones else 0.5
    shorter = kneser_ney(text, context[1:], byte, False) if context else 1 / 256
    after = {gram: number for gram, number in count.items() if gram[:-1] == context}
    if not after:
        return shorter
    seen = max(after.get(context + bytes([byte]), 0) - discount, 0)
    return (seen + discount * len(after) * shorter) / sum(after.values())


@settings(max_examples=40, deadline=None)
@given(st.text("abc", min_size=4, max_size=30), st.text("abcd", max_size=5), st.integers(1, 4))
def test_probabilities_are_the_formula_and_sum_to_one(text: str, context: str, order: int) -> None:
    found = ByteNgram(vector(text.encode()), order).probabilities(context.encode())
    used = context[-(order - 1) :].encode() if order > 1 else b""
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found.min() > 0
    for byte in b"abcd\x00\xff":
        assert found[byte] == pytest.approx(kneser_ney(text.encode(), used, byte), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=4, max_size=40), st.binary(min_size=1, max_size=30), st.integers(1, 4))
def test_bits_are_those_of_the_probabilities_one_after_another(train: bytes, text: bytes, order: int) -> None:
    found = ByteNgram(vector(train), order).bits_per_byte(vector(text))
    assert len(found) == order
    for n, bits in enumerate(found, start=1):
        model = ByteNgram(vector(train), n)
        expected = -sum(math.log2(model.probabilities(text[:place])[byte]) for place, byte in enumerate(text)) / len(text)
        assert bits == pytest.approx(expected, rel=1e-12)


def test_known_small_example() -> None:
    """``abab`` and n = 2: N(ab) = 2, N(ba) = 1, so D = 1 / 3; before a only b stood, before b only a."""
    found = ByteNgram(vector(b"abab"), 2).probabilities(b"a")
    below = 0.5 * 0.5 + 0.5 / 256  # each of a and b is continued by one byte: n_1 = 2, n_2 = 0, D = 1, so all mass goes below
    assert ByteNgram(vector(b"ab"), 1).probabilities(b"")[ord("a")] == pytest.approx(1 / 256)
    assert found[ord("b")] == pytest.approx((2 - 1 / 3 + 1 / 3 / 256) / 2, rel=1e-12)
    assert found[ord("a")] == pytest.approx(1 / 3 / 256 / 2, rel=1e-12) and found[ord("a")] < below


def test_known_entropies() -> None:
    coin = np.random.default_rng(0).choice(vector(b"ab"), 200_000)
    assert bits_per_byte(coin[:100_000], coin[100_000:]) == pytest.approx(dict.fromkeys((3, 4, 5, 6), 1), abs=2e-3)
    # "a" is followed by "b" always; "b" by either: a Markov chain with 2/3 of its bytes after "b", 1 bit each.
    chain = vector(coin.tobytes().replace(b"a", b"ab"))
    bits = ByteNgram(chain[:100_000], 4).bits_per_byte(chain[100_000:])
    assert bits[0] == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)), abs=5e-3)
    assert bits[1:] == pytest.approx([2 / 3] * 3, abs=5e-3)
    noise = np.random.default_rng(1).integers(0, 256, 50_000, dtype=np.uint8)
    assert ByteNgram(noise, 1).bits_per_byte(noise[::-1].copy())[0] == pytest.approx(8, abs=0.01)


def test_text_of_long_dependence_gains_with_the_order_and_little_text_does_not_overfit() -> None:
    words = np.random.default_rng(2).choice(["the quick ", "brown fox ", "jumps over ", "a lazy dog "], 4000)
    text = vector("".join(words).encode())
    bits = ByteNgram(text[:20_000], 6).bits_per_byte(text[20_000:])
    assert all(np.diff(bits[:3]) < -0.5)
    assert bits[5] == pytest.approx(2 / np.mean([len(word) for word in words]), abs=0.05)  # 2 bits a word
    little = ByteNgram(text[:200], 6).bits_per_byte(text[20_000:])
    assert little[5] < little[0] and little[5] < 8


def test_it_predicts_unseen_text_better_than_witten_and_bells_smoothing() -> None:
    generator = np.random.default_rng(3)
    words = ["".join(generator.choice(list("abcdefgh"), generator.integers(2, 7))) for _ in range(300)]
    text = " ".join(generator.choice(words, 4000, p=(p := 1 / np.arange(1, 301)) / p.sum()))
    ours = bits_per_byte(vector(text[:8000].encode()), vector(text[8000:].encode()), [5])[5]
    assert ours < CharacterNgram(text[:8000], order=5).bits_per_character([text[8000:]])


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 9, and must lie between 1 and 8"):
        ByteNgram(vector(b"abcdefghij"), 9)
    with pytest.raises(ValueError, match=r"at least order=3 bytes \(uint8\), not uint8 of shape \(2,\)"):
        ByteNgram(vector(b"ab"), 3)
    with pytest.raises(ValueError, match="not int64"):
        ByteNgram(np.arange(10), 3)
    with pytest.raises(ValueError, match=r"to predict must be a vector of bytes \(uint8\), not uint8 of shape \(0,\)"):
        ByteNgram(vector(b"abc"), 2).bits_per_byte(vector(b""))
