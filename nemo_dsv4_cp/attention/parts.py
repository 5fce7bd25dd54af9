"""Queries that are attended together, and what attention needs of their tokens."""

# B batch rows   L local tokens   C queries   E hidden   A query rank (q_lora_rank)   N heads
# D head_dim   T raw keys   I index heads   F index width   r rotary dims

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_dsv4_cp.kernels.protocol import Rope
from nemo_dsv4_cp.sequence.queries import Queries


@dataclass
class Tokens:
    """This rank's own tokens, whoever computes their queries.

    Attributes:
        hidden: [B, L, E].
        keys: Rotated raw keys [B, L, D].
        rope: Cos and sin of their positions, [B, L, r] each.
        q_residual: Normalised low-rank queries [B, L, A], None until they are computed.
        index_weights: Float32 [B, L, I], None where nothing is chosen.
    """

    hidden: torch.Tensor
    keys: torch.Tensor
    rope: Rope
    q_residual: torch.Tensor | None = None
    index_weights: torch.Tensor | None = None

    def of_queries(self) -> list[torch.Tensor]:
        """Return what a query's own token brings: low-rank query, cos, sin, index weights."""
        assert self.q_residual is not None, "low-rank queries come first"
        rows = [self.q_residual, *self.rope]
        return rows if self.index_weights is None else [*rows, self.index_weights]


@dataclass
class Part:
    """Some queries, from low-rank query to attention; what is not computed yet is None.

    Attributes:
        queries: Which.
        q_residual: [B, C, A].
        rope: [B, C, r] each.
        index_weights: [B, C, I].
        raw: Raw keys [B, T, D], in the order of the plan.
        q: Projected queries [B, C, N, D].
        q_index: Index queries [B, C, I, F].
    """

    queries: Queries
    q_residual: torch.Tensor
    rope: Rope
    index_weights: torch.Tensor | None = None
    raw: torch.Tensor | None = None
    q: torch.Tensor | None = None
    q_index: torch.Tensor | None = None

    @classmethod
    def of_rows(
        cls, queries: Queries, rows: Sequence[torch.Tensor], raw: torch.Tensor | None = None
    ) -> Part:
        """Make a part of what :meth:`Tokens.of_queries` names, and its raw keys."""
        q_residual, cos, sin, *weights = rows
        return cls(queries, q_residual, (cos, sin), weights[0] if weights else None, raw)

    @classmethod
    def of_own(cls, queries: Queries, tokens: Tokens) -> Part:
        """Make a part of the shard's own queries, some or all."""
        layout = queries.layout
        if queries.runs == (layout.own,):
            return cls.of_rows(queries, tokens.of_queries())
        begins = [(run.start - layout.start, run.stop - layout.start) for run in queries.runs]
        return cls.of_rows(
            queries,
            [
                torch.cat([rows[:, begin:end] for begin, end in begins] or [rows[:, :0]], dim=1)
                for rows in tokens.of_queries()
            ],
        )
