# SPDX-License-Identifier: Apache-2.0
"""State of a whole forward, computed once and handed to every layer.

Where tokens and documents are, which rank computes which queries, what moves for that, and the
index tensors that layers and kernels read. Layers of one kind share a plan.
"""

# B batch rows   L local tokens   R CP ranks   n local windows   r compress ratio   P entries

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.exchange.collectives import Group, cp_rank, cp_size
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.gpus import Gpu, gpu_here
from nemo_dsv4_cp.kernels.protocol import Rope
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan, raw_tokens
from nemo_dsv4_cp.sequence.queries import Queries, Runs
from nemo_dsv4_cp.sequence.row_plan import RowPlan, rows_of
from nemo_dsv4_cp.sequence.schedule import Cost, QueryCost, Schedule, Schedules
from nemo_dsv4_cp.sequence.windows import Windows, straddling

_OF_QUERIES = tuple(f"remote_{of}" for of in ("low", "cos", "sin", "weights", "index", "share"))
"""What moves with queries that another rank computes, or in V4.1 selects for."""

STEP_KEY = "cp_step"
"""Keyword under which the model hands a forward's :class:`StepContext` to attention."""


@dataclass(frozen=True)
class LayerKind:
    """The settings that determine a layer's plan; layers of equal kind share one.

    Attributes:
        ratio: Compress ratio, 0 without compression.
        overlaps: Whether windows also pool the window before (CSA).
        has_indexer: Whether queries see only the entries that an indexer selects (CSA).
        window: W, sliding window in tokens.
        cost: What a query costs, which load balancing depends on; None where queries stay.
    """

    ratio: int
    overlaps: bool
    has_indexer: bool
    window: int
    cost: Cost | None

    @classmethod
    def of(cls, config: Any, ratio: int) -> LayerKind:
        """Return the kind of a model's layers of a compress ratio."""
        csa = ratio == OVERLAP_RATIO
        return cls(ratio, csa, csa, config.sliding_window, QueryCost.of(config, ratio))


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One rank's part in the layers of a kind.

    Attributes:
        local: Queries of its own shard that it computes itself.
        local_rows: Which rows of the shard they are.
        remote: Queries of other shards that it computes; None where no rank computes any.
        moves: The row plan of each tensor that a layer can fetch, by name: ``keys``, the raw keys
            of remote and then of local queries; ``features`` and ``overlap`` of windows, and with
            ``index_`` before them the indexer's; ``remote_low``, ``remote_cos``, ``remote_sin``,
            ``remote_weights``, ``remote_index`` (V4.1) and ``remote_share`` of remote queries.
        n_keys: How many raw keys are for remote queries, and how many for local ones.
        returned: The row plan of a layer's output for all tokens of its own shard: it computes the
            rows of local queries, and receives the others from the ranks that compute them.
        windows: The windows that it pools; None without compression.
        entry_order: Int64 [B, P]: where each entry is among those gathered; None where in order.
    """

    local: AttentionPlan
    local_rows: slice | torch.Tensor
    remote: AttentionPlan | None
    moves: Mapping[str, RowPlan]
    n_keys: tuple[int, ...]
    returned: RowPlan
    windows: Windows | None
    entry_order: torch.Tensor | None

    def in_order(self, gathered_BPD: torch.Tensor) -> torch.Tensor:
        """Put the entries of all ranks where queries look for them, [B, P, D]."""
        if self.entry_order is None:
            return gathered_BPD
        index = self.entry_order[..., None].expand(-1, -1, gathered_BPD.shape[2])
        return gathered_BPD.gather(1, index)


@dataclass(frozen=True, eq=False)
class _Part:
    """One rank's part in a schedule, whatever the compress ratio; see :class:`LayerPlan`."""

    local: Queries
    local_rows: slice | torch.Tensor
    remote: Queries | None
    moves: Mapping[str, RowPlan]
    n_keys: tuple[int, ...]
    returned: RowPlan


