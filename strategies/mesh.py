"""Meshes of processes with named axes, and the process groups that come from them.

A strategy names its axes once, ``named_mesh("cuda", replicate=4, shard=8)``, and asks for the group of an axis; no rank is ever
numbered by hand. The last axis runs fastest: with as many processes to a node as its size, its groups lie inside nodes.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["axis_group", "axis_ranks", "members", "named_mesh"]


def named_mesh(device_type: str, ranks: Sequence[int] | None = None, /, **axes: int) -> DeviceMesh:
    """Arrange processes in a mesh; a collective call of all processes of the job.

    Args:
        device_type: ``cpu``, ``cuda``, ...; where tensors of the groups lie.
        ranks: global ranks of the mesh, increasing; None: all. In the others ``mesh.get_coordinate()`` is None.
        axes: name and size of each axis, slowest first; one size may be -1, for what the others leave.

    Returns:
        The mesh; ``mesh["shard"]`` is the part along that axis that this process belongs to.

    Raises:
        RuntimeError: there is no process group yet.
        ValueError: no axis, sizes that are not positive, or that do not multiply to the number of processes; ``ranks`` that are
            not ranks of the job in increasing order.

    Example:
        >>> named_mesh("cpu")
        Traceback (most recent call last):
        ...
        ValueError: named_mesh: give at least one axis, such as replicate=-1.
    """
    if not axes:
        raise ValueError("named_mesh: give at least one axis, such as replicate=-1.")
    if not dist.is_initialized():
        raise RuntimeError("named_mesh: the process group is not initialised yet; call init_process_group first.")
    ranks = members(ranks, "named_mesh")
    given = [size for size in axes.values() if size != -1]
    written = ", ".join(f"{name}={size}" for name, size in axes.items())
    if len(given) < len(axes) - 1 or any(size < 1 for size in given):
        raise ValueError(f"named_mesh({written}): sizes must be positive; one of them may be -1.")
    rest, remainder = divmod(len(ranks), math.prod(given))
    if remainder or (len(given) == len(axes) and rest != 1):
        raise ValueError(f"named_mesh({written}): the sizes do not multiply to the number of processes, {len(ranks)}.")
    shape = tuple(rest if size == -1 else size for size in axes.values())
    if len(ranks) == dist.get_world_size():
        return init_device_mesh(device_type, shape, mesh_dim_names=tuple(axes))
    return DeviceMesh(device_type, torch.tensor(ranks).view(shape), mesh_dim_names=tuple(axes))


def members(ranks: Sequence[int] | None, caller: str) -> list[int]:
    """Global ranks that take part in something: those given, or all.

    Args:
        ranks: some ranks, increasing; None: all.
        caller: named in the message.

    Raises:
        ValueError: no ranks, or some that are not the job's or not increasing.
    """
    everyone = range(dist.get_world_size())
    found = [*everyone] if ranks is None else [*ranks]
    if not found or found != sorted(set(found)) or not set(found) <= set(everyone):
        raise ValueError(f"{caller}: ranks={found} must be some of the job's ranks, 0 to {everyone[-1]}, in increasing order.")
    return found


def axis_group(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The processes along one axis, this one among them.

    Raises:
        ValueError: the mesh has no such axis, or not this process.
    """
    _check_axis(mesh, axis)
    return mesh.get_group(axis)


def axis_ranks(mesh: DeviceMesh, axis: str) -> list[int]:
    """Global ranks of `axis_group`, in the order of the axis.

    Raises:
        ValueError: the mesh has no such axis, or not this process.
    """
    _check_axis(mesh, axis)
    return dist.get_process_group_ranks(mesh.get_group(axis))


def _check_axis(mesh: DeviceMesh, axis: str) -> None:
    if axis not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"the mesh has no axis {axis!r}; it has {', '.join(mesh.mesh_dim_names or ()) or 'no names'}.")
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh, which is of ranks {mesh.mesh.flatten().tolist()}.")
