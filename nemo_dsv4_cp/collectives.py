"""The CP group and the collectives over it; no other file calls ``torch.distributed``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


def cp_enabled(cp_group: Group | None) -> bool:
    """Return whether ``cp_group`` is a live process group of two ranks or more."""
    return (
        cp_group is not None
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(group=cp_group) > 1
    )


def cp_rank(cp_group: Group | None) -> int:
    """Return this rank's index in the group, 0 without CP."""
    return dist.get_rank(group=cp_group) if cp_enabled(cp_group) else 0


def cp_size(cp_group: Group | None) -> int:
    """Return the number of ranks in the group, 1 without CP."""
    return dist.get_world_size(group=cp_group) if cp_enabled(cp_group) else 1


def mesh_rank(cp_mesh: Any) -> int:
    """Return this rank's index along a one-dimensional CP mesh.

    Before ``torch.distributed`` is initialised the mesh is asked itself, which lets the batch
    arithmetic run without a process group.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group=cp_mesh.get_group())
    return int(getattr(cp_mesh, "get_local_rank", int)())


def _gather_concat(tensor: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    shares = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather_single(shares.flatten(0, 1), tensor.contiguous(), group=group)
    return torch.cat(shares.unbind(), dim=dim)


class _AllGather(torch.autograd.Function):
    # forward:   y   = concat_k x_k                   (all-gather)
    # backward:  dx_r = sum_k (dy_k)[slice of rank r]  (reduce-scatter)

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather_concat(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        shares = torch.stack(grad.chunk(dist.get_world_size(ctx.group), dim=ctx.dim))
        own = torch.empty_like(shares[0])
        dist.reduce_scatter_single(own, shares.flatten(0, 1), group=ctx.group)
        return own, None, None


def all_gather(tensor: torch.Tensor, *, dim: int, cp_group: Group | None) -> torch.Tensor:
    """All-gather equal shards in rank order and concatenate them on ``dim``, with autograd.

    Args:
        tensor: This rank's shard [..., n, ...]; the same shape and dtype on every rank.
        dim: Dimension to concatenate on.
        cp_group: CP group; without CP the tensor is returned as it is.

    Returns:
        [..., R * n, ...]. Its gradient is reduce-scattered to the ranks that own the slices.
    """
    if not cp_enabled(cp_group):
        return tensor
    gathered: torch.Tensor = _AllGather.apply(tensor, dim % tensor.dim(), cp_group)  # type: ignore[no-untyped-call]
    return gathered


def all_gather_metadata(tensor: torch.Tensor, *, dim: int, cp_group: Group | None) -> torch.Tensor:
    """All-gather as :func:`all_gather` does, for tensors that carry no gradient (masks, ids)."""
    if cp_group is None or not cp_enabled(cp_group):
        return tensor
    return _gather_concat(tensor, dim, cp_group)


def all_reduce_sum(tensor: torch.Tensor, *, cp_group: Group | None) -> torch.Tensor:
    """Return the sum over the CP ranks of a tensor that carries no gradient."""
    if not cp_enabled(cp_group):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=cp_group)
    return total
