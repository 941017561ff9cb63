"""Users' histories over several domains, by titles; source: Tang et al., TOIS 2025 (arXiv 2310.14304).

Shape suffixes: N interactions, R rows, U users, I items, D domains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from datamodules.assets.fetch import MANIFEST, cache_folder, fetch
from datamodules.base.cached_folder import prepare
from datamodules.base.datamodule import ZooDataModule
from datamodules.base.json_lines import MalformedRow, MalformedRows, OnError, encodable, read_json_lines
from datamodules.base.loader import ResumableLoader
from datamodules.interactions.amazon_files import metadata_files, read_amazon
from datamodules.interactions.atomic_files import read_atomic_files, read_movielens
from datamodules.interactions.catalogue import Catalogue, encode_titles, write_tokens
from datamodules.interactions.interaction_log import InteractionLog, Pipeline, RawLog
from datamodules.interactions.interaction_rows import InteractionRows, Stretches, draw_negatives, sequences
from datamodules.interactions.journey import read_journey
from datamodules.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Interactions"]

_FORMAT = "1"  # another one makes the cache again
_TAIL = 5
_ASSETS: dict[str, Callable[[Path], RawLog]] = {"movielens-100k": read_movielens, "journey": read_journey}


class Interactions(ZooDataModule):
    """Interactions of users with titled items of several domains, by leaving one out.

    Of a user's n interactions, by time and over all domains, the last is the target of test, the one before of validation, and
    each of the others but the first a target of training; its history is what comes before it. Batches are
    :class:`~datamodules.interactions.interaction_rows.InteractionBatch`. A training example has at least one item of history;
    evaluation keeps every user, also where nothing of the target's domain comes before it, and the history is empty.

    ``predict`` takes each user with her whole history, with ``history: domain`` once for each of her domains.

    Args:
        source: ``movielens-100k`` (real, but its domains are groups of genres of one site, a proxy for shops); ``journey``
            (simulated, says its package; needs the extra ``recsys``); or a folder with Amazon's files of 2014, 2018 or 2023, or
            with atomic files as of RecBole.
        tokenizer: As for :func:`~datamodules.load_tokenizer`. ``null``: no tokens, for models on ids.
        domains: Domains of a folder to read, in the order of their numbers. ``null``: all, by name.
        max_history: Items of a history, the last ones.
        max_title_tokens: Tokens of a title; more are cut off.
        history: Items of a history: of all domains (``mixed``), or of the target's (``domain``).
        train_domains: Domains that training sees, in targets and in histories. ``null``: all.
        eval_domains: Domains of the targets of validation and test, and of ``predict`` with ``history: domain``. ``null``: all.
        k_core: Interactions that each user and each item has at least, over all domains.
        last: Only the last so many interactions of each user, before the k-core. ``null``: all.
        users_fraction: Share of the users that is taken, by a fixed hash of their ids.
        cold_fraction: Last share of all interactions; items first seen in it are cold: training does not see them, neither as
            targets nor in histories.
        eval_negatives: Number of candidates of the target's domain that evaluation ranks the target among, drawn as published
            (1000 there). ``null``: none are drawn.
        string_time_sort: Sort times as texts, as the published code does: nine digits come after ten.
        clean: Whether HTML entities and control characters are taken out of titles.
        num_val_users: Users of validation, evenly spaced. ``null``: all.
        predict_histories: JSONL file of histories for ``predict``: ``{"user": ..., "history": [title or item id, ...], "domain":
            ...}``, the oldest first, ``domain`` optional.
        on_error: Treatment of malformed rows: ``raise`` an error that counts them and shows the first, or ``skip`` them and log
            their number.
        **kwargs: Arguments of `ZooDataModule`.

    Raises:
        ValueError: An argument is out of range.
    """

    model_arguments: ClassVar[tuple[str, ...]] = ("num_items",)

    def __init__(
        self,
        source: str = "movielens-100k",
        tokenizer: str | None = "minilm-l6",
        domains: list[str] | None = None,
        max_history: int = 10,
        max_title_tokens: int = 40,
        history: Literal["mixed", "domain"] = "mixed",
        train_domains: list[str] | None = None,
        eval_domains: list[str] | None = None,
        k_core: tuple[int, int] = (5, 5),
        last: int | None = None,
        users_fraction: float = 1.0,
        cold_fraction: float = 0.0,
        eval_negatives: int | None = None,
        string_time_sort: bool = False,
        clean: bool = False,
        num_val_users: int | None = None,
        predict_histories: Path | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        numbers = {"max_history": max_history, "max_title_tokens": max_title_tokens, "last": last, "num_val_users": num_val_users}
        numbers |= {"eval_negatives": eval_negatives, "k_core[0]": k_core[0], "k_core[1]": k_core[1]}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"Interactions: {name}={value} must be at least 1.")
        if not 0 < users_fraction <= 1:
            raise ValueError(f"Interactions: users_fraction={users_fraction} must be more than 0 and at most 1.")
        if not 0 <= cold_fraction < 1:
            raise ValueError(f"Interactions: cold_fraction={cold_fraction} must be from 0 to less than 1.")
        for name, choice, choices in (("history", history, ("mixed", "domain")), ("on_error", on_error, get_args(OnError))):
            if choice not in choices:
                raise ValueError(f"Interactions: {name}={choice!r} must be one of {', '.join(choices)}.")
        if domains is not None and source in _ASSETS:
            raise ValueError(f"Interactions: domains choose among those of a folder; {source} has its own, see train_domains.")
        self.source = source
        self.tokenizer_name = tokenizer
        self.domains = domains
        self.max_history = max_history
        self.max_title_tokens = max_title_tokens
        self.history = history
        self.train_domains = train_domains
        self.eval_domains = eval_domains
        self.pipeline = Pipeline((k_core[0], k_core[1]), last, users_fraction, string_time_sort, clean)
        self.cold_fraction = cold_fraction
        self.eval_negatives = eval_negatives
        self.num_val_users = num_val_users
        self.predict_histories = None if predict_histories is None else Path(predict_histories)
        self.on_error = on_error

    @override
    def prepare_data(self) -> None:
        """Fetch or read the source, encode the titles, draw the candidates: once, into the cache."""
        _ = self.catalogue, self._candidates

    @override
    def setup(self, stage: str) -> None:
        """Open what was prepared; read the user's histories."""
        _ = self.catalogue, self._domain_numbers("eval_domains")
        if stage == "fit":
            _ = self._train_rows
        elif stage == "predict":
            _ = self._predict_rows

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.catalogue)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if there is one."""
        return None if self.tokenizer_name is None else load_tokenizer(self.tokenizer_name)

    @property
    def interaction_log(self) -> InteractionLog:
        """The interactions."""
        return self._log[0]

    @cached_property
    def _log(self) -> tuple[InteractionLog, str]:
        parts = [self._source_key, repr(self.pipeline), repr(self.domains), self.on_error]
        return InteractionLog.open(_prepared("log", parts, lambda folder: self._read().save(folder)))

    @property
    def _source_key(self) -> str:
        """Changes with the source's data."""
        if self.source in _ASSETS:
            return MANIFEST[self.source].sha256
        folder = Path(self.source).expanduser().resolve()
        if not folder.is_dir():
            names = ", ".join(_ASSETS)
            raise FileNotFoundError(f"The source {self.source!r} is neither one of {names} nor a folder: give one of them.")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])

    def _read(self) -> InteractionLog:
        if self.source in _ASSETS:
            raw = _ASSETS[self.source](fetch(self.source))
        else:
            folder = Path(self.source).expanduser()
            read = read_amazon if metadata_files(folder) else read_atomic_files
            raw = read(folder, self.domains, self.on_error)
        log = self.pipeline(raw, self.source)
        sizes = ", ".join(f"{name} {size:,}" for name, size in zip(log.domains, np.diff(log.domain_offsets), strict=True))
        rank_zero_info(
            f"{self.source}{' (simulated)' * (self.source == 'journey')}: {len(log.user_keys):,} users, {len(log.item_keys):,}"
            f" items ({sizes}), {len(log.item_N):,} interactions; users active in 1, 2, ... domains: {log.active_domains}."
        )
        return log

    @cached_property
    def _is_cold(self) -> np.ndarray:
        """Whether each item is first seen in the last share of the interactions, bool (I,)."""
        log = self.interaction_log
        first_I = np.full(len(log.item_keys), np.iinfo(np.int64).max)
        np.minimum.at(first_I, log.item_N, log.time_N)
        return first_I > (np.quantile(log.time_N, 1 - self.cold_fraction) if self.cold_fraction else np.inf)

    @cached_property
    def _training(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items of training in sequences, where the sequence of each begins, and the places of the targets."""
        log = self.interaction_log
        left_N = np.repeat(log.user_offsets[1:], np.diff(log.user_offsets)) - np.arange(len(log.item_N))
        taken_I = np.isin(log.item_domain, self._domain_numbers("train_domains")) & ~self._is_cold
        place_N, begin_N = sequences(log, (left_N > 2) & taken_I[log.item_N], self.history == "domain")
        return log.item_N[place_N], begin_N, np.flatnonzero(begin_N < np.arange(len(place_N)))

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items."""
        log, (item_N, _, targets) = self.interaction_log, self._training
        values, offsets = self._tokens or (np.zeros(0, dtype=np.int32), np.zeros(len(log.item_keys) + 1, dtype=np.int64))
        counts = np.bincount(item_N[targets], minlength=len(log.item_keys))
        return Catalogue(
            log.titles,
            log.item_keys,
            log.domains,
            torch.tensor(log.domain_offsets),
            torch.from_numpy(counts),
            torch.from_numpy(self._is_cold),
            torch.from_numpy(values),
            torch.from_numpy(offsets),
            0 if self.tokenizer is None else self.tokenizer.pad_id,
        )

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray] | None:
        if (tokenizer := self.tokenizer) is None:
            return None
        log, digest = self._log
        parts = [digest, tokenizer.fingerprint, str(self.max_title_tokens)]
        folder = _prepared("tokens", parts, lambda folder: write_tokens(folder, log.titles, tokenizer, self.max_title_tokens))
        # Copied when written to: torch warns of arrays that cannot be written to.
        return np.load(folder / "values.npy", mmap_mode="c"), np.load(folder / "offsets.npy", mmap_mode="c")

    @cached_property
    def _candidates(self) -> dict[str, np.ndarray] | None:
        """Candidates of validation and test, int32 (U, K)."""
        if (number := self.eval_negatives) is None:
            return None
        log, digest = self._log

        def write(folder: Path) -> None:
            shape = (len(log.user_keys), number)
            files = [np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.int32, shape) for split in ("val", "test")]
            if small := draw_negatives(log, number, *files):
                rank_zero_info(
                    f"Fewer than eval_negatives={number} items in {', '.join(small)}: all of the domain are candidates."
                )

        folder = _prepared("candidates", [digest, str(number)], write)
        return {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("val", "test")}

    @property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256, in hexadecimal, of ``data`` (interactions, titles and their domains) and of the ``tokenizer``."""
        name = "" if self.tokenizer is None else self.tokenizer.fingerprint
        return {"data": self._log[1], "tokenizer": hashlib.sha256(name.encode()).hexdigest()}

    def _domain_numbers(self, argument: Literal["train_domains", "eval_domains"]) -> list[int]:
        names, known = getattr(self, argument), self.interaction_log.domains
        if unknown := [name for name in names or [] if name not in known]:
            raise ValueError(f"{argument} names {unknown[0]!r}: {self.source} has the domains {', '.join(known)[:180]}.")
        return [number for number, name in enumerate(known) if names is None or name in names]

    def _rows(self, histories: Stretches, columns: dict[str, np.ndarray], **kwargs: Any) -> InteractionRows:
        settings = {"max_history": self.max_history, "tokens": self._tokens, "pad_id": self.catalogue.pad_id}
        return InteractionRows(histories, columns, **{**settings, "num_items": len(self.catalogue), **kwargs})

    @cached_property
    def _train_rows(self) -> InteractionRows:
        item_N, begin_N, targets = self._training
        if not len(targets):
            raise ValueError(
                f"No example of {self.source} is left to train on: take more train_domains or a lower cold_fraction."
            )
        columns = {"target": item_N[targets], "domain": self.interaction_log.item_domain[item_N[targets]]}
        return self._rows(Stretches(item_N, begin_N[targets], targets), columns)

    def _eval_rows(self, split: Literal["val", "test"]) -> InteractionRows:
        log = self.interaction_log
        place_R = log.user_offsets[1:] - (2 if split == "val" else 1)
        user_R = np.flatnonzero(np.isin(log.item_domain[log.item_N[place_R]], self._domain_numbers("eval_domains")))
        if not len(user_R):
            raise ValueError(f"No target of {split} is in eval_domains={self.eval_domains}: take more domains.")
        if split == "val" and self.num_val_users is not None and self.num_val_users < len(user_R):
            user_R = user_R[np.arange(self.num_val_users) * len(user_R) // self.num_val_users]
        place_R = place_R[user_R]
        order_N, begin_N = sequences(log, np.ones(len(log.item_N), dtype=bool), self.history == "domain")
        at_R = np.argsort(order_N)[place_R]
        target_R = log.item_N[place_R]
        in_training_I = np.bincount(self._training[0], minlength=len(log.item_keys))
        columns = {
            "target": target_R,
            "domain": log.item_domain[target_R],
            "is_tail": in_training_I[target_R] <= _TAIL,
            "is_cold": self._is_cold[target_R],
        }
        candidates = None if self._candidates is None else (self._candidates[split], user_R)
        histories = Stretches(log.item_N[order_N], begin_N[at_R], at_R)
        seen = Stretches(log.item_N, log.user_offsets[user_R], place_R)
        return self._rows(histories, columns, seen=seen, candidates=candidates)

    @cached_property
    def _predict_rows(self) -> InteractionRows:
        if self.predict_histories is not None:
            return self._read_histories(self.predict_histories)
        log, by_domain = self.interaction_log, self.history == "domain"
        kept_N = np.ones(len(log.item_N), dtype=bool)
        if by_domain:
            kept_N = np.isin(log.item_domain, self._domain_numbers("eval_domains"))[log.item_N]
        place_N, begin_N = sequences(log, kept_N, by_domain)
        begin_R = np.unique(begin_N)
        end_R = np.append(begin_R[1:], len(begin_N))
        item_N, user_R = log.item_N[place_N], log.user_N[place_N[begin_R]]
        return self._rows(
            Stretches(item_N, begin_R, end_R),
            {"domain": log.item_domain[item_N[begin_R]] if by_domain else np.full(len(begin_R), -1)},
            seen=Stretches(log.item_N, log.user_offsets[user_R], log.user_offsets[user_R + 1]),
            users=[log.user_keys[user] for user in user_R.tolist()],
        )

    def _read_histories(self, path: Path) -> InteractionRows:
        """The user's own histories; titles that the catalogue does not know get numbers behind its own."""
        log = self.interaction_log
        number: dict[str, int] = {}
        for names in (log.item_keys, log.titles):
            for item, name in enumerate(names):
                number.setdefault(name, item)
        unknown: dict[str, int] = {}

        def parse(row: dict[str, Any]) -> tuple[str, list[int], int]:
            history, domain = row.get("history"), row.get("domain")
            if not isinstance(history, list) or not history or not all(isinstance(name, str) and name for name in history):
                raise MalformedRow('it has no "history", a list of titles or item ids')
            if domain is not None and domain not in log.domains:
                raise MalformedRow(f'its "domain" is none of {", ".join(log.domains)[:80]}')
            names = [encodable(name) for name in history]
            items = [
                number[name] if name in number else unknown.setdefault(name, len(log.item_keys) + len(unknown)) for name in names
            ]
            return str(row.get("user", "")), items, -1 if domain is None else log.domains.index(domain)

        rows = list(read_json_lines(path, parse, MalformedRows(self.on_error)))
        if not rows:
            raise ValueError(f"{path} holds no history.")
        tokens = self._tokens
        if tokens is not None and self.tokenizer is not None and unknown:
            values, offsets = encode_titles(list(unknown), self.tokenizer, self.max_title_tokens)
            tokens = np.concatenate([tokens[0], values]), np.concatenate([tokens[1], tokens[1][-1] + offsets[1:]])
        end_R = np.cumsum([len(items) for _, items, _ in rows])
        stretches = Stretches(np.array([item for _, items, _ in rows for item in items]), np.append(0, end_R[:-1]), end_R)
        domain_R = np.array([domain for _, _, domain in rows])
        users = [user for user, _, _ in rows]
        return self._rows(stretches, {"domain": domain_R}, seen=stretches, users=users, tokens=tokens)

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        return self.train_loader(self._train_rows)

    @override
    def val_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(self._eval_rows("val"))

    @override
    def test_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(self._eval_rows("test"))

    @override
    def predict_dataloader(self) -> ResumableLoader[Any]:
        return self.eval_loader(self._predict_rows)


def _prepared(kind: str, parts: list[str], write: Callable[[Path], None]) -> Path:
    """A folder of the cache that depends on `parts`, written if it is not there."""
    name = hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:16]
    return prepare(cache_folder() / "interactions" / f"{kind}-{name}", write)
