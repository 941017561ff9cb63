"""Text as characters: Shakespeare, Text8.

Batches are shaped as transformers gives them: ``{"input_ids", "attention_mask", "labels"}``, int64 (B, L), the labels
equal to the ids. Texts are kept as one byte a character and made into windows when a batch is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.assets.fetch import fetch
from datamodules.base.datamodule import ZooDataModule
from datamodules.base.loader import ResumableLoader, epoch_generator
from datamodules.base.sample_indices import SampleIndices
from datamodules.text.letters import ALPHABET, decode, encode, read_converted, read_lines_with_gaps, read_text8

__all__ = ["CharacterText", "LinesWithGaps", "Shakespeare", "Text8", "TextBatch", "TextPredictBatch", "TextSplits", "Windows"]

_GOLDEN = (5**0.5 - 1) / 2


class TextBatch(TypedDict):
    """A batch of windows; without the axis B, one window.

    Attributes:
        input_ids: int64 (B, L), ids of the characters.
        attention_mask: int64 (B, L), ones: every character counts.
        labels: The same as ``input_ids``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class TextPredictBatch(TypedDict, total=False):
    """Batch of ``predict_step``; without the axis B, one sample of it.

    Attributes:
        index: int64 (B,), number of the sample over all processes; its random seed.
        input_ids: int64 (B, L), the user's text, 0 where unknown; absent for unconditional samples.
        known: bool (B, L), true where a character is given; absent with ``input_ids``.
    """

    index: Tensor
    input_ids: Tensor
    known: Tensor


class TextSplits(NamedTuple):
    """The three parts of a text, ids uint8 (N,)."""

    train: Tensor
    val: Tensor
    test: Tensor


class Windows(Dataset[TextBatch]):
    """Windows of a text, one every ``stride`` characters; a rest shorter than a window is left out.

    Args:
        text: Ids uint8 (N,).
        seq_len: Characters L of a window.
        stride: Characters from the start of a window to the start of the next; ``None``: ``seq_len``, so that the
            windows cover the text once.
        shift_seed: If given, all windows of an epoch begin later by 0 to ``seq_len - 1`` characters, a pure function of
            (``shift_seed``, epoch). So an epoch is one pass over the text, and over the epochs a window starts at every
            character, while the order of an epoch is a permutation of few windows, not of all characters.
    """

    def __init__(self, text: Tensor, seq_len: int, stride: int | None = None, shift_seed: int | None = None) -> None:
        self.text = text
        self.seq_len = seq_len
        self.stride = stride or seq_len
        self.shift_seed = shift_seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw by how much the windows of this epoch are shifted."""
        self.shift = 0
        if self.shift_seed is not None:
            self.shift = int(torch.randint(self.seq_len, (), generator=epoch_generator(self.shift_seed, epoch, "shift")))

    def __len__(self) -> int:
        # The largest shift counts for all epochs, so that they are equally long.
        largest = 0 if self.shift_seed is None else self.seq_len - 1
        return max(0, (len(self.text) - largest - self.seq_len) // self.stride + 1)

    def __getitem__(self, index: int) -> TextBatch:
        ids = self.batch([index])["input_ids"][0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def batch(self, indices: list[int]) -> TextBatch:
        """A whole batch of windows."""
        start_B = torch.tensor(indices) * self.stride + self.shift
        ids_BL = self.text[start_B[:, None] + torch.arange(self.seq_len)].long()
        return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), "labels": ids_BL}


class LinesWithGaps(Dataset[TextPredictBatch]):
    """The user's lines: batches ``{"index", "input_ids", "known"}``.

    Args:
        ids: uint8 (S, L), 0 where unknown.
        known: bool (S, L), true where a character is given.
    """

    def __init__(self, ids: Tensor, known: Tensor) -> None:
        self.ids = ids
        self.known = known

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> TextPredictBatch:
        return {"index": torch.tensor(index), "input_ids": self.ids[index].long(), "known": self.known[index]}


class CharacterText(ZooDataModule, ABC):
    """The base of text made of the letters a to z and the space; a subclass reads the splits.

    An epoch of training is one pass over the training text, in windows that start at an offset drawn for the epoch: over
    the epochs, at every character. Validation and test see windows in order. ``predict`` draws ``predict_samples``
    samples, or fills in what is unknown in the user's own text.

    Args:
        seq_len: Characters L of a window, and of a sample.
        eval_stride: Characters from one window of validation and test to the next. ``None``: ``seq_len``, so that every
            character counts once (but a rest shorter than a window, which is left out).
        predict_samples: Number of samples that ``predict`` draws, numbered from 0; a sample's number is its seed.
        predict_text: A file of the user's text to fill in, one sample a line. Every ``unknown`` mark stands for a
            character to fill in, and lines shorter than ``seq_len`` are continued at their end. It is read whole, and
            refused if a line is too long or holds a foreign character, before any sampling starts.
        unknown: Character that stands for an unknown one in ``predict_text``.
        **kwargs: Arguments of `ZooDataModule`.

    Raises:
        ValueError: A number is less than 1, or ``unknown`` is not one character outside of a to z and space.
    """

    alphabet: ClassVar[str] = ALPHABET
    """The character of each id."""
    vocab_size: ClassVar[int] = len(ALPHABET)

    def __init__(
        self,
        seq_len: int = 256,
        eval_stride: int | None = None,
        predict_samples: int = 100,
        predict_text: Path | None = None,
        unknown: str = "?",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, number in (("seq_len", seq_len), ("eval_stride", eval_stride), ("predict_samples", predict_samples)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, and must be at least 1.")
        if len(unknown) != 1 or unknown in ALPHABET or unknown.isspace():
            raise ValueError(f"unknown is {unknown!r}, and must be one character that is no letter a to z and no space.")
        self.seq_len = seq_len
        self.eval_stride = eval_stride
        self.predict_samples = predict_samples
        self.predict_text = None if predict_text is None else Path(predict_text)
        self.unknown = unknown
        self._splits: TextSplits | None = None
        self._predict_set: Dataset[Any] | None = None

    @abstractmethod
    def read(self) -> TextSplits:
        """Read the text; called once, on first use."""

    @property
    def splits(self) -> TextSplits:
        """Training, validation and test text as ids."""
        if self._splits is None:
            splits = self.read()
            for name, text in splits._asdict().items():
                if len(text) < 2 * self.seq_len:
                    raise ValueError(
                        f"The {name} text has {len(text)} characters, fewer than two windows of seq_len={self.seq_len}: "
                        f"lower seq_len."
                    )
            self._splits = splits
        return self._splits

    def train_text(self) -> str:
        """The whole training text, for a vocabulary."""
        return decode(self.splits.train)

    def reference_text(self) -> list[str]:
        """Text to compare generated text with: the held-out text, of validation and test.

        Returns:
            Lines of ``seq_len`` characters that follow one another, as windows do.
        """
        size = self.seq_len
        texts = map(decode, self.splits[1:])
        return [text[start : start + size] for text in texts for start in range(0, len(text) - size + 1, size)]

    @override
    def setup(self, stage: str) -> None:
        """Read what the stage needs.

        Raises:
            FileNotFoundError: Files of the text, or the user's text, are missing.
            ValueError: A file is damaged or does not fit.
        """
        if stage == "predict":
            self._predict_set = self._read_predict_set()
        else:
            _ = self.splits

    def _read_predict_set(self) -> Dataset[Any]:
        if self.predict_text is None:
            return SampleIndices(self.predict_samples)
        return LinesWithGaps(*read_lines_with_gaps(self.predict_text, self.seq_len, self.unknown))

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        return self.train_loader(Windows(self.splits.train, self.seq_len, shift_seed=self.data_seed))

    @override
    def val_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(Windows(self.splits.val, self.seq_len, self.eval_stride))

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(Windows(self.splits.test, self.seq_len, self.eval_stride))

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        """Batches of sample numbers, or of the user's lines."""
        return self.eval_loader(self._predict_set or self._read_predict_set())


