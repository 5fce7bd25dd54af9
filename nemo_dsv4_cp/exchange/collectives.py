# SPDX-License-Identifier: Apache-2.0
"""Process groups and the collectives over them: the only file that starts any.

Collectives with a gradient overlap with compute. A layer starts one as soon as its input exists,
and waits for it where it first reads the output. Start and wait are two autograd functions, so that
backward overlaps in the same way: the backward of wait starts the reverse collective, and the
backward of start waits for it. Autograd runs the ready function whose forward ran last. The
backward of whatever ran between start and wait in forward therefore runs between the start of the
reverse collective and the wait for it.

Start returns an empty tensor that wait takes as an input: autograd does not see the memory that a
collective fills, and without this tensor it would not connect the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Generic, TypeAlias, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dsv4_cp.automodel.torch_api import (
    all_gather_single,
    default_store,
    reduce_scatter_single,
)

Group = dist.ProcessGroup
Work: TypeAlias = dist.Work
Store: TypeAlias = dist.Store  # type: ignore[name-defined,attr-defined]
T = TypeVar("T")

CP_GROUP_KEY = "_dsv4_cp_group"
"""Batch key under which the CP process group travels to attention, as in AutoModel."""


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


def start_all_gather(shard: torch.Tensor, group: Group) -> tuple[Work, torch.Tensor]:
    """Begin to gather the ranks' shards [*shape]: the work, and what it fills, [R, *shape]."""
    every = shard.new_empty(dist.get_world_size(group), *shard.shape)
    work = all_gather_single(every.flatten(0, 1), shard.contiguous(), group=group, async_op=True)
    return work, every


def start_reduce_scatter(every: torch.Tensor, group: Group) -> tuple[Work, torch.Tensor]:
    """Begin to sum the ranks' ``every`` [R, *shape], each rank its own of the R.

    A collective that sums rounds R - 1 times to the tensor's dtype. In 2 bytes, where that shows,
    the terms come instead, as many bytes, for :func:`summed` to round once.

    Returns:
        The work, and what it fills: the terms of the sum that are left, [1 or R, *shape].
    """
    every = every.contiguous()
    if every.element_size() >= 4:
        own = torch.empty_like(every[:1])
        work = reduce_scatter_single(own[0], every.flatten(0, 1), group=group, async_op=True)
        return work, own
    terms, sizes = torch.empty_like(every), [every[0].numel()] * len(every)
    return start_all_to_all(terms.flatten(), every.flatten(), sizes, sizes, group), terms


def summed(terms: torch.Tensor) -> torch.Tensor:
    """Return the sum of what :func:`start_reduce_scatter` filled, rounded once.

    Torch sums numbers of 2 bytes in float32, on CPUs and GPUs.
    """
    return terms[0] if len(terms) == 1 else terms.sum(dim=0)


def start_all_to_all(
    arriving: torch.Tensor,
    leaving: torch.Tensor,
    arriving_sizes: Sequence[int],
    leaving_sizes: Sequence[int],
    group: Group,
) -> Work:
    """Begin to send each rank its part of ``leaving`` and to fill ``arriving`` with theirs."""
    started: Work = dist.all_to_all_single(
        arriving,
        leaving,
        output_split_sizes=list(arriving_sizes),
        input_split_sizes=list(leaving_sizes),
        group=group,
        async_op=True,
    )
    return started


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude a function from torch.compile: a collective of ours is a break in its graph."""
    excluded: Callable[..., Any] = torch.compiler.disable(function)
    return excluded


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A result that may not be there yet.

    Attributes:
        wait: Returns the result; called once.
    """

    wait: Callable[[], T]


@dataclass(eq=False)
class InFlight:
    """One collective at a time and the memory that it fills: forward's, later backward's.

    Attributes:
        overlap: Whether the collective may overlap with compute; else :meth:`begin` waits for it.
    """

    overlap: bool
    _work: Work | None = None
    _filling: Any = None

    def begin(self, work: Work, filling: Any) -> None:
        """Take over a collective that was started, and what it fills."""
        self._work, self._filling = work, filling
        if not self.overlap:
            work.wait()
            self._work = None

    def end(self) -> Any:
        """Wait, return what the collective filled, and drop the reference to it."""
        if self._work is not None:
            self._work.wait()
        filled, self._work, self._filling = self._filling, None, None
        return filled


