"""Users' histories as lists of short texts, and candidates to click on; source: Geng et al., SIGIR 2024 (arXiv 2403.19347).

Shape suffixes: E events, F features, T texts, U users, I items.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from datamodules.assets.fetch import MANIFEST, cache_folder, fetch
from datamodules.base.cached_folder import prepare
from datamodules.base.datamodule import ZooDataModule
from datamodules.base.held_out import held_out
from datamodules.base.json_lines import OnError
from datamodules.base.loader import ResumableLoader
from datamodules.clicks.click_table import SPLITS, Split
from datamodules.text_histories.event_files import read_events
from datamodules.text_histories.event_log import NORMALIZATION, EventLog, normalized
from datamodules.text_histories.history_rows import Behaviors, HistoryRows
from datamodules.text_histories.journey_exposures import read_exposures
from datamodules.text_histories.rated_films import read_rated_films

__all__ = ["TextHistories"]

_FORMAT = "1"  # another one makes the cache again


class TextHistories(ZooDataModule):
    """Candidates with a text, and what their users did before, as lists of texts.

    Distinct texts are *atoms*; batches hold their numbers (:class:`~datamodules.text_histories.history_rows.TextHistoryBatch`). A
    history holds behaviours of an earlier time than the candidate's only, never of the same.

    Args:
        source: ``movielens-100k`` (real: lists of films that the user ``liked``, with 4 stars or more, and ``disliked``; a rating
            of 4 or more is a click); ``journey`` (simulated, says its package; lists of purchases by department; products on
            display or in the mailer, bought or not; needs the extra ``recsys``); or a file of events,
            :func:`~datamodules.text_histories.event_files.read_events` lists the columns.
        history: Behaviours of a list that are given, M, the last ones.
        behavior_template: Text of a behaviour, of ``{feature}``, the name of its list, and ``{text}``.
        item_template: Text of a candidate, of ``{text}``.
        split_by: ``time``: the last candidates of all are for test, those before for validation; ``user``: those of some users,
            by a fixed hash of their ids.
        split: Shares of training, validation and test.
        train_from: Train on candidates from this time on, in the source's unit. ``null``: from the first.
        train_until: Train on candidates before this time and test on the others, without validation; ``split`` does not count.
        test_until: Test on candidates before this time. ``null``: on all.
        negatives: Journey: candidates that were not bought, drawn at each visit; they were sampled, which ``log_odds`` undoes.
        predict_split: Split that ``predict`` scores, unless ``predict_file`` is given.
        predict_file: The user's own file of events: behaviours, and candidates without a label, which are scored.
        on_error: Treatment of malformed rows: ``raise`` an error that counts them and shows the first, or ``skip`` them and log
            their number.
        **kwargs: Arguments of `ZooDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    model_arguments: ClassVar[tuple[str, ...]] = ("num_users", "num_items", "num_features")

    def __init__(
        self,
        source: str = "movielens-100k",
        history: int = 32,
        behavior_template: str = "{feature} {text}",
        item_template: str = "{text}",
        split_by: Literal["time", "user"] = "time",
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        train_from: float | None = None,
        train_until: float | None = None,
        test_until: float | None = None,
        negatives: int = 4,
        predict_split: Split = "test",
        predict_file: Path | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(history, negatives) < 1:
            raise ValueError(f"TextHistories: history={history} and negatives={negatives} must be at least 1.")
        if min(split) < 0 or abs(sum(split) - 1) > 1e-9:
            raise ValueError(f"TextHistories: split={list(split)} must be three shares that add up to 1.")
        for name, choice, choices in (("split_by", split_by, ("time", "user")), ("predict_split", predict_split, SPLITS),
                                      ("on_error", on_error, get_args(OnError))):  # fmt: skip
            if choice not in choices:
                raise ValueError(f"TextHistories: {name}={choice!r} must be one of {', '.join(choices)}.")
        if train_until is not None and split_by == "user":
            raise ValueError("TextHistories: train_until divides by time: set split_by to time.")
        for name, template in (("behavior_template", behavior_template), ("item_template", item_template)):
            if "{text}" not in template:
                raise ValueError(
                    f"TextHistories: {name}={template!r} must hold {{text}}, in whose place the text of an event comes."
                )
        self.source, self.history = source, history
        self.behavior_template, self.item_template = behavior_template, item_template
        self.split_by, self.split = split_by, tuple(split)
        self.train_from, self.train_until, self.test_until = train_from, train_until, test_until
        self.negatives = negatives
        self.predict_split: Split = predict_split
        self.predict_file = None if predict_file is None else Path(predict_file)
        self.on_error = on_error

    @override
    def prepare_data(self) -> None:
        """Fetch or read the source, once, into the cache."""
        _ = self.log

    @override
    def setup(self, stage: str) -> None:
        """Open what was prepared; read the user's file."""
        _ = self.atoms
        if stage in ("fit", "test") and not len(self._candidates("train" if stage == "fit" else "test")):
            raise ValueError(
                f"No candidate of {self.source} is left to {stage}: change split, train_from, train_until, test_until."
            )

    @cached_property
    def log(self) -> EventLog:
        """The events of the source."""
        parts = [_FORMAT, NORMALIZATION, self._source_key, self.on_error]
        if self.source == "journey":
            parts += [str(self.negatives), str(self.data_seed)]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return EventLog.open(prepare(cache_folder() / "text_histories" / f"log-{name}", lambda folder: self._read().save(folder)))

    @property
    def _source_key(self) -> str:
        """Changes with the source's data."""
        if self.source in ("movielens-100k", "journey"):
            return MANIFEST[self.source].sha256
        path = Path(self.source).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(
                f"The source {self.source!r} is neither movielens-100k nor journey nor a file: give one of them."
            )
        return repr((str(path), path.stat().st_size, path.stat().st_mtime_ns))

    def _read(self) -> EventLog:
        if self.source == "movielens-100k":
            log = read_rated_films(fetch(self.source))
        elif self.source == "journey":
            log = read_exposures(fetch(self.source), self.negatives, self.data_seed)
        else:
            log = read_events(Path(self.source).expanduser(), self.on_error)
        count, clicks = int((log.label_E >= 0).sum()), int((log.label_E == 1).sum())
        rank_zero_info(
            f"{self.source}{' (simulated)' * (self.source == 'journey')}: {len(log.user_keys):,} users, {len(log.item_keys):,}"
            f" items, {int((log.feature_E >= 0).sum()):,} behaviours ({', '.join(log.features)[:100]}), {count:,} candidates, of"
            f" which {clicks:,} are clicks."
        )
        return log

    @cached_property
    def _logs(self) -> list[EventLog]:
        """The source and the user's file, if there is one."""
        own = [] if self.predict_file is None else [read_events(self.predict_file, self.on_error, self.log.features)]
        return [self.log, *own]

    @cached_property
    def _atoms(self) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
        """All atoms, and the numbers of those of each event of each log as behaviour and as candidate, int64 (E,)."""
        numbers = {"": 0}

        def number(log: EventLog, templates: list[str], kind_E: np.ndarray) -> np.ndarray:
            codes, code_E = np.unique(kind_E.astype(np.int64) * len(log.texts) + log.text_E, return_inverse=True)
            texts = [normalized(templates[code // len(log.texts)].replace("{text}", log.texts[code % len(log.texts)]))
                     for code in codes.tolist()]  # fmt: skip
            return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)[code_E]

        found = []
        for log in self._logs:
            behaviors = [self.behavior_template.replace("{feature}", feature) for feature in log.features]
            is_candidate_E = (log.label_E >= 0) | (log.feature_E < 0)
            found.append(
                (number(log, [*behaviors, ""], log.feature_E), number(log, [self.item_template, ""], is_candidate_E - 1))
            )
        return list(numbers), found

    @property
    def atoms(self) -> list[str]:
        """Distinct texts of behaviours and candidates, by number; 0 is the empty one, for padding."""
        return self._atoms[0]

    @property
    def text_fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what makes texts of events: templates and normalisation."""
        return hashlib.sha256(json.dumps([NORMALIZATION, self.behavior_template, self.item_template]).encode()).hexdigest()

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the lists."""
        return self.log.features

    @property
    def num_features(self) -> int:
        """Number of lists."""
        return len(self.features)

    @property
    def num_users(self) -> int:
        """Largest number of a user."""
        return len(self.log.user_keys)

    @property
    def num_items(self) -> int:
        """Largest number of an item."""
        return len(self.log.item_keys)

    @property
    def dedup_factor(self) -> float:
        """Behaviours in the lists of all candidates of the source over its atoms."""
        rows = self._rows(0, np.flatnonzero(self.log.label_E >= 0))
        return rows.num_slots / len(np.setdiff1d(np.concatenate(self._atoms[1][0]), [0]))

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Events with a label, and which of training, validation and test each is in, by number."""
        log = self.log
        event_R = np.flatnonzero(log.label_E >= 0)
        if self.split_by == "user":
            part_U = 0 + held_out(log.user_keys, self.split[1] + self.split[2]) + held_out(log.user_keys, self.split[2])
            return event_R, part_U[log.user_E[event_R]]
        if self.train_until is not None:
            return event_R, np.where(log.time_E[event_R] < self.train_until, 0, 2)
        bounds = np.round(np.cumsum(self.split[:2]) * len(event_R))
        return event_R, np.searchsorted(bounds, np.arange(len(event_R)), side="right")

    def _candidates(self, split: Split) -> np.ndarray:
        """Numbers of the events of a split, by time."""
        event_R, part_R = self._parts
        event_R = event_R[part_R == SPLITS.index(split)]
        begin = self.train_from if split == "train" else None
        end = self.test_until if split == "test" else None
        time_R = self.log.time_E[event_R]
        return event_R[(time_R >= (-np.inf if begin is None else begin)) & (time_R < (np.inf if end is None else end))]

    @cached_property
    def _known(self) -> dict[str, dict[str, int]]:
        """Numbers of users and items that training knows, also from before ``train_from``, so that they are the same each day."""
        event_R, part_R = self._parts
        trained, log = event_R[part_R == 0], self.log
        return {
            "user_id": {log.user_keys[number]: number + 1 for number in np.unique(log.user_E[trained]).tolist()},
            "item_id": {log.item_keys[number]: number + 1 for number in np.unique(log.item_E[trained]).tolist()},
        }

    @cached_property
    def _tables(self) -> list[tuple[Behaviors, dict[str, np.ndarray]]]:
        """Lists, and further entries of batches, of each log."""
        found = []
        for log, (behavior_E, item_E) in zip(self._logs, self._atoms[1], strict=True):
            columns = {"item": item_E, "log_odds": log.log_odds_E, "user": log.user_E}
            for name, keys, number_E in (("user_id", log.user_keys, log.user_E), ("item_id", log.item_keys, log.item_E)):
                columns[name] = np.array([self._known[name].get(key, 0) for key in keys], dtype=np.int64)[number_E]
            if log is self.log:
                columns["label"] = log.label_E.astype(np.float32)
            found.append((Behaviors(log, behavior_E), columns))
        return found

    def _rows(self, which: int, event_R: np.ndarray) -> HistoryRows:
        """Events of a log as rows."""
        behaviors, columns = self._tables[which]
        return HistoryRows(behaviors, self.history, event_R, columns)

    def dataset(self, split: Split) -> HistoryRows:
        """Candidates of a split."""
        return self._rows(0, self._candidates(split))

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        return self.train_loader(self.dataset("train"))

    @override
    def val_dataloader(self) -> ResumableLoader[Any] | list[Any]:
        rows = self.dataset("val")
        return self.eval_loader(rows) if len(rows) else []

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        if self.predict_file is None:
            return self.eval_loader(self.dataset(self.predict_split))
        own = self._logs[1]
        return self.eval_loader(self._rows(1, np.flatnonzero((own.label_E < 0) & (own.feature_E < 0))))