class StepContext:
    """State that all layers of one forward share; the next forward has another."""

    def __init__(
        self,
        layout: SequenceLayout,
        group: Group | None,
        options: ContextParallelOptions,
        gpu: Gpu | None = None,
    ) -> None:
        """Bind a step.

        Args:
            layout: Where this rank's tokens and documents are.
            group: CP group, None without CP.
            options: The model's.
            gpu: By whose rates ``balance: auto`` decides; by default those of the table.
        """
        self.layout = layout
        self.transport: Transport = plugins.load(plugins.TRANSPORTS, options.transport)(
            group, overlap=options.overlap
        )
        self.loss_weights_BL1: torch.Tensor | None = None  # of tokens, if the indexer has a loss
        self._shards = [(layout.shard(rank),) for rank in range(layout.cp_size)]
        self._balance = str(options.balance)
        self._gpu = gpu or gpu_here()
        self._schedules: Schedules | None = None
        self._parts: dict[tuple[Schedule, int, torch.device], _Part] = {}
        self._plans: dict[tuple[LayerKind, torch.device], LayerPlan] = {}
        self._ropes: dict[tuple[int, int, torch.dtype, torch.device], Rope] = {}

    @classmethod
    def of_rows(
        cls, length: int, group: Group | None, options: ContextParallelOptions
    ) -> StepContext:
        """Return the context of rows of one document each, ``length`` local tokens of them."""
        return cls(SequenceLayout(length, cp_rank(group), cp_size(group)), group, options)

    def schedule(self, kind: LayerKind) -> Schedule:
        """Return which rank computes which queries of a kind's layers."""
        if self._schedules is None:
            self._schedules = Schedules(self.layout, self._balance, self._gpu)
        return self._schedules.of(kind.ratio, kind.cost)

    def plan(self, kind: LayerKind, device: torch.device) -> LayerPlan:
        """Return the plan of a kind's layers.

        Raises:
            ValueError: If a window would straddle a cut.
        """
        if (kind, device) not in self._plans:
            self._plans[kind, device] = self._make(kind, device)
        return self._plans[kind, device]

    def with_halo(
        self, tensors: Mapping[str, torch.Tensor], tokens: int
    ) -> dict[str, torch.Tensor]:
        """Return tensors [B, L, ...] of this rank's tokens with as many tokens before them.

        [B, tokens + L, ...]; what comes before the row's first token is zero.
        """
        ranks = range(self.layout.cp_size)
        device = next(iter(tensors.values())).device
        plan = self._fetched([(self.layout.shard(r, before=tokens),) for r in ranks], device)
        return self.transport.fetch(tensors, dict.fromkeys(tensors, plan)).wait()

    def window_rope(self, plan: LayerPlan, rotary: Any, like_BLE: torch.Tensor) -> Rope | None:
        """Return cos and sin of the windows' places, [B, n, r] each; computed once.

        Args:
            plan: Whose windows; None is returned if it has none.
            rotary: AutoModel's rotary embedding of compressed entries, one for all layers.
            like_BLE: Activations; only their rows, dtype and device are read.
        """
        if plan.windows is None:
            return None
        key = (plan.windows.ratio, like_BLE.shape[0], like_BLE.dtype, like_BLE.device)
        if key not in self._ropes:
            places = plan.windows.places.expand(like_BLE.shape[0], -1)
            self._ropes[key] = rotary(like_BLE, places)
        return self._ropes[key]

    # Not to be traced: torch.compile meets a plan that the model made before its first block.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make(self, kind: LayerKind, device: torch.device) -> LayerPlan:
        layout, ratio = self.layout, kind.ratio
        part = self._part(self.schedule(kind), kind.window, device)
        moves, windows, entry_order = dict(part.moves), None, None
        if ratio:

            def before(tokens: int) -> RowPlan:
                ranks = range(layout.cp_size)
                return self._fetched([(layout.shard(r, before=tokens),) for r in ranks], device)

            tokens_before = straddling(layout, ratio)
            windows = Windows.of(layout, ratio, device)
            entry_order = layout.entry_order(ratio, windows.count, device)
            moves["features"] = moves["index_features"] = before(tokens_before)
            if kind.overlaps:
                moves["overlap"] = moves["index_overlap"] = before(ratio + tokens_before)

        def attention(queries: Queries) -> AttentionPlan:
            plan = AttentionPlan(queries, kind.window, ratio)
            if queries.runs:
                plan.visible_ranges(device)  # stays with it, for every layer
            return plan

        return LayerPlan(
            local=attention(part.local),
            local_rows=part.local_rows,
            remote=None if part.remote is None else attention(part.remote),
            moves=moves,
            n_keys=part.n_keys,
            returned=part.returned,
            windows=windows,
            entry_order=entry_order,
        )

    def _part(self, schedule: Schedule, window: int, device: torch.device) -> _Part:
        """Return this rank's part in a schedule, made once for all kinds that share it."""
        key = (schedule, window, device)
        if key in self._parts:
            return self._parts[key]
        layout, rank = self.layout, self.layout.cp_rank
        keys = [
            (raw_tokens(remote, window), raw_tokens(local, window))
            for remote, local in zip(schedule.remote, schedule.local, strict=True)
        ]
        moves = {
            "keys": self._fetched([of_remote + of_local for of_remote, of_local in keys], device)
        }
        remote = None
        if schedule.moves:
            remote = Queries(layout, schedule.remote[rank])
            moves |= dict.fromkeys(_OF_QUERIES, self._fetched(schedule.remote, device))
        own = schedule.local[rank]
        self._parts[key] = _Part(
            local=Queries(layout, own),
            local_rows=rows_of(own, layout.start, device),
            remote=remote,
            moves=moves,
            n_keys=tuple(sum(map(len, runs)) for runs in keys[rank]),
            returned=RowPlan.of(
                self._shards, schedule.local, schedule.remote, rank=rank, device=device
            ),
        )
        return self._parts[key]

    def _fetched(self, wanted: Sequence[Runs], device: torch.device) -> RowPlan:
        """Return this rank's part in a fetch of the tokens that each rank wants."""
        return RowPlan.of(wanted, self._shards, rank=self.layout.cp_rank, device=device)
