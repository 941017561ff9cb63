"""Texts with ratings of people for the stages of learning from feedback: to imitate, to compare, to continue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.assets.fetch import fetch
from datamodules.base.held_out import divide
from datamodules.conversations.length_policy import LengthPolicy, TooLong
from datamodules.conversations.preferences import Pair, Pairs
from datamodules.conversations.rated_texts import PreferenceSource, RatedCorpus, RatedText, draw_pairs, read_rated_texts
from datamodules.conversations.rollout_prompts import PromptRows
from datamodules.conversations.sft import Conversation, ConversationRows
from datamodules.text.prompts import Prompt, Prompts
from datamodules.text.split_data import SplitData
from datamodules.text.text import check_seq_len, check_val_fraction

__all__ = ["EncodedText", "RatedSnippets"]

_REVIEWS: list[RatedCorpus] = ["movies", "products"]


class EncodedText(NamedTuple):
    """A rated text as ids.

    Attributes:
        rated: The text with its ratings.
        ids: Its ids, with an eos unless it lost its end.
    """

    rated: RatedText
    ids: list[int]


class RatedSnippets(SplitData):
    """23,703 short texts with the ratings of about twenty people each (fetched once, 2.5 MB): how positive is it?

    One DataModule for the three stages of learning from feedback (:mod:`datamodules.conversations.rated_texts` has the source).
    A text is in one half, and there for training or validation, by fixed hashes of the text: equal texts are on one side.

    * ``text``: language modelling; a row is a text with its eos, all of which counts. Batches are those of `Text` and `SFT`.
    * ``pairs``: of two texts, the more positive one is preferred. Batches are those of `Preferences`; there is no prompt, the
      whole text is the answer.
    * ``prompts``: the beginnings of texts, to be continued. Batches are those of `RolloutPrompts`; their ``rows`` have the
      ``corpus``, the whole ``text`` and its ``mean`` rating.

    ``predict`` without prompts of yours continues the beginnings of the held-out texts, whatever the use.

    Args:
        use: Use of the texts.
        part: Half of the texts: one for the policy and its reward model, the other for a reward model that judges them.
        corpora: Origins of the texts: film reviews (``movies``), reviews of ``products``, ``editorials``, ``tweets``.
            ``null``: the two kinds of reviews for pairs, otherwise all.
        tokenizer: As for `LanguageData`. The default is a byte-level BPE of 2,048 ids trained on these texts.
        seq_len: Ids that a text may have, its eos among them.
        too_long: Treatment of longer texts: an error (``raise``); they are left out (``skip``); they lose their end
            (``truncate``).
        val_fraction: Share of the half that is held out; 0: no validation.
        preference: Origin of the preference of a pair: one person of each text, drawn at random, so that pairs have the noise of
            human judgement (``raters``); or the mean ratings (``means``). Pairs without a preference are left out.
        min_difference: Least difference of two mean ratings for a preference.
        pairs_per_text: Rounds in which all texts are matched at random.
        pair_seed: Seed of matches and raters; that of the order is ``seed``.
        prompt_tokens: Ids of a prompt. Texts that have no more than these give none.
        **kwargs: Arguments of `LanguageData` and `ZooDataModule`.

    Raises:
        ValueError: A number out of range, or an unknown corpus.
    """

    sample_name = "text"

    def __init__(
        self,
        use: Literal["text", "pairs", "prompts"] = "text",
        part: Literal["policy", "gold"] = "policy",
        corpora: list[RatedCorpus] | None = None,
        tokenizer: str = "rlhf-vader-sft",
        seq_len: int = 256,
        too_long: TooLong = "raise",
        val_fraction: float = 0.1,
        preference: PreferenceSource = "raters",
        min_difference: float = 0.5,
        pairs_per_text: int = 2,
        pair_seed: int = 0,
        prompt_tokens: int = 6,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, **kwargs)
        choices = {"use": ("text", "pairs", "prompts"), "part": ("policy", "gold"), "preference": get_args(PreferenceSource)}
        for name, value in (("use", use), ("part", part), ("preference", preference)):
            if value not in choices[name]:
                raise ValueError(f"{name} is {value!r}, and must be one of {', '.join(choices[name])}.")
        known = get_args(RatedCorpus)
        if corpora is not None and (not corpora or not set(corpora) <= set(known)):
            raise ValueError(f"corpora={corpora} must be some of {', '.join(known)}.")
        check_seq_len(seq_len)
        check_val_fraction(val_fraction)
        if min_difference < 0 or pairs_per_text < 1 or not 1 <= prompt_tokens < seq_len:
            raise ValueError(
                f"min_difference={min_difference} must not be negative, pairs_per_text={pairs_per_text} be at least 1, and"
                f" prompt_tokens={prompt_tokens} from 1 to less than seq_len={seq_len}."
            )
        self.use = use
        self.part = part
        self.corpora = corpora or (_REVIEWS if use == "pairs" else list(known))
        self.seq_len = seq_len
        self.too_long: TooLong = too_long
        self.val_fraction = val_fraction
        self.preference: PreferenceSource = preference
        self.min_difference = min_difference
        self.pairs_per_text = pairs_per_text
        self.pair_seed = pair_seed
        self.prompt_tokens = prompt_tokens

    @cached_property
    @override
    def splits(self) -> tuple[list[EncodedText], list[EncodedText]]:
        """The texts for training and for validation."""
        texts = [rated for rated in read_rated_texts() if rated.corpus in self.corpora]
        texts = divide(texts, 0.5, lambda rated: f"gold {rated.text}")[self.part == "gold"]
        policy = LengthPolicy(self.too_long, self.seq_len)
        encoded = []
        for rated, ids in zip(texts, self.tokenizer.encode_many([rated.text for rated in texts]), strict=True):
            whole = [*ids.tolist(), self.tokenizer.eos_id]
            if policy.keeps(len(whole), remains=True):
                encoded.append(EncodedText(rated, whole[: self.seq_len]))
        policy.report("vader-sentiment", "texts")
        if not encoded:
            raise ValueError(f"No text has at most seq_len={self.seq_len} ids: raise seq_len.")
        train, val = divide(encoded, self.val_fraction, lambda text: text.rated.text)
        rank_zero_info(f"{len(train):,} texts of the part {self.part} for training, {len(val):,} for validation.")
        return train, val

    @override
    def prepare_data(self) -> None:
        """Fetch the texts."""
        fetch("vader-sentiment")

    @property
    @override
    def source(self) -> str:
        """The asset."""
        return "vader-sentiment"

    @property
    @override
    def marks_retries(self) -> bool:
        return self.use != "prompts"

    @override
    def _read_prompts(self) -> Prompts:
        if self.predict_prompts is not None:
            return super()._read_prompts()
        train, val = self.splits
        return self._prompt_rows(val or train)

    @override
    def batches(self, samples: list[EncodedText], training: bool = False) -> Dataset[Any]:
        if self.use == "prompts":
            return self._prompt_rows(samples)
        if self.use == "pairs":
            return Pairs(self._pairs(samples), self.tokenizer.pad_id)
        ids = [np.array(text.ids, dtype=np.int32) for text in samples]
        rows = [Conversation(text.rated.text, ids_N, ids_N) for text, ids_N in zip(samples, ids, strict=True)]
        return ConversationRows(rows, self.tokenizer, self.seq_len, packing=False)

    def _pairs(self, texts: Sequence[EncodedText]) -> list[Pair]:
        rated = [text.rated for text in texts]
        drawn = draw_pairs(rated, self.pairs_per_text, self.preference, self.min_difference, self.pair_seed)
        pairs = []
        for better, worse in drawn:
            chosen, rejected = texts[better].ids, texts[worse].ids
            learned = [np.ones(len(ids), dtype=bool) for ids in (chosen, rejected)]
            pairs.append(Pair("", chosen, rejected, learned[0], learned[1], reference_logps=None))
        rank_zero_info(f"{len(pairs):,} pairs with a preference, of {self.pairs_per_text * (len(texts) // 2):,}.")
        return pairs

    def _prompt_rows(self, texts: Sequence[EncodedText]) -> PromptRows:
        rows = []
        for rated, ids in texts:
            if len(ids) - 1 > self.prompt_tokens:
                prompt = ids[: self.prompt_tokens]
                row = {"corpus": rated.corpus, "text": rated.text, "mean": rated.mean}
                rows.append((Prompt(self.tokenizer.decode(prompt), prompt), row))
        rank_zero_info(f"{len(rows):,} prompts of {self.prompt_tokens} ids; {len(texts) - len(rows):,} texts are too short.")
        return PromptRows(rows, self.tokenizer.pad_id)
