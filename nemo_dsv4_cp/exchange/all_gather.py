"""Miles-style transport: every rank receives every token.

# B batch rows   L local tokens   S global tokens   F features
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from nemo_dsv4_cp.exchange.collectives import Group, all_gather
from nemo_dsv4_cp.exchange.transport import LeftContext
from nemo_dsv4_cp.sequence.layout import SequenceLayout


class AllGatherTransport:
    """Gathers whole tensors, as AutoModel's own path does: simple, and linear in S."""

    def __init__(self, cp_group: Group | None, layout: SequenceLayout) -> None:
        """Bind the CP group (None without CP) and the positions of this step."""
        self.cp_group = cp_group
        self.layout = layout

    def left_context(
        self, tensors: Sequence[torch.Tensor], tokens: Sequence[int]
    ) -> list[LeftContext]:
        """Return each tensor [B, L, F] as [B, H + S, F], H the zero rows asked for before token 0.

        Args:
            tensors: Per-token tensors of this rank.
            tokens: H of each: how many tokens before the shard must be addressable.
        """
        return [
            LeftContext(
                pad(all_gather(tensor, dim=1, cp_group=self.cp_group), (0, 0, before, 0)),
                first=-before,
            )
            if before
            else LeftContext(tensor, first=self.layout.start)
            for tensor, before in zip(tensors, tokens, strict=True)
        ]

    def gather_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Return all ranks' entries [B, R * n, D] in window order."""
        return all_gather(entries, dim=1, cp_group=self.cp_group)
