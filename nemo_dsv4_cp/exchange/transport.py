# SPDX-License-Identifier: Apache-2.0
"""What moves between ranks, in three verbs: fetch rows, gather entries, send rows back."""

# B batch rows   L local tokens   R CP ranks   T rows of an answer   n local entries   D entry width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from nemo_dsv4_cp.exchange.collectives import Group, Pending, cp_enabled
from nemo_dsv4_cp.exchange.gather import Codec, quantized, start_gather
from nemo_dsv4_cp.exchange.rows import start_rows
from nemo_dsv4_cp.sequence.row_plan import RowPlan, take


class Transport:
    """Sends each rank the rows that it requests, and all-gathers entries (``transport: boundary``).

    All verbs are collective and differentiable. Another transport overrides what it does in another
    way; it is found by its name in the entry-point group ``nemo_dsv4_cp.transports``.
    """

    def __init__(self, cp_group: Group | None, *, overlap: bool) -> None:
        """Bind the CP group.

        Args:
            cp_group: Who takes part; None without CP.
            overlap: Whether collectives overlap with compute until they are waited for.
        """
        self.cp_group = cp_group if cp_enabled(cp_group) else None
        self.overlap = overlap

    def fetch(
        self, tensors: Mapping[str, torch.Tensor], plans: Mapping[str, RowPlan]
    ) -> Pending[dict[str, torch.Tensor]]:
        """Start to fetch, of each tensor [B, L, ...], the rows that its plan wants.

        Returns:
            Of each its answer [B, T, ...]; tokens before the first of the sequence are zeros.
        """
        moving = [name for name in tensors if self.cp_group and plans[name].moves]
        own, leaving = {}, []
        for name, tensor in tensors.items():
            if name in moving:
                own[name], leaves = plans[name].divide(tensor)
                leaving.append(leaves)
            else:
                own[name] = take(tensor, plans[name].own)
        arriving = self._start(leaving, [plans[name] for name in moving])

        def wait() -> dict[str, torch.Tensor]:
            arrived = dict(zip(moving, arriving(), strict=True))
            return {name: plans[name].answer(own[name], arrived.get(name)) for name in tensors}

        return Pending(wait)

    def gather(self, entries: torch.Tensor, *, codec: Codec | None = None) -> Pending[torch.Tensor]:
        """Start to fetch all ranks' entries.

        Args:
            entries: This rank's [B, n, D].
            codec: Quantizes entries, with or without CP; under CP its codes move.

        Returns:
            [B, R * n, D] in window order, in the dtype of ``entries``.
        """
        if self.cp_group is None:
            return Pending(lambda: quantized(entries, codec) if codec else entries)
        return start_gather(entries, dim=1, group=self.cp_group, overlap=self.overlap, codec=codec)

    def send_back(
        self, rows: torch.Tensor, plan: RowPlan
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Start to return rows [B, C, ...] that were computed for other ranks.

        Returns:
            A function from the rows of this rank's own that it computed itself to all of its own,
            [B, L, ...]; it waits.
        """
        if self.cp_group is None or not plan.moves:
            return lambda own: plan.answer(take(own, plan.own), None)
        arriving = self._start([take(rows, plan.leaving)], [plan])
        return lambda own: plan.answer(take(own, plan.own), arriving()[0])

    def _start(
        self, leaving: list[torch.Tensor], plans: list[RowPlan]
    ) -> Callable[[], Sequence[torch.Tensor]]:
        if self.cp_group is None or not leaving:
            return tuple
        return start_rows(leaving, plans, group=self.cp_group, overlap=self.overlap)
