"""Memory and traffic of one rank, weighed without a device: fake tensors, a fake process group."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from nemo_automodel.components.models.deepseek_v4 import layers as host_layers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_dsv4_cp.exchange.collectives import process_group
from nemo_dsv4_cp.host.torch_api import let_fake_tensors_through_collectives
from nemo_dsv4_cp.tools.layer import Case, build
from nemo_dsv4_cp.tools.paths import HOST

_LARGEST = 5


@dataclass(frozen=True)
class Tensor:
    """A tensor that was alive at the peak."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Weight:
    """What one layer's forward and backward took of one rank.

    Parameters and input were there before, and count only where an operation returned a view.

    Attributes:
        case: What was weighed.
        peak_bytes: Most bytes alive at a time.
        saved_bytes: Bytes alive between forward and backward.
        received_forward: Bytes that other ranks sent, in forward.
        received_backward: Bytes that other ranks sent, in backward.
        largest: The largest tensors alive at the peak.
    """

    case: Case
    peak_bytes: int
    saved_bytes: int
    received_forward: int
    received_backward: int
    largest: tuple[Tensor, ...]

    def per_token(self, received: int) -> float:
        """Return received bytes per local token and remote rank."""
        return received / self.case.layout.local_len / max(self.case.cp_size - 1, 1)


class _Scale(TorchDispatchMode):
    """Sums the storages alive and the bytes that collectives bring in."""

    def __init__(self, case: Case) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranks, self._rank = case.cp_size, case.rank
        self._alive: dict[int, Tensor] = {}
        self.live = self.peak = self.received = 0
        self.largest: tuple[Tensor, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.received += self._brought(func.overloadpacket.__name__, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, str(func.overloadpacket))
        return out

    def _add(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        size = storage.nbytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._alive[storage._cdata] = Tensor(operation, tuple(tensor.shape), dtype, size)
        weakref.finalize(storage, self._remove, storage._cdata)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            ranked = sorted(self._alive.values(), key=lambda t: t.bytes, reverse=True)
            self.largest = tuple(ranked[:_LARGEST])

    def _remove(self, key: int) -> None:
        self.live -= self._alive.pop(key).bytes

    def _brought(self, operation: str, args: tuple[Any, ...]) -> int:
        """Return what other ranks sent to this one, whatever algorithm carries it."""
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
        raise NotImplementedError(f"c10d.{operation} is not weighed; teach _brought() its bytes")


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors))


def weigh(case: Case) -> Weight:
    """Run a V4-Flash layer forward and backward on fake tensors, bfloat16, and weigh it.

    The host's layer runs with its TileLang kernels, of which only the tensors they take, save and
    return exist here; ours runs its torch path.
    """
    let_fake_tensors_through_collectives()
    with (
        process_group("fake", rank=case.rank, size=case.cp_size) as group,
        FakeTensorMode(),
        _host_kernels(),
    ):
        forward = build(
            case,
            group,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            attn="tilelang" if case.path == HOST else "sdpa",
        )
        with _Scale(case) as scale:
            out = forward()
            saved, received = scale.live, scale.received
            out.backward(torch.empty_like(out))
            return Weight(
                case, scale.peak, saved, received, scale.received - received, scale.largest
            )


class _KernelShapes(torch.autograd.Function):
    """The tensors of the host's sparse-attention kernels without the arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, kv: torch.Tensor, sinks: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, kv, sinks, indices, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, kv, sinks, *_ = ctx.saved_tensors
        # Its backward adds up the keys' gradient in float32 before it rounds.
        summed = torch.empty_like(kv, dtype=torch.float32)
        return torch.empty_like(q), summed.to(kv.dtype), torch.empty_like(sinks), None


def _attention_shapes(
    q: torch.Tensor,
    kv: torch.Tensor,
    sinks: torch.Tensor,
    indices: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    out: torch.Tensor = _KernelShapes.apply(  # type: ignore[no-untyped-call]
        q.contiguous(), kv.contiguous(), sinks.float(), indices.to(torch.int32)
    )
    return out


def _score_shapes(q: torch.Tensor, keys: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], keys.shape[1], dtype=torch.float32)


@contextmanager
def _host_kernels() -> Iterator[None]:
    with (
        mock.patch.object(host_layers, "dsv4_sparse_attention", _attention_shapes),
        mock.patch.object(host_layers, "dsv4_indexer_scores", _score_shapes),
    ):
        yield
