"""The parameters of a module, as a worker has them of the servers."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from strategies.antdt.ps.placement import Table, place
from strategies.antdt.ps.remote_optimizer import OptimizerSpec, hyperparameters
from strategies.antdt.ps.slices import Gradient, RowUpdate
from strategies.antdt.ps.worker import ParameterClient, flatten, unflatten

__all__ = ["RemoteParameters"]


class RemoteParameters:
    """Weights that are fetched before each step, tables row by row as they are looked up, and gradients to be sent.

    Args:
        client: of the worker.
        module: what is trained.
        optimizer: of its parameters; keeps no state while the servers do.
        num_servers: S.
        patterns: of the tables' names, see `place`.
        mode: kind of `Consistency`.
        looks_up: whether rows that are looked up now are to be fetched: in a training step they are.

    Attributes:
        layout: where everything is.
        waited: seconds for which rows were waited for; may be put back to zero.

    Raises:
        ValueError: see `place`.
    """

    def __init__(
        self,
        client: ParameterClient,
        module: nn.Module,
        optimizer: Optimizer,
        num_servers: int,
        patterns: Sequence[str],
        mode: str,
        looks_up: Callable[[], bool],
    ) -> None:
        self._client, self._optimizer, self._mode, self._looks_up = client, optimizer, mode, looks_up
        self.layout, tables = place(module, optimizer, num_servers, patterns)
        self.waited = 0.0
        self._dense_tables: list[Table] = []
        self._handles: list[RemovableHandle] = []
        for number, table in tables.items():
            if not table.sparse:
                table.sparse = True  # for the time of training: gradients name their rows
                self._dense_tables.append(table)
            self._handles.append(table.register_forward_pre_hook(self._fetch_before(number)))

    @property
    def trained(self) -> list[Tensor]:
        """All of them, in the layout's order."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def release(self) -> None:
        """Let the module be as it was."""
        for handle in self._handles:
            handle.remove()
        for table in self._dense_tables:
            table.sparse = False

    # ---- from and to the servers --------------------------------------------------------------------------------------

    def fill(self, settings: Mapping[str, Any], row_update: RowUpdate, version: int) -> None:
        """Give the servers this process's values and optimizer state.

        Args:
            settings: what they are to do, see `Settings`.
            row_update: see `Slices`.
            version: steps done before.
        """
        states = [dict(self._optimizer.state.get(parameter, {})) for parameter in self.trained]
        self._client.configure(
            self.layout, OptimizerSpec.of(self._optimizer), settings, self.trained,
            [{key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()} for state in states],
            row_update=row_update, version=version,
        )  # fmt: skip
        self._optimizer.state.clear()

    def pull(self, clip_norm: float, gate: bool) -> None:
        """Take over what the servers have of dense parameters, see `ParameterClient.pull`."""
        flat = self._client.pull(self.layout, self._mode, clip_norm=clip_norm, gate=gate)
        self._write(unflatten(self.layout, flat))

    def pull_everything(self, clip_norm: float) -> None:
        """Take over tables, too, when no worker is training."""
        self.pull(clip_norm, gate=False)
        tables, _ = self._client.export(self.layout, states=False)
        self._write(tables)

    def states(self) -> dict[int, dict[str, Any]]:
        """What the servers' optimizer keeps, as torch's would have it in one process."""
        _, states = self._client.export(self.layout, states=True)
        return {number: state for number, state in enumerate(states) if state}

    @torch.no_grad()
    def _write(self, values: Mapping[int, Tensor]) -> None:
        trained = self.trained
        for number, value in values.items():
            trained[number].copy_(value)

    def _fetch_before(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook of a table's module: fetches the rows that it is about to look up."""

        def fetch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not self._looks_up():
                return
            begun = time.perf_counter()
            rows = arguments[0].detach().flatten().unique().cpu()
            values = self._client.rows(self.layout, {number: rows})[number]
            self.waited += time.perf_counter() - begun
            with torch.no_grad():
                weight = self.trained[number]
                weight[rows.to(weight.device)] = values.to(weight.device)

        return fetch

    # ---- gradients ----------------------------------------------------------------------------------------------------

    def gradient(self, samples: float) -> Gradient:
        """What the backward pass has left in the parameters.

        Args:
            samples: over how many it is the mean.

        Raises:
            RuntimeError: a table has a gradient of all its rows.
        """
        trained, rows = self.trained, {}
        for number in self.layout.tables:
            grad = trained[number].grad
            if grad is None:
                continue
            if not grad.is_sparse:
                raise RuntimeError(
                    f"ParameterServerStrategy: the table {self.layout.entries[number].name} is used otherwise than by looking"
                    " rows up, so all of it has a gradient: leave it out of tables."
                )
            grad = grad.coalesce()
            rows[number] = grad.indices()[0].cpu(), grad.values().cpu()
        absent = frozenset(number for number in self.layout.dense if trained[number].grad is None)
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
        return Gradient(flatten(self.layout, grads), absent, rows, samples)

    def forget_gradients(self) -> None:
        """They are sent."""
        for parameter in self.trained:
            parameter.grad = None

    def hyperparameters(self, lr_factor: float) -> list[dict[str, Any]]:
        """Numbers of the optimizer's groups now, learning rates times a factor."""
        return [{**group, "lr": group["lr"] * lr_factor} for group in hyperparameters(self._optimizer)]
