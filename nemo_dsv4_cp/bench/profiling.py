# SPDX-License-Identifier: Apache-2.0
"""Memory, traffic, launches and operations of one rank's layer, profiled without a device.

Fake tensors in a fake process group: every operation of a layer runs on shapes alone.
"""

from __future__ import annotations

import math
import operator
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nemo_dsv4_cp.automodel.torch_api import let_fake_tensors_through_collectives
from nemo_dsv4_cp.bench import layer
from nemo_dsv4_cp.bench.automodel_shapes import automodels_kernels
from nemo_dsv4_cp.bench.layer import Case, Forward
from nemo_dsv4_cp.exchange.collectives import process_group
from nemo_dsv4_cp.gpus import ASSUMED
from nemo_dsv4_cp.kernels.costs import Cost, cost_of
from nemo_dsv4_cp.kernels.reference import workspace
from nemo_dsv4_cp.tools.crossings import AUTOMODEL

_LARGEST = 5

_NO_LAUNCH = frozenset(
    {
        "_reshape_alias",
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "is_same_size",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "resize_",
    }
)
"""Operations that only make a tensor, or another view of one."""

_OVERWRITE = frozenset({"copy_", "fill_", "zero_"})
"""Operations in place that do not read what they write over."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that was alive at the peak."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Launches:
    """What a device runs: launched operations, and bytes of the tensors that they read and write.

    Collectives count, views and allocations do not. A tensor is as large as the operation sees it.
    """

    count: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def __add__(self, other: Launches) -> Launches:
        return Launches(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Launches) -> Launches:
        return Launches(*map(operator.sub, astuple(self), astuple(other)))

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class LayerProfile:
    """What one layer's forward and backward take on one rank.

    Parameters and input are there before, and count only where an operation returns a view.

    Attributes:
        case: What was profiled.
        peak_bytes: Most bytes alive at a time.
        saved_bytes: Bytes alive between forward and backward.
        carried_bytes: Bytes of what the layers after it use, too (V4.1).
        received_forward: Bytes that other ranks sent, in forward.
        received_backward: Bytes that other ranks sent, in backward.
        forward: What forward launched.
        backward: What backward launched.
        largest: The largest tensors alive at the peak.
    """

    case: Case
    peak_bytes: int
    saved_bytes: int
    carried_bytes: int
    received_forward: int
    received_backward: int
    forward: Launches
    backward: Launches
    largest: tuple[Tensor, ...]

    def per_token(self, received: int) -> float:
        """Return received bytes per local token and remote rank."""
        return received / self.case.layout.local_len / max(self.case.cp_size - 1, 1)


class Profiler(TorchDispatchMode):
    """Sums the storages alive, the bytes that collectives bring in, and what is launched."""

    def __init__(self, case: Case) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranks, self._rank = case.cp_size, case.rank
        self._alive: dict[int, Tensor] = {}
        self.live = self.peak = self.received = 0
        self.largest: tuple[Tensor, ...] = ()
        self.launched = Launches()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        cost = cost_of(func, args, kwargs)
        self._launch(func, args, kwargs, out, cost)
        if func.namespace == "c10d":
            self.received += self._received(func.overloadpacket.__name__, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, str(func.overloadpacket))
        if cost is not None:
            self._note_peak(self.live + cost.scratch_bytes)
        return out

    def _launch(self, func: Any, args: Any, kwargs: Any, out: Any, cost: Cost | None) -> None:
        if cost is not None:
            new = Launches(cost.launches, cost.read_bytes, cost.written_bytes)
        elif _only_a_view(func) or func.overloadpacket.__name__ in _NO_LAUNCH:
            return
        else:
            read, written = _touched(func, args, kwargs, out)
            if not written:
                return  # nothing to run on tensors without entries
            new = Launches(1, read, written)
        self.launched += new

    def _add(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        size = storage.nbytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._alive[storage._cdata] = Tensor(operation, tuple(tensor.shape), dtype, size)
        weakref.finalize(storage, self._remove, storage._cdata)
        self.live += size
        self._note_peak(self.live)

    def _note_peak(self, size: int) -> None:
        if size > self.peak:
            self.peak = size
            ranked = sorted(self._alive.values(), key=lambda t: t.bytes, reverse=True)
            self.largest = tuple(ranked[:_LARGEST])

    def _remove(self, key: int) -> None:
        self.live -= self._alive.pop(key).bytes

    def _received(self, operation: str, args: tuple[Any, ...]) -> int:
        """Return the bytes that other ranks send to this one, whatever algorithm carries them."""
        remote = self._ranks - 1
        if operation in ("allgather_", "_allgather_base_"):
            return _bytes(args[0]) * remote // self._ranks
        if operation in ("reduce_scatter_", "_reduce_scatter_base_"):
            return _bytes(args[0]) * remote
        if operation == "alltoall_":
            return sum(_bytes(part) for i, part in enumerate(args[0]) if i != self._rank)
        if operation == "alltoall_base_":
            splits = args[3] or [_bytes(args[0]) // self._ranks] * self._ranks
            row = _bytes(args[0]) // max(args[0].shape[0], 1)
            return sum(size * row for i, size in enumerate(splits) if i != self._rank)
        raise NotImplementedError(f"c10d.{operation} is not profiled; add its bytes to _received()")


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors))


def _only_a_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _touched(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes."""
    read, written, in_place = 0, 0, False
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        size = _seen(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            in_place = True
            written += size
            if func.namespace == "c10d" or func.overloadpacket.__name__ in _OVERWRITE:
                continue
        read += size
    return read, written if in_place else _seen(out)


def _seen(value: Any) -> int:
    """Return the bytes of the tensors in a value, what is expanded once."""
    return sum(
        t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)
        for t in tree_leaves(value)
        if isinstance(t, torch.Tensor) and t.numel()
    )