def all_gather_metadata(tensor: torch.Tensor, *, dim: int, cp_group: Group | None) -> torch.Tensor:
    """All-gather equal shards in rank order and concatenate them on ``dim``.

    Args:
        tensor: This rank's shard [..., n, ...], without gradient (masks, ids, numbers).
        dim: Dimension to concatenate on.
        cp_group: CP group; without CP the tensor is returned as it is.
    """
    if cp_group is None or not cp_enabled(cp_group):
        return tensor
    work, every = start_all_gather(tensor, cp_group)
    work.wait()
    return concatenated(every, dim % tensor.dim())


def concatenated(every: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the shards in [R, *shape] one after another on ``dim``, a view where that can be."""
    return every.movedim(0, dim).flatten(dim, dim + 1)


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


def mesh_of(group: Group, device: torch.device) -> DeviceMesh:
    """Return a one-dimensional mesh of a group that exists; nothing is communicated."""
    return DeviceMesh.from_group(group, device.type)


def is_first_rank() -> bool:
    """Return whether this is rank 0 of the job, or a process without others."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def max_over_ranks(number: int, device: torch.device) -> int:
    """Return the largest of a number over all ranks of the job."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def process_group(backend: str, *, rank: int, size: int, port: int = 0) -> Iterator[Group]:
    """Make the process group of a job on this machine, and take it down at the end.

    Training never does: there AutoModel makes the groups.

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


@contextmanager
def lone_last_rank(size: int) -> Iterator[Group]:
    """Yield the fake group of the last of ``size`` ranks; real tensors may pass its collectives.

    Since torch 2.13 the fake backend fills what arrives with what leaves, and refuses that the last
    rank sends nothing.
    """
    done = SimpleNamespace(wait=lambda: None)
    with (
        process_group("fake", rank=size - 1, size=size) as group,
        mock.patch.object(dist, "all_to_all_single", lambda *_, **__: done),
    ):
        yield group


def barrier(group: Group) -> None:
    """Return when every rank of the group has come here."""
    dist.barrier(group)


def store_of_the_job() -> tuple[Store, int, int] | None:
    """Return the store of all ranks, this rank and how many there are; None without others."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return default_store(), dist.get_rank(), dist.get_world_size()


def trains_on_gpus() -> bool:
    """Return whether this process's job computes on GPUs: by its backend, as AutoModel does."""
    if dist.is_available() and dist.is_initialized():
        return "nccl" in dist.get_backend_config()
    return torch.cuda.is_available()


def answers_of_all_ranks(text: str, seconds: float) -> list[str]:
    """Return what every rank of the job answers, in the order of ranks; all of them call this.

    By the job's store, not by a collective: those end after ``dist_env.timeout_minutes``, which is
    made for steps.

    Args:
        text: This rank's answer.
        seconds: How long to wait for the others.

    Raises:
        RuntimeError: If a rank has not answered by then.
    """
    job = store_of_the_job()
    if job is None:
        return [text]
    store, rank, size = job
    number = store.add(f"nemo_dsv4_cp/answers/of_rank/{rank}", 1)
    keys = [f"nemo_dsv4_cp/answers/{number}/{each}" for each in range(size)]
    store.set(keys[rank], text)
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistError as error:
        silent = [str(each) for each, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"rank {', '.join(silent)} did not answer within {seconds:g} s"
        ) from error
    return [store.get(key).decode() for key in keys]


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


def texts_if_different(text: str, cp_group: Group | None) -> dict[int, str] | None:
    """Return None if all ranks of the group hold one text, else the text of each rank of the job.

    A digest goes first, of one size whatever the texts are: ranks that disagree even about what to
    compare meet in the same collective. All see the same digests, so either all or none go on to
    the texts.
    """
    if cp_group is None or not cp_enabled(cp_group):
        return None
    digest = hashlib.sha256(text.encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=_device(cp_group))
    if bool((all_gather_metadata(mine, dim=0, cp_group=cp_group) == mine).all()):
        return None
    texts = [""] * dist.get_world_size(cp_group)
    dist.all_gather_object(texts, text, group=cp_group)
    return dict(zip(dist.get_process_group_ranks(cp_group), texts, strict=True))


def _device(group: Group) -> torch.device:
    """Return where a tensor must be that the group's backend moves, the CPU if it may be there."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
