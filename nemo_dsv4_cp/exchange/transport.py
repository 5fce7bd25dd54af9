# SPDX-License-Identifier: Apache-2.0
"""What moves between ranks, in three verbs: fetch rows, gather entries, send rows back."""

# B batch rows   L local tokens   R CP ranks   T rows of an answer   n local entries   D entry width

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_dsv4_cp.exchange.collectives import Group
from nemo_dsv4_cp.exchange.gather import start_gather
from nemo_dsv4_cp.exchange.in_flight import Pending
from nemo_dsv4_cp.exchange.rows import RowsInFlight
from nemo_dsv4_cp.sequence.row_plan import RowPlan


class Transport:
    """How a rank sees beyond its own shard. All verbs are collective and differentiable.

    A transport of its own overrides what it does in another way. It is found by its name in the
    entry-point group ``nemo_dsv4_cp.transports``.
    """

    def __init__(self, cp_group: Group | None, *, overlap: bool) -> None:
        """Bind the CP group.

        Args:
            cp_group: Who takes part; None without CP.
            overlap: Whether collectives run behind what is computed until they are waited for.
        """
        self.cp_group, self.overlap = cp_group, overlap

    def fetch(
        self, tensors: Mapping[str, torch.Tensor], plans: Mapping[str, RowPlan]
    ) -> Pending[dict[str, torch.Tensor]]:
        """Start to fetch, of each tensor [B, L, ...], the rows that its plan wants.

        Returns:
            Of each its answer [B, T, ...]; tokens before the row's first are zeros.
        """
        rows = RowsInFlight(tensors, plans, cp_group=self.cp_group, overlap=self.overlap)
        return Pending(rows.wait)

    def gather(self, entries: torch.Tensor) -> Pending[torch.Tensor]:
        """Start to fetch all ranks' entries [B, R * n, D] in window order, from [B, n, D] each."""
        return start_gather(entries, dim=1, cp_group=self.cp_group, overlap=self.overlap)

    def send_back(self, rows: torch.Tensor, plan: RowPlan) -> RowsInFlight:
        """Start to return rows [B, C, ...] that were computed for other ranks.

        Returns:
            What waits for this rank's own, given those that it computed itself, as ``rows``.
        """
        return RowsInFlight(
            {"rows": rows},
            {"rows": plan},
            cp_group=self.cp_group,
            overlap=self.overlap,
            returned=True,
        )
