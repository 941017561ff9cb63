"""A table of item vectors, in which the targets of users are ranked and their best items found, chunk by chunk.

Shape suffixes: B users, b those of one batch, I items, i those of one chunk, D width, S seen items, K candidates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributed

from zoo.metrics.ranking import Ties, check_ks, rank

__all__ = ["ItemTable", "Scope", "TopItems"]

Scope = Literal["domain", "all"]

_SAMPLED_BYTES = 2**25
"""Memory of the candidates' vectors that `ItemTable.sampled_ranks` gathers at once."""


class TopItems(NamedTuple):
    """Best items of users, best first; where there are fewer than asked for, -1 with the score ``-inf``.

    Attributes:
        item_BK: Rows of the table.
        score_BK: Their scores, float32.
    """

    item_BK: Tensor
    score_BK: Tensor


class ItemTable:
    """Vectors of items, of which users' targets are ranked by dot product, and the best given, chunk by chunk.

    Memory beside the table is O(batch x chunk), and nothing is sorted. Ranks do not depend on chunks, batches, device or
    number of processes: scores are products in float32, and those too near the target's to be told apart are compared in
    float64. Scores that differ by at most ``2^-40 |user| max |item|``, the rounding of float64, are tied: equal vectors are.

    Args:
        vectors_ID: Vectors of the items, float32, domain by domain.
        domain_sizes: Numbers of items of the domains; None: one domain.
        chunk_size: Items that are scored at once.
        batch_size: Users that are scored at once.
        group: Processes over which the rows of the table are divided; None: the table is whole. All call the methods with
            the same users, and all get the result.
        first_row: Row of the divided table at which this process's rows begin.

    Raises:
        ValueError: If the sizes do not fit the vectors, or a vector is not finite.

    Example:
        >>> table = ItemTable(torch.eye(3), domain_sizes=[2, 1])
        >>> user, target = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])
        >>> table.ranks(user, target), table.ranks(user, target, scope="all")
        (tensor([2.], dtype=torch.float64), tensor([3.], dtype=torch.float64))
        >>> table.top_k(user, 2, domain=0).item_BK
        tensor([[1, 0]])
    """

    def __init__(
        self,
        vectors_ID: Tensor,
        domain_sizes: Sequence[int] | None = None,
        *,
        chunk_size: int = 4096,
        batch_size: int = 256,
        group: distributed.ProcessGroup | None = None,
        first_row: int = 0,
    ) -> None:
        if chunk_size < 1 or batch_size < 1:
            raise ValueError(f"chunk_size={chunk_size} and batch_size={batch_size} must be at least 1.")
        self.vectors_ID, self.first_row, self.group = vectors_ID.detach(), first_row, group
        self.chunk_size, self.batch_size = chunk_size, batch_size
        norm_I, rows = _norms(self.vectors_ID, "item"), torch.tensor(len(vectors_ID), device=vectors_ID.device)
        self._largest = norm_I.max() if len(norm_I) else norm_I.new_zeros(())
        if group is not None:
            distributed.all_reduce(self._largest, distributed.ReduceOp.MAX, group)
            distributed.all_reduce(rows, group=group)
        self.offsets = [0, *accumulate([int(rows)] if domain_sizes is None else domain_sizes)]
        if self.offsets[-1] != int(rows) or any(low >= high for low, high in pairwise(self.offsets)):
            raise ValueError(f"domain_sizes must be at least 1 and add up to the {int(rows)} items, got {self.offsets[-1]}.")

    def domains(self, item_B: Tensor) -> Tensor:
        """Domains (B,) of items."""
        return torch.bucketize(item_B, torch.tensor(self.offsets[1:], device=item_B.device), right=True)

    @torch.no_grad()
    def ranks(
        self,
        users_BD: Tensor,
        target_B: Tensor,
        *,
        scope: Scope = "domain",
        seen_BS: Tensor | None = None,
        ties: Ties = "pessimistic",
    ) -> Tensor:
        """Ranks of targets among all items, or among those of the target's domain.

        Args:
            users_BD: Vectors of the users, float32.
            target_B: Rows of their targets.
            scope: ``domain`` or ``all``.
            seen_BS: Rows of items that are no candidates, filled with -1; a target remains one.
            ties: As in `target_ranks`.

        Returns:
            Ranks (B,), float64.

        Raises:
            ValueError: If a vector is not finite, or a row is not in the table.
        """
        if scope not in ("domain", "all"):
            raise ValueError(f"scope={scope!r} must be domain or all.")
        norm_B = _norms(users_BD, "user").double()
        score_B = self._target_scores(users_BD, target_B)
        domain_B = self.domains(target_B) if scope == "domain" else torch.full_like(target_B, -1)
        # Rounding of a float32 product: sqrt(D) steps, four times as large as is likely.
        bound_B = norm_B * self._largest.double() * (4 * users_BD.shape[1] ** 0.5 + 2) * 2.0**-24
        low_B1, high_B1 = ((score_B + sign * bound_B).float()[:, None] for sign in (-1, 1))
        equal_B1 = (norm_B * self._largest.double() * 2.0**-40)[:, None]
        better_B, tied_B = torch.zeros_like(target_B), torch.zeros_like(target_B)
        flags = users_BD.new_empty(self.batch_size * self.chunk_size)
        for user_b, start, scores_bi in self._scores(users_BD, domain_B, seen_BS):
            target_b = target_B[user_b] - self.first_row - start
            here = ((target_b >= 0) & (target_b < scores_bi.shape[1])).nonzero()[:, 0]
            scores_bi[here, target_b[here]] = -torch.inf
            # Flags as floats are counted six times as fast as booleans.
            flags_bi = flags[: scores_bi.numel()].view_as(scores_bi)
            above_b = torch.gt(scores_bi, high_B1[user_b], out=flags_bi).sum(1)
            near_b = torch.ge(scores_bi, low_B1[user_b], out=flags_bi).sum(1) - above_b
            better_B[user_b] += above_b.long()
            unclear = near_b.nonzero()[:, 0]
            if len(unclear):
                user, block = user_b[unclear], scores_bi[unclear]
                near = (block >= low_B1[user]) & (block <= high_B1[user])
                item = near.any(0).nonzero()[:, 0]
                exact = users_BD[user].double() @ self.vectors_ID[start + item].double().T - score_B[user, None]
                better_B[user] += (near[:, item] & (exact > equal_B1[user])).sum(1)
                tied_B[user] += (near[:, item] & (exact.abs() <= equal_B1[user])).sum(1)
        if self.group is not None:
            for count_B in (better_B, tied_B):
                distributed.all_reduce(count_B, group=self.group)
        return rank(better_B, tied_B, ties)

    @torch.no_grad()
    def sampled_ranks(self, users_BD: Tensor, target_B: Tensor, candidates_BK: Tensor, *, ties: Ties = "pessimistic") -> Tensor:
        """Ranks of targets among sampled candidates, as in `ranks`.

        Args:
            users_BD: Vectors of the users, float32.
            target_B: Rows of their targets.
            candidates_BK: Rows of the candidates, filled with -1; the target among them is not counted, others as often as
                they occur.
            ties: As in `target_ranks`.
        """
        self._check_rows(candidates_BK, "candidate", -1)
        equal_B1 = (_norms(users_BD, "user").double() * self._largest.double() * 2.0**-40)[:, None]
        score_B = self._target_scores(users_BD, target_B)
        counts = []
        batch = max(1, _SAMPLED_BYTES // (8 * users_BD.shape[1] * max(1, candidates_BK.shape[1])))
        for user_b in torch.arange(len(target_B), device=target_B.device).split(batch):
            row_bK = candidates_BK[user_b] - self.first_row
            here_bK = (candidates_BK[user_b] >= 0) & (row_bK >= 0) & (row_bK < len(self.vectors_ID))
            vectors_bKD = self.vectors_ID[row_bK.where(here_bK, 0)].double()
            apart_bK = (vectors_bKD @ users_BD[user_b].double()[..., None])[..., 0] - score_B[user_b, None]
            here_bK &= candidates_BK[user_b] != target_B[user_b, None]
            better_bK, tied_bK = apart_bK > equal_B1[user_b], apart_bK.abs() <= equal_B1[user_b]
            counts.append(torch.stack([(here_bK & better_bK).sum(1), (here_bK & tied_bK).sum(1)]))
        better_B, tied_B = count_2B = torch.cat(counts, 1)
        if self.group is not None:
            distributed.all_reduce(count_2B, group=self.group)
        return rank(better_B, tied_B, ties)

    @torch.no_grad()
    def top_k(self, users_BD: Tensor, k: int, *, domain: int | None = None, seen_BS: Tensor | None = None) -> TopItems:
        """The k best items of each user; of equal scores the lower row first.

        Which of several items with equal scores is the last of the k is not defined.

        Args:
            users_BD: Vectors of the users, float32.
            k: Number of items.
            domain: The domain that they are taken from; None: all.
            seen_BS: Rows of items that are left out, filled with -1.

        Raises:
            ValueError: If a vector is not finite, the domain does not exist, or k is more than its items.
        """
        if domain is not None and not 0 <= domain < len(self.offsets) - 1:
            raise ValueError(f"domain={domain} must be None or from 0 to {len(self.offsets) - 2}.")
        check_ks([k], self.offsets[-1] if domain is None else self.offsets[domain + 1] - self.offsets[domain])
        _norms(users_BD, "user")
        best = TopItems(
            torch.full((len(users_BD), k), -1, device=users_BD.device),
            torch.full((len(users_BD), k), -torch.inf, device=users_BD.device),
        )
        domain_B = torch.full((len(users_BD),), -1 if domain is None else domain, device=users_BD.device)
        for user_b, start, scores_bi in self._scores(users_BD, domain_B, seen_BS):
            score_bK, item_bK = scores_bi.topk(min(k, scores_bi.shape[1]), 1)
            found = _best(k, [best.item_BK[user_b], item_bK + start + self.first_row], [best.score_BK[user_b], score_bK])
            best.item_BK[user_b], best.score_BK[user_b] = found
        if self.group is not None:
            parts = [[torch.empty_like(part) for _ in range(distributed.get_world_size(self.group))] for part in best]
            for gathered, part in zip(parts, best, strict=True):
                distributed.all_gather(gathered, part, self.group)
            best = _best(k, *parts)
        return TopItems(best.item_BK.masked_fill(best.score_BK == -torch.inf, -1), best.score_BK)

    def _scores(self, users_BD: Tensor, domain_B: Tensor, seen_BS: Tensor | None) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Users, first row here and scores (b, i) of each block of candidates; ``-inf`` for seen ones.

        The scores are overwritten by the next block's. Domain -1 is all items.
        """
        if seen_BS is not None:
            self._check_rows(seen_BS, "seen", -1)
        buffer = users_BD.new_empty(self.batch_size * self.chunk_size)
        for domain in domain_B.unique().tolist():
            low, high = (0, self.offsets[-1]) if domain < 0 else self.offsets[domain : domain + 2]
            low, high = max(low - self.first_row, 0), min(high - self.first_row, len(self.vectors_ID))
            for user_b in (domain_B == domain).nonzero()[:, 0].split(self.batch_size):
                vectors_bD = users_BD[user_b]
                for start in range(low, high, self.chunk_size):
                    chunk_iD = self.vectors_ID[start : min(start + self.chunk_size, high)]
                    scores_bi = buffer[: len(user_b) * len(chunk_iD)].view(len(user_b), len(chunk_iD))
                    with _full_precision(users_BD.device.type):
                        torch.mm(vectors_bD, chunk_iD.T, out=scores_bi)
                    if seen_BS is not None:
                        seen_bS = seen_BS[user_b] - (start + self.first_row)
                        user, place = ((seen_bS >= 0) & (seen_bS < len(chunk_iD))).nonzero(as_tuple=True)
                        scores_bi[user, seen_bS[user, place]] = -torch.inf
                    yield user_b, start, scores_bi

    def _target_scores(self, users_BD: Tensor, target_B: Tensor) -> Tensor:
        """Scores (B,) of the targets, float64; of a divided table, from the process that has the row."""
        self._check_rows(target_B, "target", 0)
        row_B = target_B - self.first_row
        here = ((row_B >= 0) & (row_B < len(self.vectors_ID))).nonzero()[:, 0]
        score_B = torch.zeros(len(target_B), dtype=torch.float64, device=users_BD.device)
        for user_b in here.split(self.batch_size):
            score_B[user_b] = (users_BD[user_b].double() * self.vectors_ID[row_B[user_b]].double()).sum(1)
        if self.group is not None:
            distributed.all_reduce(score_B, group=self.group)
        return score_B

    def _check_rows(self, rows: Tensor, name: str, least: int) -> None:
        if rows.numel() and not least <= int(rows.min()) <= int(rows.max()) < self.offsets[-1]:
            raise ValueError(f"A {name} item is not a row of the table: rows are from {least} to {self.offsets[-1] - 1}.")


def _norms(vectors_ND: Tensor, name: str) -> Tensor:
    """Lengths (N,) of vectors; refuses those that would give scores without a rank."""
    if vectors_ND.dtype != torch.float32:
        raise ValueError(f"Vectors of {name}s must be float32, got {vectors_ND.dtype}: lower precision changes ranks.")
    norm_N = torch.linalg.vector_norm(vectors_ND, dim=1)
    if not norm_N.isfinite().all():
        raise ValueError(f"A vector of {name} {int((~norm_N.isfinite()).nonzero()[0, 0])} has NaN or infinite values: no rank.")
    return norm_N


def _best(k: int, item_BK: Sequence[Tensor], score_BK: Sequence[Tensor]) -> TopItems:
    """The k best of several lists; of equal scores the lower row first."""
    items, order = torch.cat(list(item_BK), 1).sort(dim=1)
    scores, place = torch.cat(list(score_BK), 1).gather(1, order).sort(dim=1, descending=True, stable=True)
    return TopItems(items.gather(1, place)[:, :k], scores[:, :k])


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Products in full float32, not in TF32 or bfloat16."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
