"""The 14 codes of PaRO: each of a model's three states is whole, divided inside a group, or divided among all ranks."""

from dataclasses import dataclass
from typing import Literal, cast

__all__ = ["CODES", "Granularity", "Partition"]

Granularity = Literal["N", "I", "G"]
"""``N``: whole on every rank; ``I``: divided inside a group, one copy per group; ``G``: divided among all ranks."""

CODES: tuple[str, ...] = (
    *("NNN", "NNI", "NII", "INI", "III"),
    *("NNG", "NIG", "NGG", "ING", "IIG", "IGG", "GNG", "GIG", "GGG"),
)
"""The 14 admissible codes, coarsest optimizer first [paper 3.1.1, appendix A.1.1]."""

_FINENESS = "NIG"


@dataclass(frozen=True)
class Partition:
    """Storage of each state of a model.

    Attributes:
        parameters: granularity of the parameters as they rest between uses.
        gradients: granularity of the gradients that accumulate over micro-batches.
        optimizer: granularity of the master weights and of the optimizer's state.

    Raises:
        ValueError: a letter is none of N, I, G, or the optimizer is coarser than the parameters or than the gradients, which
            costs memory and saves no communication [paper 3.1.1]. The message names the rule and lists the 14 codes.

    Example:
        >>> str(Partition("I", "I", "G")), Partition.of("IIG").optimizer
        ('IIG', 'G')
    """

    parameters: Granularity
    gradients: Granularity
    optimizer: Granularity

    def __post_init__(self) -> None:
        _check(str(self))

    @classmethod
    def of(cls, code: str) -> "Partition":
        """The partition of a code, letters in the order parameters, gradients, optimizer.

        Raises:
            ValueError: the code has not three letters of N, I, G, or breaks the rule of `Partition`.

        Example:
            >>> Partition.of("GNN")
            Traceback (most recent call last):
            ...
            ValueError: partition 'GNN': the optimizer state (N) is coarser than the parameters (G); with the order N, I, G it \
must be divided at least as finely. Admissible: NNN NNI NII INI III NNG NIG NGG ING IIG IGG GNG GIG GGG.
        """
        _check(code)
        return cls(*(cast(Granularity, letter) for letter in code))

    def __str__(self) -> str:
        return f"{self.parameters}{self.gradients}{self.optimizer}"


def _check(code: str) -> None:
    admissible = f"Admissible: {' '.join(CODES)}."
    if not isinstance(code, str) or len(code) != 3 or not set(code) <= set(_FINENESS):
        raise ValueError(
            f"partition {code!r}: a code is three letters of N (whole), I (divided inside a group), G (divided among all ranks),"
            f" for parameters, gradients and optimizer state. {admissible}"
        )
    optimizer = code[2]
    for letter, state in ((code[0], "parameters"), (code[1], "gradients")):
        if _FINENESS.index(optimizer) < _FINENESS.index(letter):
            raise ValueError(
                f"partition {code!r}: the optimizer state ({optimizer}) is coarser than the {state} ({letter}); with the order"
                f" N, I, G it must be divided at least as finely. {admissible}"
            )
