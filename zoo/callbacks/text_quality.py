"""Spelling and diversity of generated text for every sampler and number of network evaluations, beside real text."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from rich.table import Table

from zoo.base.samples import TextSamples
from zoo.callbacks.sampler_comparison import SamplerComparison
from zoo.callbacks.sampling import draw_texts
from zoo.metrics.spelling import english_dictionary, text_scores, vocabulary


class RealText(NamedTuple):
    """Reference for generated text.

    Attributes:
        lines: Held-out lines, as many as the samples where the data hold that many.
        known_words: Words of the training text.
    """

    lines: list[str]
    known_words: frozenset[str]


class TextQuality(SamplerComparison):
    """Draws texts and measures spelling and diversity, at test and if wanted during training.

    What `SamplerComparison` says holds; the figures are the fields of `TextScores`, those of real data are of held-out
    text, and the file is `text_quality.json`. Spelling accuracy is measured with Hunspell's en_US, so it suits English
    text in lower case; it needs the package spylls (`pip install spylls`).

    Args:
        samplers: Samplers to compare, out of the module's `sampler_names`.
        nfes: Numbers of network function evaluations to compare.
        num_samples: Samples for each pair. The share of distinct words falls with this number, so compare only at the
            same one. Held-out text is taken in as many lines, evenly spaced, or whole if it has fewer.
        min_count: Occurrences in the training text that make a word part of its vocabulary.
        **kwargs: Arguments of `SamplerComparison`.

    Raises:
        ValueError: If a list is empty or a number is too small. What depends on module and data (names of samplers,
            held-out and training text) is checked in `setup`, before the run starts; so is spylls, if the run will measure.
    """

    kind = TextSamples
    result_file = "text_quality.json"
    figures = ("spelling_accuracy", "vocabulary_accuracy", "distinct_words", "duplicates")
    real = "held_out"

    def __init__(
        self,
        samplers: Sequence[str],
        nfes: Sequence[int],
        num_samples: int = 1000,
        min_count: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(samplers, nfes, num_samples, **kwargs)
        if min_count < 1:
            raise ValueError(f"TextQuality: min_count must be at least 1, got {min_count}.")
        self.min_count = min_count
        self._reference: RealText | None = None

    def check(self, trainer: Trainer) -> None:
        """Check texts and dictionary.

        Raises:
            TypeError: If the DataModule offers no held-out lines or no training text.
            ImportError: If this run will measure, and spylls is not installed.
        """
        self.require(trainer, "reference_text", "held-out lines of text", "a list of strings as long as the samples")
        self.require(trainer, "train_text", "the words of the training text", "one string")
        self._reference = None  # another run may have other data
        measures = trainer.testing or self.every_n_epochs is not None
        if measures and trainer.is_global_zero:
            english_dictionary()

    def draw(self, trainer: Trainer, pl_module: LightningModule, num_samples: int, **options: Any) -> tuple[list[str], int]:
        """Draw texts."""
        return draw_texts(trainer, pl_module, num_samples, **options)

    def reference(self, trainer: Trainer) -> RealText:
        """Held-out lines and the training text's vocabulary, made once a run."""
        if self._reference is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            lines = data.reference_text()
            count = min(self.num_samples, len(lines))
            spaced = [lines[number * len(lines) // count] for number in range(count)]
            self._reference = RealText(spaced, vocabulary(data.train_text(), self.min_count))
        return self._reference

    def score(self, trainer: Trainer, samples: list[str], reference: RealText) -> dict[str, Any]:
        """Spelling and diversity of samples."""
        return dataclasses.asdict(text_scores(samples, reference.known_words))

    def score_real(self, trainer: Trainer, reference: RealText) -> dict[str, Any]:
        """Spelling and diversity of held-out text."""
        return self.score(trainer, reference.lines, reference)

    def conditions(self, trainer: Trainer, reference: RealText) -> dict[str, Any]:
        """The dictionary, and the size of the training text's vocabulary."""
        return {"dictionary": "en_US", "min_count": self.min_count, "known_words": len(reference.known_words)}

    def table(self, result: dict[str, Any]) -> Table:
        """The figures as a table for people."""
        table = Table(
            title=f"{result['model']} on {result['data']}: {result['num_samples']} samples, words accepted by Hunspell's "
            f"{result['dictionary']}, and among {result['known_words']} words of the training text"
        )
        table.add_column("sampler")
        for column in ("NFE", "spelling", "vocabulary", "distinct words", "duplicates"):
            table.add_column(column, justify="right")
        held_out = {"sampler": f"held-out text, {result['held_out']['num_lines']} lines", "nfe": "", **result["held_out"]}
        for row in [*result["rows"], held_out]:
            cells = [row["sampler"], str(row["nfe"]), *(f"{100 * row[name]:.1f} %" for name in self.figures)]
            table.add_row(*cells, style="bold" if row is held_out else None)
        return table
