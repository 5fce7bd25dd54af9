# SPDX-License-Identifier: Apache-2.0
"""Whether kernels compute what the torch path computes, at a model's own sizes, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.checks.difference import GRADIENT_LIMIT, OUTPUT_LIMIT, Difference
from nemo_dsv4_cp.checks.model_layers import is_v41, layers_of
from nemo_dsv4_cp.kernels.operations import (
    ALL_ENTRIES,
    CANDIDATES,
    INSIDE,
    attend,
    attention_tensors,
    selection,
    shared_selection,
)
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries

_ROW, _LONGEST_ROW = 16384, 131072
_SHARD = 256
_SHARD_ON_CPU = 4
"""An interpreter takes seconds for a few queries of V4's size."""

Run = Callable[..., torch.Tensor]


def verify_kernels(
    sizes: Any,
    name: str,
    *,
    dtype: torch.dtype,
    workspace_bytes: int | None,
    begin: Callable[[str], None] = lambda _: None,
) -> Iterator[Difference]:
    """Run every operation of a model's layers, with gradients, and compare it with the torch path.

    The queries are the last of a row of 16,384 tokens: one document, then two packed rows with
    documents of odd lengths, some without a single entry, then two runs of these rows' queries, as
    load balancing makes them. Ratio 0 is always verified, because MTP layers may have it.

    Of V4.1, attention and each way in which its layers select are compared, and for two runs the
    latter alone: it rotates keys without kernels, and moves no queries of attention. Its rows are
    longer if candidates would otherwise hold more than half of the entries.

    Differences are relative to the largest entry; of top-k selection, the share of indices that
    differ. In float32 they may be what the package allows everywhere; in a shorter type, twice what
    the torch path in that type differs from itself in float64. There the root mean square is
    compared, too: it shows an error of all entries that is smaller than the largest rounding.

    Args:
        sizes: Has the fields that ``model_layers.SIZES`` names, or those of ``SIZES_V41``.
        name: That of kernels in the entry-point group.
        dtype: Of activations.
        workspace_bytes: How much scratch an operation may take; None for what suits the device.
        begin: Called with the name of each operation before it runs.

    Raises:
        ValueError: If the kernels cannot run here.
    """
    kernels: Kernels = plugins.load(plugins.KERNELS, name)(workspace_bytes=workspace_bytes)
    reference = TorchKernels(workspace_bytes=workspace_bytes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shard = _SHARD if device.type == "cuda" else _SHARD_ON_CPU
    compared = _Compared(sizes, kernels, reference, _Draw(device, dtype), begin)
    v41 = is_v41(sizes)
    row = _row(sizes) if v41 else _ROW
    last, ranks = row // shard - 1, row // shard
    one_document = SequenceLayout(shard, last, ranks)
    if not v41:
        yield from compared.rotary(one_document)
    of_layers = [ratio for ratio, _ in layers_of(sizes)] if v41 else sizes.compress_ratios
    ratios = list(dict.fromkeys([*map(int, of_layers), 0]))
    for ratio in ratios:
        yield from compared.layer(f"ratio {ratio}: ", Queries.own(one_document), ratio)
    # One document crosses the cut, one of a single token, one that ends before the shard does; the
    # second row's queries are padding behind its only document, or end a document that is long
    # enough for candidates to leave out entries, and is not the first.
    cut = row - shard
    starts = [[0, 3, cut - 131, cut + 1, cut + 2, row - 1], [0, 5 if v41 else cut - 1] + 4 * [row]]
    packed = SequenceLayout.of_documents(
        torch.tensor(starts, device=device), shard, cp_rank=last, cp_size=ranks
    )
    for ratio in ratios:
        yield from compared.layer(f"packed, ratio {ratio}: ", Queries.own(packed), ratio)
    half = shard // 2
    runs = (range(row // 2, row // 2 + half), range(row - half, row))
    compare = compared.shared_selections if v41 else compared.layer
    for ratio in filter(None, ratios):
        yield from compare(f"two runs, ratio {ratio}: ", Queries(packed, runs), ratio)


def _row(sizes: Any) -> int:
    """Return how many tokens have twice the entries of V4.1's candidates, whole shards of them."""
    entries = sizes.candidate_topk_blocks * sizes.candidate_block_size
    needed = max((2 * entries * r for r, how in layers_of(sizes) if how == INSIDE), default=0)
    return min(max(_ROW, -(-needed // _SHARD) * _SHARD), _LONGEST_ROW)


@dataclass(frozen=True)
class _Compared:
    """Kernels beside the torch path."""

    sizes: Any
    kernels: Kernels
    reference: Kernels
    draw: _Draw
    begin: Callable[[str], None]

    def rotary(self, layout: SequenceLayout) -> Iterator[Difference]:
        """Compare the rotation of keys."""

        def rotate(by: Kernels, keys: torch.Tensor) -> torch.Tensor:
            return by.rotate(keys, self.draw.rope(layout, self.sizes, keys.dtype))

        keys = self.draw(1, layout.local_len, self.sizes.head_dim)
        yield from self._differences("rotary: ", ("output", "keys"), rotate, [keys])

    def layer(self, prefix: str, queries: Queries, ratio: int) -> Iterator[Difference]:
        """Compare top-k selection, and attention with its gradients."""
        sizes, draw, v41 = self.sizes, self.draw, is_v41(self.sizes)
        plan = AttentionPlan(queries, sizes.sliding_window, ratio)
        selected = None
        if v41:
            selected = yield from self.shared_selections(prefix, queries, ratio)
        elif ratio == OVERLAP_RATIO:
            selected = yield from self._selection(prefix, plan)

        def run(by: Kernels, *tensors: torch.Tensor) -> torch.Tensor:
            rope = draw.rope(queries.layout, sizes, tensors[0].dtype)
            if not v41:
                return attend(by, sizes, plan, rope, selected, *tensors)
            q, raw, entries, sinks = tensors
            total = None
            if entries.element_size() == 2:  # as the layers do that share entries
                total = torch.zeros_like(entries, dtype=torch.float32)
                entries = _summed(entries, total)
            return attend(
                by, sizes, plan, rope, selected, q, raw, entries, sinks,
                normed=False, entries_grad=None if total is None else lambda: total,
            )  # fmt: skip

        names = ("output", "queries", "raw keys", "entries", "sinks")
        tensors = attention_tensors(sizes, plan, draw)
        yield from self._differences(prefix, names, run, tensors)

    def _selection(
        self, prefix: str, plan: AttentionPlan
    ) -> Generator[Difference, None, torch.Tensor]:
        """Compare V4's top-k selection, and return the torch path's."""
        sizes, draw = self.sizes, self.draw
        self.begin(f"{prefix}top-k selection")
        no_turn = draw.integers(1, plan.queries.layout.local_len, sizes.qk_rope_head_dim)
        rope = torch.ones_like(no_turn), torch.zeros_like(no_turn)
        selected, mine = (
            selection(by, sizes, plan, rope, draw.integers)()
            for by in (self.reference, self.kernels)
        )
        yield Difference(f"{prefix}top-k selection", _share(mine, selected), 0.0)
        return selected

    def shared_selections(
        self, prefix: str, queries: Queries, ratio: int
    ) -> Generator[Difference, None, torch.Tensor | None]:
        """Compare the ways in which V4.1's layers of a ratio select; return what one selected."""
        plan = AttentionPlan(queries, self.sizes.sliding_window, ratio)
        kinds = {how for of_layer, how in layers_of(self.sizes) if of_layer == ratio}
        both = (self.reference, self.kernels)
        selected: torch.Tensor | None = None
        candidates: list[torch.Tensor | None] = [None, None]
        for kind in (ALL_ENTRIES, CANDIDATES, INSIDE):
            if kind not in kinds:
                continue
            what = f"{prefix}top-k selection, {kind}"
            self.begin(what)
            # Inside candidates with negative scores: the best blocks have the best entries of all.
            draw = self.draw.negated if kind == INSIDE else self.draw.integers
            chooses = kind != ALL_ENTRIES
            # Each in its own candidates, whose order is the backend's.
            (selected, made), (mine, mine_made) = (
                shared_selection(by, self.sizes, plan, draw, inside, chooses=chooses)()
                for by, inside in zip(both, candidates, strict=True)
            )
            yield Difference(what, _share(mine, selected), 0.0)
            if kind == CANDIDATES:
                candidates = [made, mine_made]
                yield Difference(f"{prefix}candidates", _share_of_blocks(mine_made, made), 0.0)
        return selected

    def _differences(
        self, prefix: str, names: tuple[str, ...], run: Run, tensors: list[torch.Tensor]
    ) -> Iterator[Difference]:
        """Compare the output and every gradient."""
        self.begin(f"{prefix}forward and backward")
        dtype = tensors[0].dtype
        exact = _with_gradients(run, self.reference, [tensor.double() for tensor in tensors])
        mine = _with_gradients(run, self.kernels, tensors)
        rounded = mine
        if dtype is not torch.float32:
            rounded = _with_gradients(run, self.reference, tensors)
        for name, a, b, truth in zip(names, mine, rounded, exact, strict=True):
            if not truth.numel():
                continue
            what = prefix + (name if name == "output" else f"gradient of {name}")
            value, rounding = (_largest(x, truth) for x in (a, b))
            if dtype is torch.float32:
                limit = OUTPUT_LIMIT if name == "output" else GRADIENT_LIMIT
                yield Difference(what, value, limit)
                continue
            eps = torch.finfo(dtype).eps
            yield Difference(what, value, 2 * rounding + eps)
            value, rounding = (_root_mean_square(x, truth) for x in (a, b))
            yield Difference(f"{what}, root mean square", value, 2 * rounding + eps / 2)


class _Summed(torch.autograd.Function):
    """Entries whose gradient is a float32 sum, which kernels may add to, rounded."""

    @staticmethod
    def forward(ctx: Any, entries: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.total, ctx.dtype = total, entries.dtype
        return entries.view_as(entries)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        total = ctx.total if grad is None else ctx.total + grad
        return total.to(ctx.dtype), None


_summed: Callable[..., torch.Tensor] = _Summed.apply


class _Draw:
    """Draws tensors from one generator."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def integers(self, *shape: int) -> torch.Tensor:
        """Draw integers, the same each time, whose scores are exact and often tie."""
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randint(-3, 4, shape, generator=generator)
        return numbers.to(self._device, self._dtype)

    def negated(self, *shape: int) -> torch.Tensor:
        """Draw the negative of :meth:`integers`."""
        return -self.integers(*shape)

    def rope(self, layout: SequenceLayout, sizes: Any, dtype: torch.dtype) -> Rope:
        """Return the angles of a shard, rounded to the dtype of activations."""
        positions = layout.document_positions(self._device).double()[..., None]
        steps = torch.linspace(0, 1, sizes.qk_rope_head_dim // 2, device=self._device)
        twice = (positions / 10000**steps).repeat(1, 1, 2)
        cos, sin = (part.to(self._dtype).to(dtype) for part in (twice.cos(), twice.sin()))
        return cos, sin


def _largest(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return float((x.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def _root_mean_square(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Return that of the differences, relative to that of the entries."""
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def _share(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the share of slots that differ."""
    return float((_by_place(mine) != _by_place(theirs)).double().mean())


def _share_of_blocks(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """Return the share of candidates that differ; a backend may leave out unused slots."""
    if mine is None or theirs is None:
        return float(mine is not theirs)
    slots = max(mine.shape[-1], theirs.shape[-1])
    a, b = (pad(x, (0, slots - x.shape[-1]), value=NOTHING) for x in (mine, theirs))
    return _share(a, b)


def _by_place(selected: torch.Tensor) -> torch.Tensor:
    """Sort each query's entries: they may come in any order."""
    last = torch.iinfo(selected.dtype).max
    return selected.masked_fill(selected == NOTHING, last).sort(-1).values


def _with_gradients(run: Run, by: Kernels, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = run(by, *leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
