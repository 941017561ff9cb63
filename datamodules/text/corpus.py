"""Sources of text as ids on disk: read, de-duplicated, divided into training and validation, tokenised once.

The result lies in the cache (``$LIGHTNING_ZOO_CACHE``) in a folder named by what it depends on: the content of the source's
files, the tokenizer, the share of validation, and the de-duplication. It is written under another name and renamed, under a
lock, so that an interrupted run leaves nothing half done and two processes do the work once.

The file's path within the source, or a row's text, decides what is held out for validation
(:mod:`datamodules.base.held_out`).
Of a source with a single document, its end is held out; of a ``.bin`` file, the last documents are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.assets.fetch import cache_folder
from datamodules.base.cached_folder import Preparing
from datamodules.base.held_out import held_out
from datamodules.base.json_lines import OnError
from datamodules.text.deduplication import Dedup, Deduplicator
from datamodules.text.documents import Document, Source, text_source
from datamodules.text.token_files import TokenFile, open_token_file, write_token_file
from datamodules.text.tokenizer import Tokenizer

__all__ = ["Corpus", "CorpusFacts", "read_corpora"]

_FORMAT = "1"  # another one makes the cache again
_ENCODED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CorpusFacts:
    """Facts about a source.

    Attributes:
        sha256: SHA-256 of its files.
        text_bytes: Bytes of UTF-8 text of the documents, without those left out.
        num_bytes: The same as the ids count it; another number if the tokenizer does not keep every byte.
        num_documents: Number of documents.
        num_duplicates: Number of documents left out because they were seen before.
        num_malformed: Number of rows and files left out because they could not be read.
        train_tokens: Ids for training, an eos for each document among them.
        val_tokens: Ids for validation.
        train_bytes: Bytes that the ids for training stand for.
        val_bytes: Bytes that the ids for validation stand for.
    """

    sha256: str
    text_bytes: int
    num_bytes: int
    num_documents: int
    num_duplicates: int
    num_malformed: int
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int


@dataclass(frozen=True)
class Corpus:
    """A source as ids.

    Attributes:
        name: Name that the user gives the source.
        train: Documents for training.
        val: Documents for validation.
        facts: Their sizes.
    """

    name: str
    train: TokenFile
    val: TokenFile
    facts: CorpusFacts


def read_corpora(
    names: Sequence[str], tokenizer: Tokenizer, val_fraction: float, dedup: Dedup, on_error: OnError
) -> list[Corpus]:
    """Read sources, from the cache where they are there; their sizes and SHA-256 are logged.

    Args:
        names: The sources (:mod:`datamodules.text.documents`), in the order in which of two equal documents the first stays.
            ``.bin`` files are taken as they are: they hold no text that could be compared.
        tokenizer: Makes the ids.
        val_fraction: Share of the documents that is held out; 0: none.
        dedup: Documents to leave out because they, or nearly they, were seen before, in this source or an earlier one.
        on_error: Treatment of rows and files that cannot be read (:mod:`datamodules.base.json_lines`).

    Raises:
        FileNotFoundError: A source does not exist, or holds no file.
        ValueError: A source holds no text, or malformed rows.
    """
    known = Deduplicator(dedup)
    shown: list[Source] = []  # to `known`
    earlier: list[Source] = []
    corpora = []
    for name in names:
        if name.endswith(".bin"):
            corpora.append(_read_tokens(name, tokenizer, val_fraction))
        else:
            source = text_source(name)
            before = [other.sha256 for other in earlier] if dedup != "none" else []
            parts = [_FORMAT, source.sha256, tokenizer.fingerprint, repr(val_fraction), dedup, on_error, *before]
            folder = cache_folder() / "tokens" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
            if not folder.is_dir():
                with Preparing(folder) as partial:
                    if not folder.is_dir():
                        for other in earlier[len(shown) :]:
                            for document in other.documents(on_error):
                                known.is_duplicate(document.text)
                            shown.append(other)
                        _tokenise(source, tokenizer, val_fraction, known, on_error, partial)
                        shown.append(source)
                        partial.replace(folder)
            earlier.append(source)
            corpora.append(_open(name, folder))
        facts = corpora[-1].facts
        rank_zero_info(
            f"{name}: {facts.text_bytes:,} bytes of text in {facts.num_documents:,} documents; left out are "
            f"{facts.num_duplicates:,} duplicates and {facts.num_malformed:,} malformed ones; SHA-256 {facts.sha256}; "
            f"{facts.train_tokens:,} ids for training, {facts.val_tokens:,} for validation."
        )
        if facts.num_bytes != facts.text_bytes:
            rank_zero_warn(
                f"The tokenizer does not keep every byte of {name}: its ids stand for {facts.num_bytes:,} bytes, the text has "
                f"{facts.text_bytes:,}. Bits per byte come out wrong by a factor of {facts.text_bytes / facts.num_bytes:.4f}."
            )
    return corpora


def _tokenise(
    source: Source, tokenizer: Tokenizer, val_fraction: float, known: Deduplicator, on_error: OnError, folder: Path
) -> None:
    keys: list[str] = []
    sizes: list[int] = []
    duplicates = 0

    def kept() -> Iterator[Document]:
        nonlocal duplicates
        for document in source.documents(on_error):
            if known.is_duplicate(document.text):
                duplicates += 1
                continue
            keys.append(document.key)
            sizes.append(len(document.text.encode()))
            yield document

    whole = write_token_file(folder / "whole.bin", _encoded(kept(), tokenizer), tokenizer)
    if not keys:
        raise ValueError(f"The source {source.name} holds no text{' that was not seen before' if duplicates else ''}.")
    begins = np.concatenate([[0], whole.ends[:-1]])
    pieces = np.stack([begins, whole.ends - 1], axis=1)  # without eos, which is written again
    if val_fraction and len(keys) == 1:
        middle = int((1 - val_fraction) * (len(whole) - 1))
        pieces, for_val = np.array([[0, middle], [middle, len(whole) - 1]]), np.array([False, True])
    else:
        for_val = held_out(keys, val_fraction)
    token_bytes = tokenizer.token_bytes.numpy()
    parts = {}
    for name, chosen in (("train", pieces[~for_val]), ("val", pieces[for_val])):
        documents = (np.asarray(whole.tokens[begin:end]) for begin, end in chosen)
        parts[name] = write_token_file(folder / f"{name}.bin", documents, tokenizer)
    train, val = parts["train"].num_bytes(token_bytes), parts["val"].num_bytes(token_bytes)
    facts = CorpusFacts(
        source.sha256,
        sum(sizes),
        train + val,
        len(keys),
        duplicates,
        source.num_malformed,
        len(parts["train"]),
        len(parts["val"]),
        train,
        val,
    )
    (folder / "facts.json").write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    del whole
    for path in folder.glob("whole.*"):
        path.unlink()


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of documents; some megabytes of text at a time, which is what fast tokenizers are fast for."""
    texts: list[str] = []
    waiting = 0
    for document in documents:
        texts.append(document.text)
        waiting += len(document.text)
        if waiting >= _ENCODED_AT_ONCE:
            yield from tokenizer.encode_many(texts)
            texts, waiting = [], 0
    yield from tokenizer.encode_many(texts)


def _open(name: str, folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    files = []
    for part in ("train", "val"):
        dtype = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))["dtype"]
        files.append(TokenFile(folder / f"{part}.bin", dtype, np.load(folder / f"{part}.idx.npy")))
    return Corpus(name, files[0], files[1], CorpusFacts(**facts))


def _read_tokens(name: str, tokenizer: Tokenizer, val_fraction: float) -> Corpus:
    whole, sha = open_token_file(Path(name).expanduser(), tokenizer)
    train, val = whole.split(val_fraction)
    token_bytes = tokenizer.token_bytes.numpy()
    sizes = [train.num_bytes(token_bytes), val.num_bytes(token_bytes)]
    return Corpus(name, train, val, CorpusFacts(sha, sum(sizes), sum(sizes), len(whole.ends), 0, 0, len(train), len(val), *sizes))
