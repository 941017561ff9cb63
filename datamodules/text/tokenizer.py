"""Tokenizers behind one small interface: bytes, or any fast tokenizer of Hugging Face.

``tokenizer: byte`` needs no file. Every other name is a folder with ``tokenizer.json`` (a released model's folder is one), a
file ``tokenizer.json``, weights shipped with this package that have one (``rlhf-vader-sft``), or the name of a repository on the
Hugging Face hub. Only the tokenizer's data are read, never code that lies beside them.

Text is encoded *as text*: where a document or a chat message happens to contain ``<|endoftext|>``, that is some characters, and
not the end of a document. A chat template, which writes special tokens on purpose, passes ``special=True``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from datamodules.assets.fetch import MANIFEST, fetch

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "Tokenizer", "load_tokenizer"]


class Tokenizer(ABC):
    """Text to ids and back. Ids go from 0 to ``vocab_size - 1``.

    Attributes:
        vocab_size: Number of ids. A model may have more.
        eos_id: Ends a document, an assistant's turn and a generated text.
        bos_id: Begins a text, where the tokenizer has such a token; nothing here adds it.
        pad_id: Fills rows of a batch up.
        cls_id: Stands in front of a text whose vector it becomes, where the tokenizer has such a token.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    cls_id: int | None = None

    @abstractmethod
    def encode(self, text: str, special: bool = False) -> list[int]:
        """A text as ids, with nothing added before or behind.

        Args:
            text: Any text.
            special: Whether special tokens written in the text, such as ``<|endoftext|>``, are taken as such.
        """

    def encode_with_spans(self, text: str, special: bool = False) -> tuple[list[int], np.ndarray]:
        """A text as ids, and the characters of it behind each id.

        Args:
            text: Any text.
            special: As for :meth:`encode`.

        Returns:
            The ids of :meth:`encode`, and int64 (N, 2), the first character of each and the one after its last. Ids that are
            parts of one character have the same.

        Raises:
            ValueError: If the tokenizer does not know them.
        """
        raise ValueError(
            f"{type(self).__name__} does not tell which characters its ids stand for (a slow tokenizer does not): take "
            f"tokenizer: byte, or a fast tokenizer of Hugging Face, which has a tokenizer.json."
        )

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Texts as ids, integer arrays (N,); faster than one by one."""
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        """Ids as text, without special tokens and ids beyond the vocabulary."""

    @property
    @abstractmethod
    def token_bytes(self) -> Tensor:
        """Number of bytes of UTF-8 text behind each id: int64 (``vocab_size``,), 0 for special tokens."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the tokenizer: equal for those that encode alike."""


