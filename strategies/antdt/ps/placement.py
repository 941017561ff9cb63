"""Which parameters of a module are dealt out to the servers by row, and which in pieces."""

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from strategies.antdt.ps.partition import Entry, Layout

__all__ = ["Table", "place"]

Table = nn.Embedding | nn.EmbeddingBag
"""A module of whose weight a batch looks up some rows."""


def place(module: nn.Module, optimizer: Optimizer, num_servers: int, patterns: Sequence[str]) -> tuple[Layout, dict[int, Table]]:
    """Divide what an optimizer trains over servers.

    Args:
        module: what is trained.
        optimizer: of its parameters.
        num_servers: S.
        patterns: names of tables, or patterns (``*.table``); those made with ``sparse=True`` are tables anyway.

    Returns:
        Where everything is; and the module of each table, by the table's number there.

    Raises:
        ValueError: a pattern that names nothing, or a table of which more than rows is needed.

    Example:
        >>> from torch.optim import SGD
        >>> module = nn.ModuleDict({"ids": nn.Embedding(5, 2), "head": nn.Linear(2, 1)})
        >>> layout, tables = place(module, SGD(module.parameters()), num_servers=2, patterns=["id*"])
        >>> layout.tables, layout.dense, tables
        ([0], [1, 2], {0: Embedding(5, 2)})
    """
    embeddings = {name: each for name, each in module.named_modules() if isinstance(each, Table)}
    wanted = {name for name, each in embeddings.items() if each.sparse}
    for pattern in patterns:
        found = fnmatch.filter(embeddings, pattern)
        if not found:
            raise ValueError(
                f"ParameterServerStrategy: tables names {pattern!r}, but the embeddings of {type(module).__name__} are"
                f" {', '.join(embeddings) or 'none'}."
            )
        wanted |= set(found)
    by_weight = {embeddings[name].weight: embeddings[name] for name in wanted}
    for name in wanted:
        each = embeddings[name]
        if each.max_norm is not None or each.scale_grad_by_freq:
            raise ValueError(f"ParameterServerStrategy: {name} has max_norm or scale_grad_by_freq, which need the whole table.")
        if sum(other.weight is each.weight for other in embeddings.values()) > 1:
            raise ValueError(f"ParameterServerStrategy: the table {name} is shared by several modules; leave it out of tables.")
    names = {parameter: name for name, parameter in module.named_parameters()}
    entries: list[Entry] = []
    tables: dict[int, Table] = {}
    for group, content in enumerate(optimizer.param_groups):
        for parameter in content["params"]:
            number, table = len(entries), by_weight.get(parameter)
            if table is not None:
                tables[number] = table
            name, dtype = names.get(parameter, f"parameter {number}"), str(parameter.dtype).removeprefix("torch.")
            entries.append(Entry(name, tuple(parameter.shape), dtype, group, table is not None))
    return Layout(entries, num_servers), tables
