# SPDX-License-Identifier: Apache-2.0
"""What attention asks of the device: three operations, each with or without kernels behind it."""

# B batch rows   L queries   N heads   D head_dim   T raw keys   P entries   K chosen entries
# I index heads   F index width   r rotary dims   G groups of heads

from __future__ import annotations

from typing import Protocol

import torch

from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cos and sin from AutoModel's rotary embedding, [B, L, r] each: the r / 2 angles, twice."""


class Kernels(Protocol):
    """One way to compute a layer's attention, found in ``nemo_dsv4_cp.kernels`` by its name.

    It sees this rank's tensors and positions only: nothing of process groups, nothing of modules.
    """

    def __init__(self, *, workspace_bytes: int) -> None:
        """Make ready for a layer.

        Args:
            workspace_bytes: How much scratch an operation may take at a time.

        Raises:
            ValueError: If it cannot run here, with what to use instead.
        """

    def rotate(self, x_BLD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Return keys or entries with their last r dims rotated; differentiable."""

    def choose_entries(
        self,
        q_BLIF: torch.Tensor,
        weights_BLI: torch.Tensor,
        keys_BPF: torch.Tensor,
        rope: Rope,
        *,
        queries: Queries,
        ratio: int,
        topk: int,
    ) -> torch.Tensor:
        """Rotate index queries and return the ``topk`` best of the entries that each may see.

        A score is the sum over heads of weight * relu(q . k), in float32; equal scores go to the
        earlier entry. The queries' memory may be written over.

        Returns:
            Int32 [B, L, min(topk, P)], ``NOTHING`` in unused slots, which come last; no gradient.
        """

    def attend(
        self,
        q_BLND: torch.Tensor,
        raw_BTD: torch.Tensor,
        entries_BPD: torch.Tensor,
        sinks_N: torch.Tensor,
        chosen_BLK: torch.Tensor | None,
        rope: Rope,
        *,
        plan: AttentionPlan,
        scale: float,
        eps: float,
        groups: int,
    ) -> torch.Tensor:
        """Attend to the window and to entries, all that are past or the chosen; differentiable.

        Each head of the queries is first RMS-normalised without weight and its last r dims are
        rotated; the output's are rotated back.

        Args:
            q_BLND: Queries as projected.
            raw_BTD: Raw keys (= values), rotated, in the order of :func:`raw_tokens`.
            entries_BPD: Entries in the order that the layout counts them; P may be 0.
            sinks_N: Logit per head of the sink, which takes probability and adds nothing.
            chosen_BLK: Entries that each query attends to, as :meth:`choose_entries` returns them;
                None means all that it may see.
            rope: Angles of the queries' positions.
            plan: Which keys each query sees.
            scale: Score multiplier.
            eps: Added to the mean square of the norm.
            groups: How many groups the output projection takes the heads in.

        Returns:
            [B, L, G, N / G * D] of the queries' dtype.
        """
