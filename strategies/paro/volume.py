"""Costs of a code: bytes sent in a step, and bytes of state that rest on a rank, as closed formulas [paper 3.1, appendix A.3].

n ranks in groups of m, ng = n / m; ``A = (m - 1) / m`` of a buffer crosses links inside groups in one gather or reduction, and
``E = (ng - 1) / n`` those between groups.
"""

from dataclasses import dataclass

from strategies.paro.partition import Granularity, Partition

__all__ = ["Memory", "Volume", "memory", "padded", "volume", "volume_terms"]


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends.

    Attributes:
        intra: to ranks of its group.
        inter: to other groups; m times as much leaves a group.
    """

    intra: int = 0
    inter: int = 0

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(self.intra + other.intra, self.inter + other.inter)

    @property
    def total(self) -> int:
        """Of both classes."""
        return self.intra + self.inter


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank that rest between micro-batches.

    Attributes:
        parameters: as they are computed with.
        gradients: as they accumulate.
        optimizer: master weights and the optimizer's state.
    """

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Of all three; gathered units and the gradients of one come on top while a block runs."""
        return self.parameters + self.gradients + self.optimizer


def padded(numel: int, n: int) -> int:
    """The next multiple of n, as which a unit is stored.

    Example:
        >>> padded(33, 4)
        36
    """
    return -(-numel // n) * n


def volume(partition: Partition, **sizes: int) -> Volume:
    """Bytes that a rank sends in one optimizer step.

    Args:
        partition: the code.
        sizes: as for `volume_terms`, whose sum this is.

    Raises:
        ValueError: as `volume_terms`.

    Example:
        >>> volume(Partition.of("IIG"), n=4, m=2, s=2, psi=1000)
        Volume(intra=12000, inter=2000)
    """
    return sum(volume_terms(partition, **sizes).values(), Volume())


def volume_terms(
    partition: Partition,
    *,
    n: int,
    m: int,
    s: int,
    psi: int,
    psi_trainable: int | None = None,
    psi_root: int = 0,
    bytes_p: int = 4,
    bytes_g: int = 4,
) -> dict[str, Volume]:
    """Bytes that a rank sends in one optimizer step, by cause.

    Args:
        partition: the code.
        n: number of ranks.
        m: ranks of a group.
        s: micro-batches of the step.
        psi: elements of all units, each padded to a multiple of n (`padded`).
        psi_trainable: those of the trainable units; None: all.
        psi_root: those of the root unit, which is gathered once a micro-batch where others are gathered twice.
        bytes_p: of an element of gathered parameters on the wire.
        bytes_g: of an element of a gradient on the wire.

    Returns:
        ``parameters`` (gathers of all micro-batches), ``gradients`` (reductions of all micro-batches), ``sync_gradients`` and
        ``sync_parameters`` (once a step, before and after the optimizer).

    Raises:
        ValueError: m does not divide n, counts are negative, or elements are no multiple of n.
    """
    psi_trainable = psi if psi_trainable is None else psi_trainable
    _check(n, m, s=s, psi=psi, psi_trainable=psi_trainable, psi_root=psi_root, bytes_p=bytes_p, bytes_g=bytes_g)
    for name, elements in (("psi", psi), ("psi_trainable", psi_trainable), ("psi_root", psi_root)):
        if elements % n:
            raise ValueError(f"volume: {name}={elements} is no multiple of n={n}; pad each unit with padded(numel, n).")
    if max(psi_trainable, psi_root) > psi:
        raise ValueError(f"volume: psi_trainable={psi_trainable} and psi_root={psi_root} are parts of psi={psi}.")
    p, g, os = partition.parameters, partition.gradients, partition.optimizer

    def sent(elements: int, width: int, intra: int, inter: int) -> Volume:
        """A buffer that crosses links inside groups so many times, and links between them so many times."""
        block = elements // n * width
        return Volume(intra * block * (n // m) * (m - 1), inter * block * (n // m - 1))

    gathered, trained = s * (2 * psi - psi_root), psi_trainable
    return {
        "parameters": sent(gathered, bytes_p, p != "N", p == "G"),
        "gradients": sent(s * trained, bytes_g, g != "N", g == "G"),
        "sync_gradients": sent(
            trained,
            bytes_g,
            intra=(2 if os == "N" else 1) if g == "N" else 0,
            inter=(1 if os == "G" else 2) if g != "G" else 0,
        ),
        "sync_parameters": sent(trained, bytes_p, intra=p == "N" and os != "N", inter=p != "G" and os == "G"),
    }


def memory(
    partition: Partition,
    *,
    n: int,
    m: int,
    psi: float,
    psi_trainable: float | None = None,
    bytes_p: float = 2,
    bytes_g: float = 2,
    bytes_optimizer: float = 12,
) -> Memory:
    """Bytes of state that rest on a rank, ``2 psi / d(p) + 2 psi' / d(g) + 12 psi' / d(os)`` with d(N, I, G) = 1, m, n.

    The defaults are the paper's, mixed precision Adam [paper 3.1.1]: 2 bytes for a parameter and a gradient; 4 each for master,
    first and second moment. In float32 they are 4, 4 and 8, or 12 if the master does not alias the parameters.

    Args:
        partition: the code.
        n: number of ranks.
        m: ranks of a group.
        psi: elements of all units, padded or not.
        psi_trainable: those of the trainable units; None: all.
        bytes_p: of a parameter.
        bytes_g: of an accumulated gradient.
        bytes_optimizer: of the master and the optimizer's state, an element.

    Raises:
        ValueError: m does not divide n, or counts are negative.

    Example:
        >>> memory(Partition.of("IIG"), n=32, m=8, psi=7_000_000_000).total / 1e9
        6.125
    """
    psi_trainable = psi if psi_trainable is None else psi_trainable
    _check(n, m, psi=psi, psi_trainable=psi_trainable, bytes_p=bytes_p, bytes_g=bytes_g, bytes_optimizer=bytes_optimizer)
    shares: dict[Granularity, int] = {"N": 1, "I": m, "G": n}
    return Memory(
        bytes_p * psi / shares[partition.parameters],
        bytes_g * psi_trainable / shares[partition.gradients],
        bytes_optimizer * psi_trainable / shares[partition.optimizer],
    )


def _check(n: int, m: int, **counts: float) -> None:
    if n < 1 or m < 1 or n % m:
        raise ValueError(f"n={n} ranks cannot be divided into groups of m={m}; m must divide n.")
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name}={count} must not be negative.")
