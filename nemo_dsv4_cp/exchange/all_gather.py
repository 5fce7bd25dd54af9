"""Miles-style transport: every rank receives every token.

# B batch rows   L local tokens   S global tokens   T tokens of an answer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_dsv4_cp.exchange.collectives import Group
from nemo_dsv4_cp.exchange.gather import start_gather
from nemo_dsv4_cp.exchange.in_flight import Pending
from nemo_dsv4_cp.exchange.rows import unmoved
from nemo_dsv4_cp.sequence.queries import Runs
from nemo_dsv4_cp.sequence.transfers import Transfers


class AllGatherTransport:
    """Gathers whole tensors, as AutoModel's own path does: simple, and linear in S."""

    def __init__(self, cp_group: Group | None, *, overlap: bool) -> None:
        """Bind the CP group (None without CP)."""
        self.cp_group, self.overlap = cp_group, overlap

    def fetch(
        self, tensors: Sequence[torch.Tensor], transfers: Sequence[Transfers]
    ) -> Pending[list[torch.Tensor]]:
        """Start to gather each tensor [B, L, ...] once, and take of [B, S, ...] what is wanted."""
        asked = list(zip(tensors, transfers, strict=True))
        moving = {id(tensor): tensor for tensor, transfer in asked if transfer.any_moves}
        gathers = {name: self.gather_entries(tensor) for name, tensor in moving.items()}

        def wait() -> list[torch.Tensor]:
            whole = {name: gather.wait() for name, gather in gathers.items()}
            return [
                _tokens(whole[id(tensor)], transfer.wanted)
                if transfer.any_moves
                else unmoved(transfer, tensor)
                for tensor, transfer in asked
            ]

        return Pending(wait)

    def gather_entries(self, entries: torch.Tensor) -> Pending[torch.Tensor]:
        """Start to fetch all ranks' entries [B, R * n, D] in window order."""
        return start_gather(entries, dim=1, cp_group=self.cp_group, overlap=self.overlap)


def _tokens(whole_BSF: torch.Tensor, wanted: Runs) -> torch.Tensor:
    """Return tokens of whole rows in the order wanted, zeros before the first: [B, T, ...]."""
    parts = []
    for run in wanted:
        if run.start < 0:
            missing = min(run.stop, 0) - run.start
            parts.append(whole_BSF.new_zeros(whole_BSF.shape[0], missing, *whole_BSF.shape[2:]))
        parts.append(whole_BSF[:, max(run.start, 0) : max(run.stop, 0)])
    return torch.cat(parts, dim=1) if parts else whole_BSF[:, :0]
