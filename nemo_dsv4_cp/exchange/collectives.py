"""Process groups and the collectives over them; no other file calls ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nemo_dsv4_cp.host.torch_api import (
    all_gather_single,
    default_store,
    reduce_scatter_single,
)

Group = dist.ProcessGroup
Store: TypeAlias = dist.Store  # type: ignore[name-defined,attr-defined]

CP_GROUP_KEY = "_dsv4_cp_group"
"""Batch key under which the CP process group travels to attention, as in the host."""


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
    all_gather_single(shares.flatten(0, 1), tensor.contiguous(), group=group)
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
        reduce_scatter_single(own, shares.flatten(0, 1), group=ctx.group)
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


class _ExchangeLeft(torch.autograd.Function):
    # forward:   rank r receives, per tensor, the tokens [rL - H, rL) from their owners
    # backward:  each owner adds up the gradients of the tokens that it sent
    # One all-to-all carries all tensors as bytes, whatever their dtypes. It runs on the group's
    # own stream of collectives, so it can neither overtake nor deadlock with the others.

    @staticmethod
    def forward(
        ctx: Any, plan: Sequence[Transfers], group: Group, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        # Index features ride along without gradient: nothing of them is sent back.
        ctx.moved = [i for i in range(len(tensors)) if ctx.needs_input_grad[2 + i]]
        ctx.plan, ctx.shapes = [plan[i] for i in ctx.moved], [tensors[i].shape for i in ctx.moved]
        sent = [
            [t[:, rows] for rows in transfer.send]
            for t, transfer in zip(tensors, plan, strict=True)
        ]
        room = [
            t.new_zeros(t.shape[0], transfer.length, *t.shape[2:])
            for t, transfer in zip(tensors, plan, strict=True)
        ]
        received = [
            [halo[:, rows] for rows in transfer.receive]
            for halo, transfer in zip(room, plan, strict=True)
        ]
        _exchange(sent, received, group)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(room) if i not in ctx.moved))
        return tuple(room)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *all_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [all_grads[i] for i in ctx.moved]
        back = [
            [grad[:, rows] for rows in transfer.receive]
            for grad, transfer in zip(grads, ctx.plan, strict=True)
        ]
        mine = [
            [grad.new_empty(shape[0], _length(rows), *shape[2:]) for rows in transfer.send]
            for grad, shape, transfer in zip(grads, ctx.shapes, ctx.plan, strict=True)
        ]
        _exchange(back, mine, ctx.group)
        out: list[torch.Tensor | None] = [None] * len(all_grads)
        for i, shape, parts, transfer in zip(ctx.moved, ctx.shapes, mine, ctx.plan, strict=True):
            total = all_grads[i].new_zeros(shape)
            for part, rows in zip(parts, transfer.send, strict=True):
                total[:, rows] += part
            out[i] = total
        return None, None, *out


@dataclass(frozen=True)
class Transfers:
    """Which rows of a per-token tensor go to each rank, and where received rows land.

    Attributes:
        send: Per destination rank, rows of the local tensor.
        receive: Per source rank, rows of the halo.
        length: Rows of the halo.
    """

    send: Sequence[slice]
    receive: Sequence[slice]
    length: int


def _length(rows: slice) -> int:
    length: int = rows.stop - rows.start
    return length


def _exchange(
    sent: Sequence[Sequence[torch.Tensor]],
    received: Sequence[Sequence[torch.Tensor]],
    group: Group,
) -> None:
    """Send tensors [i][rank] and fill [i][rank], all in one all-to-all of bytes."""
    outgoing = [
        [parts[rank].contiguous().flatten().view(torch.uint8) for parts in sent]
        for rank in range(dist.get_world_size(group))
    ]
    sizes = [
        [parts[rank].numel() * parts[rank].element_size() for parts in received]
        for rank in range(len(outgoing))
    ]
    buffer = torch.cat([part for parts in outgoing for part in parts])
    arrived = buffer.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        arrived,
        buffer,
        output_split_sizes=[sum(of_rank) for of_rank in sizes],
        input_split_sizes=[sum(part.numel() for part in parts) for parts in outgoing],
        group=group,
    )
    pieces = iter(arrived.split([size for of_rank in sizes for size in of_rank]))
    for rank in range(len(outgoing)):
        for parts in received:
            piece = next(pieces)
            if piece.numel():
                # clone: a view in a wider dtype needs memory that is aligned for it
                parts[rank].copy_(piece.clone().view(parts[rank].dtype).view(parts[rank].shape))


def exchange_left(
    tensors: Sequence[torch.Tensor], transfers: Sequence[Transfers], *, cp_group: Group | None
) -> tuple[torch.Tensor, ...]:
    """Fetch rows of other ranks' per-token tensors, in one exchange and with autograd.

    Args:
        tensors: [B, L, ...] each; one shape and dtype a tensor on every rank.
        transfers: What moves of each; the ranks' plans must fit together.
        cp_group: CP group; without CP nothing moves.

    Returns:
        Per tensor its halo [B, ``length``, ...], zero where nothing arrived. Gradients of the halo
        return to the rows' owners.
    """
    if not cp_enabled(cp_group):
        return tuple(
            t.new_zeros(t.shape[0], transfer.length, *t.shape[2:])
            for t, transfer in zip(tensors, transfers, strict=True)
        )
    halos: tuple[torch.Tensor, ...] = _ExchangeLeft.apply(transfers, cp_group, *tensors)  # type: ignore[no-untyped-call]
    return halos


def all_reduce_sum(tensor: torch.Tensor, groups: Sequence[Group | None]) -> torch.Tensor:
    """Return the sum over the ranks of all groups of a tensor that carries no gradient."""
    total = tensor.clone()
    for group in groups:
        if cp_enabled(group):
            dist.all_reduce(total, group=group)
    return total


def sharding_groups(tensor: torch.Tensor) -> Sequence[Group | None]:
    """Return the groups of the mesh that shards a tensor; none for a tensor that is whole."""
    return tensor.device_mesh.get_all_groups() if isinstance(tensor, DTensor) else []


def max_over_ranks(number: int, device: torch.device) -> int:
    """Return the largest of a number over all ranks of the job."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def same_on_all_ranks(
    facts: Sequence[int], device: torch.device, cp_group: Group | None
) -> list[list[int]] | None:
    """Return None if the ranks of the group hold the same numbers, else each rank's."""
    mine = torch.tensor([list(facts)], device=device)
    gathered = all_gather_metadata(mine, dim=0, cp_group=cp_group)
    on_ranks: list[list[int]] = gathered.tolist()
    return on_ranks if any(row != on_ranks[0] for row in on_ranks) else None


@contextmanager
def process_group(backend: str, *, rank: int, size: int, port: int = 0) -> Iterator[Group]:
    """Make the process group of a job on this machine, and take it down at the end.

    Training never does: there the host makes the groups.

    Args:
        backend: ``"nccl"``, ``"gloo"``, or ``"fake"``: its collectives return at once, with
            whatever memory held, so that one process can be any rank of any number.
        rank: This process's place.
        size: How many ranks there are.
        port: Where they meet; a fake group meets nobody.
    """
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

        dist.init_process_group(backend, rank=rank, world_size=size, store=FakeStore())
    else:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None  # it was just made
    try:
        yield group
    finally:
        dist.destroy_process_group()


def barrier(group: Group) -> None:
    """Return when every rank of the group has come here."""
    dist.barrier(group)


def store_of_the_job() -> tuple[Store, int, int] | None:
    """Return the store of all ranks, this rank and how many there are; None without others."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return default_store(), dist.get_rank(), dist.get_world_size()


def failed_in_a_collective(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, is that of a collective."""
    while error is not None:
        # What gloo raises is a plain RuntimeError; it names the file of gloo's that found it.
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