class ByteTokenizer(Tokenizer):
    """The bytes of the UTF-8 text: ids 0 to 255, then the special tokens 256 (begin), 257 (end) and 258 (padding).

    Example:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
        >>> ByteTokenizer().decode([110, 195, 169, 257])
        'né'
    """

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258
    fingerprint = "byte"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """A text as its bytes; no text stands for a special token."""
        return list(text.encode())

    def encode_with_spans(self, text: str, special: bool = False) -> tuple[list[int], np.ndarray]:
        """A text as its bytes, each of which stands for the character that it is a part of."""
        sizes = np.fromiter((len(character.encode()) for character in text), dtype=np.int64)
        begin_N = np.repeat(np.arange(len(text)), sizes)
        return self.encode(text, special), np.stack([begin_N, begin_N + 1], axis=1)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Texts as their bytes, uint8."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        """Bytes as text; what is no UTF-8 becomes the replacement character."""
        numbers = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids, dtype=np.int64)
        return numbers[numbers < 256].astype(np.uint8).tobytes().decode(errors="replace")

    @property
    def token_bytes(self) -> Tensor:
        """One byte an id, none for special tokens."""
        return (torch.arange(self.vocab_size) < 256).long()


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer of Hugging Face.

    Args:
        name: An asset with a language model, a GGUF file, a folder with ``tokenizer.json`` (and ``tokenizer_config.json``, with
            the special tokens), path of a ``tokenizer.json``, weights shipped with this package that have one, or name of a
            repository on the hub. Without a ``tokenizer_config.json``, the special tokens called ``<pad>``, ``<bos>`` and
            ``<eos>`` are taken for these. Encoders such as BERT have no eos token: their sep token ends a text.

    Raises:
        FileNotFoundError: There is no such folder or file, or the hub has no tokenizer of that name or cannot be reached.
        ValueError: If it has no token for the end of a text.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.transformers = _load(name)
        ends = (self.transformers.eos_token_id, self.transformers.sep_token_id)
        if ends == (None, None):
            raise ValueError(
                f"The tokenizer {name} has no eos token, which has to end documents: name one as eos_token in the "
                f"tokenizer_config.json beside its tokenizer.json."
            )
        self.vocab_size = max(self.transformers.get_vocab().values()) + 1
        self.eos_id = ends[1] if ends[0] is None else ends[0]
        self.cls_id = self.transformers.cls_token_id
        self.bos_id = self.transformers.bos_token_id
        self.pad_id = self.eos_id if self.transformers.pad_token_id is None else self.transformers.pad_token_id

    def encode(self, text: str, special: bool = False) -> list[int]:
        """A text as ids, with nothing added before or behind."""
        return list(self._backend(special).encode(text, add_special_tokens=False).ids)

    def encode_with_spans(self, text: str, special: bool = False) -> tuple[list[int], np.ndarray]:
        """A text as ids, and the characters of each, white space included that the tokenizer's own offsets leave out."""
        backend = self._untrimmed
        backend.encode_special_tokens = not special
        encoding = backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Texts as ids, int64."""
        encodings = self._backend(special=False).encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        """Ids as text, without special tokens and ids beyond the vocabulary."""
        known = [int(number) for number in ids if number < self.vocab_size]
        return str(self.transformers.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def token_bytes(self) -> Tensor:
        """Bytes of each id.

        Exact for tokenizers that keep every byte, with a byte-level alphabet or with pieces that have ``▁`` for the space. One
        that drops or changes characters has no exact count; :mod:`datamodules.text.corpus` compares the sum with the text.
        """
        byte_level = _is_byte_level(json.loads(self.transformers.backend_tokenizer.to_str()).get("decoder"))
        added = self.transformers.added_tokens_decoder
        special = set(self.transformers.all_special_ids) | {number for number, token in added.items() if token.special}
        sizes = torch.zeros(self.vocab_size, dtype=torch.int64)
        for piece, number in self.transformers.get_vocab().items():
            if number in special:
                continue
            if number in added:
                sizes[number] = len(piece.encode())
            elif byte_level:
                sizes[number] = len(piece)  # one character of its alphabet a byte
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
                sizes[number] = 1
            else:
                sizes[number] = len(piece.replace("▁", " ").encode())
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's data."""
        special = f"{self.eos_id}/{self.pad_id}/"
        return hashlib.sha256((special + self.transformers.backend_tokenizer.to_str()).encode()).hexdigest()

    @cached_property
    def _untrimmed(self) -> Any:
        """The backend without its last stage, which only adds special tokens and trims spaces off the offsets."""
        backend = copy.deepcopy(self.transformers.backend_tokenizer)
        backend.post_processor = None
        return backend

    def _backend(self, special: bool) -> Any:
        backend = self.transformers.backend_tokenizer
        backend.encode_special_tokens = not special
        return backend


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name: ``byte``, or what :class:`HuggingFaceTokenizer` takes."""
    return ByteTokenizer() if name == "byte" else HuggingFaceTokenizer(name)


_HUB_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def _load(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast  # slow to import, and not needed for bytes

    path = fetch(name) if name in MANIFEST else Path(name).expanduser()
    if not path.exists():
        shipped = Path(str(resources.files("zoo"))).glob("*/weights/*/tokenizer.json")
        path = next((file.parent for file in shipped if file.parent.name == name), path)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(files) == 1 and not (path / "tokenizer.json").is_file():
        return _of_gguf(files[0])
    folder = path.parent if path.name == "tokenizer.json" else path
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The tokenizer {name!r} is no folder here, and the Hugging Face hub did not give it "
                f"({str(error).splitlines()[0]}): give the folder of one."
            ) from error
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"The tokenizer {name!r} is neither `byte`, nor a folder with a tokenizer.json (the file of a fast tokenizer), nor "
            f"the name of a repository on the hub such as inclusionAI/Ling-lite."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    if not (folder / "tokenizer_config.json").is_file():
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        roles = {role: f"<{role}>" for role in ("pad", "bos", "eos") if f"<{role}>" in special}
        tokenizer.add_special_tokens({f"{role}_token": token for role, token in roles.items()})
    # A file may tell to cut texts off and to fill them up, which nobody here has asked for.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _of_gguf(path: Path) -> Any:
    """The tokenizer inside a GGUF file."""
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"{path.name} needs the package gguf, which is not installed: pip install 'lightning-zoo[llm]'."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether the pieces are written in the alphabet that has one character for each byte."""
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", ())))
