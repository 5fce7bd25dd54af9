"""What a transport answers: the tokens left of the shard, and all ranks' compressed entries.

# B batch rows   L local tokens   R CP ranks   H left-context tokens   P entries (S / ratio)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_dsv4_cp.exchange.collectives import Group
from nemo_dsv4_cp.sequence.layout import SequenceLayout


@dataclass(frozen=True)
class LeftContext:
    """A per-token tensor, extended to the left by other ranks' tokens.

    Attributes:
        tensor: [B, T, F]; this rank's own L tokens and what the transport fetched around them.
        first: Global position of row 0. Rows before token 0 are zeros, so it may be negative.
    """

    tensor: torch.Tensor
    first: int

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Return the tokens at global positions [begin, end) as a view."""
        return self.tensor[:, begin - self.first : end - self.first]


class Transport(Protocol):
    """How a rank sees beyond its own shard. Both calls are collective and differentiable."""

    def __init__(self, cp_group: Group | None, layout: SequenceLayout) -> None:
        """Bind the CP group (None without CP) and the positions of this step."""

    def left_context(
        self, tensors: Sequence[torch.Tensor], tokens: Sequence[int]
    ) -> list[LeftContext]:
        """Extend each tensor [B, L, F] by at least ``tokens`` many tokens before the shard.

        A tensor of which 0 are asked stays as it is.
        """

    def gather_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Return all ranks' entries [B, R * n, D] in window order, from this rank's [B, n, D]."""
