"""Texts to vectors through the lower blocks of a language model, and into a store.

Shape suffixes: A texts, T tokens, D width.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.bahe.atom_store import AtomStore
from zoo.lm.pooling import Pooling

__all__ = ["AtomEncoder", "fill"]


class AtomEncoder:
    """``E = F_p(low(tokens))`` of each text. Source: arXiv 2403.19347, section 2.

    Args:
        low: Embedding and lower blocks.
        tokenizer: Of transformers.
        pooling: F_p.
        max_tokens: Longest text, in tokens; more are left out.
        batch_size: Texts encoded at a time, of about the same length.

    Raises:
        ValueError: If ``pooling`` is ``cls`` and the tokenizer has no such token.
    """

    def __init__(self, low: nn.Module, tokenizer: Any, pooling: Pooling, max_tokens: int, batch_size: int = 128) -> None:
        if pooling.kind == "cls" and tokenizer.cls_token_id is None:
            raise ValueError("BAHE: atom_pooling='cls' needs a cls token, which this tokenizer lacks: take mean or last.")
        self.low, self.tokenizer, self.pooling = low, tokenizer, pooling
        self.max_tokens, self.batch_size = max_tokens, batch_size

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What vectors depend on, but for the texts."""
        tokens = json.loads(self.tokenizer.backend_tokenizer.to_str())
        del tokens["truncation"], tokens["padding"]  # those of the last call
        tokens = json.dumps(tokens)
        return {
            "weights": weights_sha256(self.low),
            "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(),
            "pooling": self.pooling.kind,
            "max_tokens": self.max_tokens,
        }

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, with the tokenizer's special ones."""
        ids: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        return [own or [self.tokenizer.pad_token_id or 0] for own in ids]

    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Vectors (A, D) of texts, on the device where the lower blocks are."""
        ids = self.tokens(texts)
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        parts = [
            self._batch([ids[number] for number in order[begin : begin + self.batch_size]], device)
            for begin in range(0, len(order), self.batch_size)
        ]
        return torch.cat(parts)[torch.tensor(order, device=device).argsort()]

    def _batch(self, ids: list[list[int]], device: torch.device | str) -> Tensor:
        ids_AT = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
        mask_AT = torch.zeros_like(ids_AT)
        for row, own in enumerate(ids):
            ids_AT[row, : len(own)], mask_AT[row, : len(own)] = torch.tensor(own), 1
        mask_AT = mask_AT.to(device)
        return self.pooling(self.low(ids_AT.to(device), mask_AT), mask_AT)


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of all parameters in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.named_parameters()):
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fill(store: AtomStore, texts: Sequence[str], encode: Callable[[list[str]], Tensor], chunk: int = 4096) -> int:
    """Encode the texts that a store lacks; all processes share the work, the first one writes.

    What is written stays where the work is interrupted: rows are those of an undisturbed run, since chunks come in the order of
    the texts.

    Args:
        store: The store.
        texts: Texts, normalised.
        encode: Makes vectors (A, D).
        chunk: Texts that are encoded between two writes.

    Returns:
        Number of texts that were encoded.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    asked = [store.missing(texts) if rank == 0 else []]
    if ranks > 1:
        dist.broadcast_object_list(asked)
    for begin in range(0, len(asked[0]), chunk):
        part = asked[0][begin : begin + chunk]
        own = part[rank::ranks]
        vectors = encode(own).detach().to("cpu", torch.float16) if own else torch.zeros(0, store.dim, dtype=torch.float16)
        if ranks > 1:
            parts: list[Any] = [None] * ranks
            dist.all_gather_object(parts, vectors.numpy())
            vectors = torch.zeros(len(part), store.dim, dtype=torch.float16)
            for first, values in enumerate(parts):
                vectors[first::ranks] = torch.from_numpy(values)
        if rank == 0:
            store.append(part, vectors)
    if ranks > 1:
        dist.barrier()
    return len(asked[0])
