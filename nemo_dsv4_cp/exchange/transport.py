"""What a transport answers: rows of other ranks' tokens, and all ranks' compressed entries."""

# B batch rows   L local tokens   R CP ranks   T tokens of an answer   P entries (S / ratio)

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from nemo_dsv4_cp.exchange.collectives import Group
from nemo_dsv4_cp.exchange.in_flight import Pending
from nemo_dsv4_cp.sequence.transfers import Transfers


class Transport(Protocol):
    """How a rank sees beyond its own shard. Both calls are collective and differentiable."""

    def __init__(self, cp_group: Group | None, *, overlap: bool) -> None:
        """Bind the CP group (None without CP).

        Args:
            cp_group: Who takes part.
            overlap: Whether collectives go on behind what is computed until they are waited for.
        """

    def fetch(
        self, tensors: Sequence[torch.Tensor], transfers: Sequence[Transfers]
    ) -> Pending[list[torch.Tensor]]:
        """Start to fetch, of each tensor [B, L, ...], the tokens that ``transfers`` want.

        Returns:
            Of each its answer [B, T, ...], the tokens of ``wanted`` in their order; those before
            the row's first are zeros.
        """

    def gather_entries(self, entries: torch.Tensor) -> Pending[torch.Tensor]:
        """Start to fetch all ranks' entries [B, R * n, D] in window order, from [B, n, D] each."""
