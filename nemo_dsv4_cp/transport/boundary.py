"""Boundary transport: neighbours exchange a halo, only finished entries are all-gathered."""

# B batch rows   L local tokens   H halo tokens   F features   D entry width   n local entries

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_dsv4_cp.collectives import Group, Transfers, all_gather, exchange_left
from nemo_dsv4_cp.layout import SequenceLayout
from nemo_dsv4_cp.transport.base import LeftContext


class BoundaryTransport:
    """Moves what attention needs and no more (DeepSeek-V4 report, context parallelism).

    A halo longer than a shard comes from further neighbours too.
    """

    def __init__(self, cp_group: Group | None, layout: SequenceLayout) -> None:
        """Bind the CP group (None without CP) and the positions of this step."""
        self.cp_group = cp_group
        self.layout = layout

    def left_context(
        self, tensors: Sequence[torch.Tensor], tokens: Sequence[int]
    ) -> list[LeftContext]:
        """Return each tensor [B, L, F] as [B, H + L, F], in one exchange for all of them.

        Args:
            tensors: Per-token tensors of this rank.
            tokens: H of each: how many tokens before the shard must be addressable.
        """
        layout, ranks = self.layout, range(self.layout.cp_size)
        transfers = [
            Transfers(
                send=[layout.halo_to(rank, before) for rank in ranks],
                receive=[layout.halo_from(rank, before) for rank in ranks],
                length=before,
            )
            for before in tokens
        ]
        halos = exchange_left(tensors, transfers, cp_group=self.cp_group)
        return [
            LeftContext(torch.cat((halo, tensor), dim=1), first=layout.start - before)
            for halo, tensor, before in zip(halos, tensors, tokens, strict=True)
        ]

    def gather_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Return all ranks' entries [B, R * n, D] in window order."""
        return all_gather(entries, dim=1, cp_group=self.cp_group)
