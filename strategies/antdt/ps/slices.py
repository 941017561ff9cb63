"""What one parameter server holds, its part of parameters and optimizer, and how gradients change it."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strategies.antdt.ps.partition import Layout, Piece
from strategies.antdt.ps.remote_optimizer import OptimizerSpec, set_hyperparameters

__all__ = ["Gradient", "RowUpdate", "Slices", "merge"]

RowUpdate = Literal["exact", "lazy"]


@dataclass
class Gradient:
    """A gradient, or a server's part of one.

    Attributes:
        dense: for each dtype, the range of flattened dense parameters.
        absent: dense parameters that have none.
        rows: for each table that was used, local numbers of the rows touched (sorted, unique) and their gradients.
        samples: over how many samples it is the mean.
    """

    dense: dict[str, Tensor]
    absent: frozenset[int] = frozenset()
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    samples: float = 1.0

    def square_norm(self) -> float:
        """Sum of squares."""
        parts = [*self.dense.values(), *(values for _, values in self.rows.values())]
        return sum(float(part.double().square().sum()) for part in parts)

    def scale_(self, factor: float) -> None:
        """Multiply by a number, in place."""
        for part in [*self.dense.values(), *(values for _, values in self.rows.values())]:
            part.mul_(factor)

    def clamp_(self, limit: float) -> None:
        """Cut each element off at ``±limit``, in place."""
        for part in [*self.dense.values(), *(values for _, values in self.rows.values())]:
            part.clamp_(-limit, limit)


def merge(gradients: Sequence[Gradient]) -> Gradient:
    """The gradient of the mean over the samples of all: ``sum n_i g_i / sum n_i`` (section 2.7)."""
    total = sum(gradient.samples for gradient in gradients)
    merged = Gradient({}, frozenset.intersection(*(gradient.absent for gradient in gradients)), samples=total)
    shares = [gradient.samples / total if total else 0.0 for gradient in gradients]  # of tokens there may be none
    for dtype in gradients[0].dense:
        result = torch.zeros_like(gradients[0].dense[dtype])
        for gradient, share in zip(gradients, shares, strict=True):
            result.add_(gradient.dense[dtype], alpha=share)
        merged.dense[dtype] = result
    for table in sorted({table for gradient in gradients for table in gradient.rows}):
        pairs = zip(gradients, shares, strict=True)
        found = [(*gradient.rows[table], share) for gradient, share in pairs if table in gradient.rows]
        rows, place = torch.cat([rows for rows, _, _ in found]).unique(return_inverse=True)
        values = torch.cat([values * share for _, values, share in found])
        merged.rows[table] = rows, values.new_zeros(len(rows), values.shape[1]).index_add_(0, place, values)
    return merged


class Slices:
    """A server's part of all parameters, with its part of the optimizer.

    Args:
        layout: where everything is.
        server: number of this one.
        optimizer: what updates it.
        row_update: ``exact``: rows that no sample touched change as they do in one process, where weight decay and momentum
            move them; ``lazy``: they do not, which costs less on large tables, and differs but for plain SGD and Adagrad.

    Raises:
        ValueError: an unknown ``row_update``.
    """

    def __init__(self, layout: Layout, server: int, optimizer: OptimizerSpec, row_update: RowUpdate = "exact") -> None:
        if row_update not in ("exact", "lazy"):
            raise ValueError(f"row_update is {row_update!r}; it must be exact or lazy.")
        self.layout, self.server, self.spec, self.row_update = layout, server, optimizer, row_update
        self.flat = {
            dtype: torch.zeros(hi - lo, dtype=getattr(torch, dtype))
            for dtype in layout.dtypes
            for lo, hi in [layout.span(dtype, server)]
        }
        self.pieces: list[Piece] = layout.pieces(server)
        self._parameters = [nn.Parameter(self._view(piece)) for piece in self.pieces]
        self.tables = {
            number: nn.Parameter(
                torch.zeros(layout.rows(number, server), entry.shape[1], dtype=getattr(torch, entry.dtype)))
            for number in layout.tables for entry in [layout.entries[number]]
        }  # fmt: skip
        groups: list[list[nn.Parameter]] = [[] for _ in optimizer.groups]
        for piece, parameter in zip(self.pieces, self._parameters, strict=True):
            groups[layout.entries[piece.entry].group].append(parameter)
        for number, table in self.tables.items():
            groups[layout.entries[number].group].append(table)
        self.optimizer = optimizer.build(groups)

    def _view(self, piece: Piece) -> Tensor:
        return self.flat[self.layout.entries[piece.entry].dtype][piece.start : piece.start + piece.length]

    # ---- reading and writing ------------------------------------------------------------------------------------------

    def dense(self) -> list[Tensor]:
        """The ranges of flattened dense parameters, one a dtype; not copied."""
        return [self.flat[dtype] for dtype in self.layout.dtypes]

    @torch.no_grad()
    def write(self, dense: Sequence[Tensor], tables: Mapping[int, Tensor]) -> None:
        """Take over values of everything."""
        for dtype, values in zip(self.layout.dtypes, dense, strict=True):
            self.flat[dtype].copy_(values)
        for number, values in tables.items():
            self.tables[number].copy_(values)

    @torch.no_grad()
    def read_rows(self, table: int, rows: Tensor) -> Tensor:
        """Values of some rows, by local number: ``(len(rows), dim)``."""
        return self.tables[table].detach().index_select(0, rows)

    def states(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state: for ``piece number`` and ``table:number``, what it keeps, tensors or numbers."""
        return {name: dict(self.optimizer.state.get(parameter, {})) for name, parameter in self._named()}

    def load_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `states` has told; what is not named stays as it is."""
        for name, parameter in self._named():
            if states.get(name):
                self.optimizer.state[parameter] = {
                    key: value.clone() if isinstance(value, Tensor) else value for key, value in states[name].items()
                }

    def _named(self) -> Iterable[tuple[str, nn.Parameter]]:
        for number, parameter in enumerate(self._parameters):
            yield str(number), parameter
        for number, table in self.tables.items():
            yield f"table:{number}", table

    # ---- learning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, gradient: Gradient, hyperparameters: Sequence[Mapping[str, Any]]) -> None:
        """One optimizer step.

        Args:
            gradient: of this server's part.
            hyperparameters: for each group, its numbers now.

        Raises:
            ValueError: it does not fit this server's part.
        """
        self.check(gradient)
        set_hyperparameters(self.optimizer, hyperparameters)
        for piece, parameter in zip(self.pieces, self._parameters, strict=True):
            values = gradient.dense[self.layout.entries[piece.entry].dtype]
            parameter.grad = None if piece.entry in gradient.absent else values[piece.start : piece.start + piece.length]
        if self.row_update == "exact":
            for number, (rows, values) in gradient.rows.items():
                self.tables[number].grad = torch.zeros_like(self.tables[number]).index_copy_(0, rows, values)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.row_update == "lazy":
            for number, (rows, values) in gradient.rows.items():
                self._update_rows(number, rows, values)

    def check(self, gradient: Gradient) -> None:
        """Whether a gradient fits.

        Raises:
            ValueError: it does not.
        """
        sizes = {dtype: len(values) for dtype, values in gradient.dense.items()}
        own = {dtype: len(values) for dtype, values in self.flat.items()}
        if sizes != own:
            raise ValueError(f"a gradient of {sizes} elements came to a server that holds {own}.")
        for number, (rows, values) in gradient.rows.items():
            table = self.tables.get(number)
            if table is None or values.shape != (len(rows), table.shape[1]):
                raise ValueError(f"there is no table {number} with gradients of shape {tuple(values.shape)}.")
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(table):
                raise ValueError(f"table {number} has {len(table)} rows here, and a gradient touches others.")

    def _update_rows(self, number: int, rows: Tensor, values: Tensor) -> None:
        """Run the optimizer on the rows alone: they, and what it keeps of them, are taken out and put back."""
        table = self.tables[number]
        state = self.optimizer.state[table]
        by_row = {key for key, kept in state.items() if isinstance(kept, Tensor) and kept.shape == table.shape}
        part = nn.Parameter(table.detach().index_select(0, rows))
        part.grad = values
        group = self.optimizer.param_groups[self.layout.entries[number].group]
        everything, states = self.optimizer.param_groups, self.optimizer.state
        self.optimizer.param_groups = [{**group, "params": [part]}]
        self.optimizer.state = type(states)(dict)
        if state:
            self.optimizer.state[part] = {k: v.index_select(0, rows) if k in by_row else v for k, v in state.items()}
        try:
            self.optimizer.step()
            kept = dict(self.optimizer.state[part])
        finally:
            self.optimizer.param_groups, self.optimizer.state = everything, states
        table.index_copy_(0, rows, part.detach())
        for key, new in kept.items():
            if not isinstance(new, Tensor) or new.shape != part.shape:
                state[key] = new
            elif key in by_row:
                state[key].index_copy_(0, rows, new)
            else:
                state[key] = torch.zeros_like(table).index_copy_(0, rows, new)

    # ---- on disk ------------------------------------------------------------------------------------------------------

    def copy_out(self, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A copy of everything, for `write_file`, which may then take its time.

        Args:
            about: JSON types that `load` gives back.
        """
        tensors = {f"dense/{dtype}": values for dtype, values in self.flat.items()}
        tensors |= {f"table/{number}": table.detach() for number, table in self.tables.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for name, state in self.states().items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"state/{name}/{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        groups = zip(self.optimizer.param_groups, self.spec.groups, strict=True)
        now = OptimizerSpec(self.spec.kind, tuple({key: group[key] for key in own} for group, own in groups))
        described = {
            "about": dict(about),
            "layout": self.layout.to_json(),
            "server": self.server,
            "optimizer": now.to_json(),
            "row_update": self.row_update,
            "numbers": numbers,
        }
        return {name: value.clone() for name, value in tensors.items()}, {"antdt": json.dumps(described)}

    @staticmethod
    def write_file(path: Path, tensors: dict[str, Tensor], described: dict[str, str]) -> None:
        """Write what `copy_out` has given to a file (safetensors), which is whole at any time."""
        beside = path.with_name(path.name + ".new")
        save_file(tensors, beside, described)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write everything to a file."""
        self.write_file(path, *self.copy_out(about))

    @classmethod
    def load(cls, path: Path) -> tuple["Slices", dict[str, Any]]:
        """Read what `save` has written, and what was said about it.

        Raises:
            OSError: there is no such file.
            ValueError: it is no file of a server.
        """
        try:
            with safe_open(path, "pt") as file:
                described = json.loads(file.metadata()["antdt"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as cause:  # safetensors has errors of its own
            raise ValueError(
                f"{path} is no slice of a parameter server, or damaged ({cause}); remove it to begin anew."
            ) from cause
        slices = cls(
            Layout.from_json(described["layout"]),
            int(described["server"]),
            OptimizerSpec.from_json(described["optimizer"]),
            described["row_update"],
        )
        slices.write(
            [tensors[f"dense/{dtype}"] for dtype in slices.layout.dtypes],
            {number: tensors[f"table/{number}"] for number in slices.tables},
        )
        states: dict[str, dict[str, Any]] = {name: dict(kept) for name, kept in described["numbers"].items()}
        for name, value in tensors.items():
            if name.startswith("state/"):
                _, owner, key = name.split("/", 2)
                states.setdefault(owner, {})[key] = value
        slices.load_states(states)
        return slices, described["about"]