@contextmanager
def fake_rank(case: Case) -> Iterator[Any]:
    """Yield the CP group of the case's rank; tensors are fake, and its GPU has an H100's memory."""
    let_fake_tensors_through_collectives()
    with (
        process_group("fake", rank=case.rank, size=case.cp_size) as group,
        FakeTensorMode(),
        # A norm of AutoModel's that is compiled would read what fake tensors have not.
        torch.compiler.set_stance("force_eager"),
        mock.patch.object(workspace, "device_memory", lambda _: round(ASSUMED.memory) << 30),
    ):
        yield group


def builder(case: Case) -> Callable[..., Forward]:
    """Return what builds the case's layer: that of V4, or V4.1's."""
    if case.layer is None:
        return layer.build
    from nemo_dsv4_cp.bench import layer_v41  # AutoModel has V4.1 since 0.7

    return layer_v41.build


@contextmanager
def _layer_of_fakes(case: Case) -> Iterator[Forward]:
    """Yield the forward of a case's layer on fake tensors, bfloat16."""
    attn = "tilelang" if case.path == AUTOMODEL else "sdpa"
    with fake_rank(case) as group, automodels_kernels():
        yield builder(case)(
            case, group, dtype=torch.bfloat16, device=torch.device("cpu"), attn=attn
        )


def profile(case: Case) -> LayerProfile:
    """Profile forward and backward of a layer of V4-Flash, or of V4.1-Flash.

    Kernels of the package register what they launch; of AutoModel's TileLang kernels only the
    tensors that they take, save and return exist here.
    """
    with _layer_of_fakes(case) as forward, Profiler(case) as profiler:
        out = forward()
        saved, received, launched = profiler.live, profiler.received, profiler.launched
        out.backward()
        return LayerProfile(
            case,
            profiler.peak,
            saved,
            _bytes(out.carried),
            received,
            profiler.received - received,
            launched,
            profiler.launched - launched,
            profiler.largest,
        )


def count_flops(case: Case) -> tuple[int, int]:
    """Return the floating-point operations of a layer's products, forward and backward.

    The Triton kernels register theirs: what the causal view hides does not count. The torch path's
    products count as they are computed, what is masked afterwards too.
    """
    with _layer_of_fakes(case) as forward:
        with FlopCounterMode(display=False) as counted:
            out = forward()
        with FlopCounterMode(display=False) as counted_back:
            out.backward()
    return counted.get_total_flops(), counted_back.get_total_flops()


def draw_documents(seq_len: int, shortest: int, longest: int, seed: int) -> tuple[int, ...]:
    """Draw where documents of ``shortest`` to ``longest`` tokens start in a row that they fill."""
    draw, starts = random.Random(seed), [0]
    while starts[-1] < seq_len:
        starts.append(starts[-1] + draw.randint(shortest, longest))
    return tuple(starts[:-1])
