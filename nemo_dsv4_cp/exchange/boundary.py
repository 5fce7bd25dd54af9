"""Boundary transport: only rows that are wanted move, only finished entries are all-gathered."""

# B batch rows   L local tokens   D entry width   n local entries

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_dsv4_cp.exchange.collectives import Group
from nemo_dsv4_cp.exchange.gather import start_gather
from nemo_dsv4_cp.exchange.in_flight import Pending
from nemo_dsv4_cp.exchange.rows import start_exchange
from nemo_dsv4_cp.sequence.transfers import Transfers


class BoundaryTransport:
    """Sends each rank the rows that it lacks and nothing else."""

    def __init__(self, cp_group: Group | None, *, overlap: bool) -> None:
        """Bind the CP group (None without CP)."""
        self.cp_group, self.overlap = cp_group, overlap

    def fetch(
        self, tensors: Sequence[torch.Tensor], transfers: Sequence[Transfers]
    ) -> Pending[list[torch.Tensor]]:
        """Start to fetch what is wanted of each tensor [B, L, ...], in one exchange for all."""
        wait = start_exchange(tensors, transfers, cp_group=self.cp_group, overlap=self.overlap)
        return Pending(lambda: wait(tensors))

    def gather_entries(self, entries: torch.Tensor) -> Pending[torch.Tensor]:
        """Start to fetch all ranks' entries [B, R * n, D] in window order."""
        return start_gather(entries, dim=1, cp_group=self.cp_group, overlap=self.overlap)