class Shakespeare(CharacterText):
    """42 plays and poems of Shakespeare, fetched once (5 MB): 4.75 million characters, 23,994 distinct words.

    Letters are lower-cased, and everything between them becomes one space. From each work one passage of a tenth is held
    out, half of it for validation and half for test, cut between words; the passages lie at different places of the
    works, and always at the same. So the held-out text is none that was trained on, and is of the same kind: all works,
    from beginnings to ends. (Names of characters do occur in both.)

    Its arguments are those of `CharacterText` and `ZooDataModule`.
    """

    @override
    def prepare_data(self) -> None:
        """Fetch the asset ``shakespeare``."""
        fetch("shakespeare")

    def read(self) -> TextSplits:
        """Read, clean and divide the works."""
        works = [
            re.sub("[^a-z]+", " ", path.read_text(encoding="utf-8").lower()).strip() + " "
            for path in sorted(fetch("shakespeare").glob("*.txt"))
        ]
        # Multiples of the golden ratio spread the passages evenly over beginnings, middles and ends.
        parts = [_hold_out(work, (number * _GOLDEN) % 1) for number, work in enumerate(works, start=1)]
        return TextSplits(*(encode("".join(part)) for part in zip(*parts, strict=True)))


class Text8(CharacterText):
    """text8: the first 100 million characters of a cleaned English Wikipedia, from the official file.

    The first 90 million characters are for training, 5 million each for validation and test.

    Args:
        root: Folder with the official file ``text8`` or ``text8.zip``, or with ``train.bin``, ``val.bin`` and
            ``test.bin``, the ids as uint16 (a ``meta.pkl`` beside them is not read).
        **kwargs: Arguments of `CharacterText` and `ZooDataModule`.
    """

    num_characters: ClassVar[tuple[int, int, int]] = (90_000_000, 5_000_000, 5_000_000)
    """Sizes of training, validation and test text."""

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    def read(self) -> TextSplits:
        """Read and check the official file, or the converted ones."""
        for path in (self.root / "text8", self.root / "text8.zip"):
            if path.is_file():
                return TextSplits(*read_text8(path, sum(self.num_characters)).split(self.num_characters))
        converted = [self.root / f"{name}.bin" for name in ("train", "val", "test")]
        if missing := [path.name for path in converted if not path.is_file()]:
            lacks = "" if len(missing) == 3 else f" (of train.bin, val.bin and test.bin it lacks {', '.join(missing)})"
            raise FileNotFoundError(
                f"{self.root} holds neither text8 nor text8.zip{lacks}: download http://mattmahoney.net/dc/text8.zip and put "
                f"it there, as it is or unpacked."
            )
        return TextSplits(*map(read_converted, converted, self.num_characters))


def _hold_out(work: str, place: float) -> tuple[str, str, str]:
    """Take a passage of a tenth out of a work: what remains, and the passage's two halves.

    Args:
        work: Words, each followed by a space.
        place: Place of the passage, from 0, the beginning, to 1, the end.
    """
    begin, middle, end = (work.find(" ", int((0.9 * place + share) * (len(work) - 1))) + 1 for share in (0, 0.05, 0.1))
    return work[:begin] + work[end:], work[begin:middle], work[middle:end]
