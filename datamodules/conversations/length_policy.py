"""Treatment of samples that are longer than a row."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["LengthPolicy", "TooLong"]

TooLong = Literal["raise", "skip", "truncate"]


class LengthPolicy:
    """Applies the policy to one sample after another, and tells how many it met.

    Args:
        too_long: ``raise``: too long samples are an error, when all are read; ``skip``: they are left out; ``truncate``: they
            lose their end, and are left out only if nothing that is to be learned remains.
        seq_len: Ids that a sample may have.
        argument: Name that users know ``seq_len`` by.
        lost: Side that is cut.
    """

    def __init__(
        self, too_long: TooLong, seq_len: int, argument: str = "seq_len", lost: Literal["beginning", "end"] = "end"
    ) -> None:
        self.too_long = too_long
        self.seq_len = seq_len
        self.argument = argument
        self.lost = lost
        self.total = self.cut = self.left_out = 0
        self.longest = 0

    def keeps(self, length: int, remains: bool) -> bool:
        """Whether a sample stays, cut if need be.

        Args:
            length: Ids of the sample.
            remains: Whether something that is to be learned remains of it where it is cut.
        """
        self.total += 1
        self.longest = max(self.longest, length)
        if length <= self.seq_len:
            return True
        kept = self.too_long == "truncate" and remains
        self.cut += kept
        self.left_out += not kept
        return kept

    def report(self, source: object, unit: str) -> None:
        """Say how many were too long, if any.

        Raises:
            ValueError: Some were, and ``too_long`` is ``raise``.
        """
        if not self.cut + self.left_out:
            return
        found = (
            f"{self.cut + self.left_out} of {self.total} {unit} of {source} have more than {self.argument}={self.seq_len} ids, "
            f"the longest {self.longest}"
        )
        if self.too_long == "raise":
            raise ValueError(f"{found}: raise {self.argument}, or choose too_long: skip or truncate.")
        rank_zero_warn(f"{found}: {self.cut} lose their {self.lost}, {self.left_out} are left out.")
