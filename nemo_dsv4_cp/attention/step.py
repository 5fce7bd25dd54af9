# SPDX-License-Identifier: Apache-2.0
"""What is true for a whole forward, computed once and handed to every layer.

Where tokens and documents lie, which rank computes which queries, what moves for that, and the
index tensors that layers and kernels read. Layers of one kind share a plan.
"""

# B batch rows   L local tokens   R CP ranks   n local windows   r compress ratio   P entries

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.exchange.collectives import Group, cp_rank, cp_size
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.gpus import gpu_here
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan, raw_tokens
from nemo_dsv4_cp.sequence.queries import Queries, Runs
from nemo_dsv4_cp.sequence.row_plan import RowPlan, rows_of
from nemo_dsv4_cp.sequence.schedule import QueryCost, Schedule, contiguous, schedule_of
from nemo_dsv4_cp.sequence.transfers import transfers
from nemo_dsv4_cp.sequence.windows import WindowRows

STEP_KEY = "cp_step"
"""Keyword under which the model hands a forward's :class:`StepContext` to attention."""


@dataclass(frozen=True)
class LayerKind:
    """What layers share that have one plan.

    Attributes:
        ratio: Compress ratio, 0 without compression.
        window: W, sliding window in tokens.
        cost: What a query costs, which load balancing goes by.
    """

    ratio: int
    window: int
    cost: QueryCost

    @classmethod
    def of(cls, config: Any, ratio: int) -> LayerKind:
        """Return the kind of a model's layers of a compress ratio."""
        return cls(ratio, config.sliding_window, QueryCost.of(config, ratio))

    @property
    def overlaps(self) -> bool:
        """Whether windows also pool the window before (CSA)."""
        return self.ratio == OVERLAP_RATIO


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Queries that a rank computes together.

    Attributes:
        attention: Which keys each sees.
        rows: Which rows of the shard they are; None for remote queries.
    """

    attention: AttentionPlan
    rows: slice | torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.attention.queries)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One rank's part in the layers of a kind.

    Attributes:
        local: Queries of its own shard that it computes itself.
        remote: Queries of other shards that it computes; None where no rank computes any.
        moves: What may be fetched: ``keys``, the raw keys of remote and then of local queries;
            ``features`` and ``overlap`` of windows, and with ``index_`` before them the indexer's;
            ``remote_low``, ``remote_cos``, ``remote_sin`` and ``remote_weights`` of remote queries.
        n_keys: How many raw keys are for remote queries, and how many for local ones.
        returned: The rows of its own shard, computed here or by the rank that took them.
        windows: The windows that it pools; None without compression.
        entry_order: Int64 [B, P]: where each entry is among those gathered; None where in order.
    """

    local: QueryRows
    remote: QueryRows | None
    moves: Mapping[str, RowPlan]
    n_keys: tuple[int, ...]
    returned: RowPlan | None
    windows: WindowRows | None
    entry_order: torch.Tensor | None

    def in_order(self, gathered_BPD: torch.Tensor) -> torch.Tensor:
        """Put the entries of all ranks where queries look for them, [B, P, D]."""
        if self.entry_order is None:
            return gathered_BPD
        index = self.entry_order[..., None].expand(-1, -1, gathered_BPD.shape[2])
        return gathered_BPD.gather(1, index)


class StepContext:
    """What is true for one forward of one model; it dies with the step."""

    def __init__(
        self, layout: SequenceLayout, group: Group | None, options: ContextParallelOptions
    ) -> None:
        """Bind a step.

        Args:
            layout: Where this rank's tokens and documents lie.
            group: CP group, None without CP.
            options: The model's.
        """
        self.layout = layout
        self._balance = str(options.balance)
        self.transport: Transport = plugins.load(plugins.TRANSPORTS, options.transport)(
            group, overlap=options.overlap
        )
        self._plans: dict[tuple[LayerKind, torch.device], LayerPlan] = {}

    @classmethod
    def of_rows(cls, length: int, group: Group | None, options: ContextParallelOptions) -> Any:
        """Return the context of rows of one document each, ``length`` local tokens of them."""
        return cls(SequenceLayout(length, cp_rank(group), cp_size(group)), group, options)

    def schedule(self, kind: LayerKind) -> Schedule:
        """Return which rank computes which queries of a kind's layers."""
        if not kind.ratio:
            return contiguous(self.layout)
        return schedule_of(self.layout, kind.ratio, self._balance, kind.cost, gpu_here())

    def plan(self, kind: LayerKind, device: torch.device) -> LayerPlan:
        """Return the plan of a kind's layers.

        Raises:
            ValueError: If a window would straddle a cut.
        """
        if (kind, device) not in self._plans:
            self._plans[kind, device] = self._make(kind, device)
        return self._plans[kind, device]

    # Not to be traced: torch.compile meets a plan that the model made before its first block.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make(self, kind: LayerKind, device: torch.device) -> LayerPlan:
        layout, schedule = self.layout, self.schedule(kind)
        rank, ranks = layout.cp_rank, layout.cp_size
        shards = tuple((layout.shard(r),) for r in range(ranks))

        def fetched(wanted: tuple[Runs, ...]) -> RowPlan:
            return RowPlan.of(transfers(wanted, shards, shards, rank=rank), ranks, device)

        def keys(runs: Runs) -> Runs:
            return raw_tokens(runs, kind.window)

        def before(tokens: int) -> RowPlan:
            return fetched(tuple((layout.shard(r, before=tokens),) for r in range(ranks)))

        def queries(runs: Runs) -> AttentionPlan:
            plan = AttentionPlan(Queries(layout, runs), kind.window, kind.ratio)
            if runs:
                plan.visible_ranges(device)  # kept with it, for every layer
            return plan

        of_remote = [keys(runs) for runs in schedule.taken]
        of_local = [keys(runs) for runs in schedule.kept]
        moves = {"keys": fetched(tuple(a + b for a, b in zip(of_remote, of_local, strict=True)))}
        windows = entry_order = remote = returned = None
        if kind.ratio:
            straddling = layout.straddling(kind.ratio)
            windows = WindowRows.of(layout, kind.ratio, device)
            entry_order = layout.entry_order(kind.ratio, len(windows), device)
            moves["features"] = moves["index_features"] = before(straddling)
            if kind.overlaps:
                moves["overlap"] = moves["index_overlap"] = before(kind.ratio + straddling)
        if schedule.moves:
            remote = QueryRows(queries(schedule.taken[rank]))
            of_queries = ("remote_low", "remote_cos", "remote_sin", "remote_weights")
            moves |= dict.fromkeys(of_queries, fetched(schedule.taken))
            back = transfers(shards, schedule.kept, schedule.taken, rank=rank)
            returned = RowPlan.of(back, ranks, device)
        kept = schedule.kept[rank]
        local = QueryRows(queries(kept), rows_of(kept, layout.start, device))
        n_keys = tuple(sum(map(len, runs)) for runs in (of_remote[rank], of_local[rank]))
        return LayerPlan(local, remote, moves, n_keys, returned, windows, entry_order)
