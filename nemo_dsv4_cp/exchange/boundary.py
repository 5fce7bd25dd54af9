"""Boundary transport: neighbours exchange a halo, only finished entries are all-gathered."""

# B batch rows   L local tokens   H halo tokens   F features   D entry width   n local entries

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_dsv4_cp.exchange.collectives import Group, Transfers, all_gather, exchange_left
from nemo_dsv4_cp.exchange.transport import LeftContext
from nemo_dsv4_cp.sequence.layout import SequenceLayout


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
        asked = [i for i, before in enumerate(tokens) if before]
        transfers = [
            Transfers(
                send=[layout.halo_to(rank, tokens[i]) for rank in ranks],
                receive=[layout.halo_from(rank, tokens[i]) for rank in ranks],
                length=tokens[i],
            )
            for i in asked
        ]
        if not asked:
            return [LeftContext(tensor, first=layout.start) for tensor in tensors]
        halos = exchange_left([tensors[i] for i in asked], transfers, cp_group=self.cp_group)
        contexts = [LeftContext(tensor, first=layout.start) for tensor in tensors]
        for i, halo in zip(asked, halos, strict=True):
            extended = torch.cat((halo, tensors[i]), dim=1)
            contexts[i] = LeftContext(extended, first=layout.start - tokens[i])
        return contexts

    def gather_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Return all ranks' entries [B, R * n, D] in window order."""
        return all_gather(entries, dim=1, cp_group=self.cp_group)
