"""What an optimiser needs to know of sharded parameters: the local shard, sums over all shards, noise per shard.

Nothing here imports ``torch.distributed``: a tensor can only be a DTensor once somebody else has imported it.
"""

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``torch.distributed.tensor.DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of ``tensor`` that this process holds: all of it, unless it is a DTensor. Shares memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_like(tensor: Any, param: Any) -> Tensor:
    """The part of ``tensor`` that belongs to the shard of ``param`` on this process."""
    if is_dtensor(tensor) and is_dtensor(param) and tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    return local(tensor)


def shard_index(param: Any) -> int:
    """Which shard of ``param`` this process holds: 0 for a plain or replicated tensor."""
    index = 0
    if is_dtensor(param):
        for dim, placement in enumerate(param.placements):
            if placement.is_shard():
                index = index * param.device_mesh.size(dim) + param.device_mesh.get_local_rank(dim)
    return index


def sum_over_shards_(table: Tensor, params: list[Any], loss: Tensor) -> None:
    """Turn sums over local shards into sums over the whole parameters, in place.

    Every process of a mesh must call this with the same parameters in the same order. One all-reduce for each dimension
    of each mesh; none at all for plain tensors, whose rows stay as they are.

    Args:
        table: (num_params, num_columns) float64, one row for each of ``params``. A shard that several processes hold
            (a ``Replicate`` placement) is counted once.
        loss: () float64, replaced by its mean over the processes of the first mesh. FSDP averages the gradients, so
            this is the loss they belong to; a loss that was already averaged is not changed.

    Raises:
        ValueError: a parameter is placed as ``Partial``.
    """
    meshes: dict[Any, list[int]] = {}
    for row, param in enumerate(params):
        if is_dtensor(param):
            if any(placement.is_partial() for placement in param.placements):
                raise ValueError(f"a parameter is Shard or Replicate on every mesh dimension, not {param.placements}")
            meshes.setdefault(param.device_mesh, []).append(row)
    if not meshes:
        return
    import torch.distributed as dist

    for position, (mesh, rows) in enumerate(meshes.items()):
        part = table[rows]
        for i, row in enumerate(rows):
            replicated = [dim for dim, p in enumerate(params[row].placements) if not p.is_shard()]
            if any(mesh.get_local_rank(dim) for dim in replicated):
                part[i] = 0
        message = torch.cat([part.flatten(), loss.view(1) / mesh.size()])
        for dim in range(mesh.ndim):
            dist.all_reduce(message, group=mesh.get_group(dim))
        table[rows] = message[:-1].view_as(part)
        if position == 0:
            loss.copy_(message[-1])


def max_over_shards(value: float, params: list[Any], device: torch.device) -> float:
    """The largest ``value`` over the processes of every mesh that ``params`` live on."""
    meshes = {param.device_mesh: None for param in params if is_dtensor(param)}
    if not meshes:
        return value
    import torch.distributed as dist

    message = torch.tensor(value, dtype=torch.float64, device=device)
    for mesh in meshes:
        for dim in range(mesh.ndim):
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return message.item()


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on ``device`` whose draws are a function of ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
