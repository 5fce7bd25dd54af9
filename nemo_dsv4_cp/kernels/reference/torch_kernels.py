# SPDX-License-Identifier: Apache-2.0
"""The torch path as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`."""

# B batch rows   L queries   N heads   D head_dim   T raw keys   P entries   K chosen entries
# I index heads   F index width   r rotary dims

from __future__ import annotations

import torch

from nemo_dsv4_cp.kernels.protocol import Rope
from nemo_dsv4_cp.kernels.reference.attention import sparse_attention
from nemo_dsv4_cp.kernels.reference.index_choice import choose_entries
from nemo_dsv4_cp.kernels.reference.rotary import norm_and_rotate, rotate_
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries


class TorchKernels:
    """Operations of torch in chunks, on any device."""

    def __init__(self, *, workspace_bytes: int) -> None:
        """Remember how much one chunk of scores or of float32 rows may take.

        Half of what an operation may: a result and what it is made of are there together.
        """
        self.workspace_bytes = workspace_bytes // 2

    def rotate(self, x_BLD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Return keys or entries with their last r dims rotated."""
        rows = x_BLD.unsqueeze(2).clone()
        return rotate_(rows, *rope, workspace_bytes=self.workspace_bytes).squeeze(2)

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
        """Rotate index queries and return the ``topk`` best of the entries that each may see."""
        return choose_entries(
            rotate_(q_BLIF, *rope, workspace_bytes=self.workspace_bytes),
            weights_BLI,
            keys_BPF,
            queries=queries,
            ratio=ratio,
            topk=topk,
            workspace_bytes=self.workspace_bytes,
        )

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
        """Attend to the window and to entries, all that are past or the chosen."""
        workspace, (cos, sin) = self.workspace_bytes, rope
        q_BLND = norm_and_rotate(q_BLND, cos, sin, eps=eps, workspace_bytes=workspace)
        out_BLND = self._attend_rotated(
            q_BLND, raw_BTD, entries_BPD, sinks_N, chosen_BLK, plan=plan, scale=scale
        )
        out_BLND = rotate_(out_BLND, cos, -sin, workspace_bytes=workspace)
        return out_BLND.view(*out_BLND.shape[:2], groups, -1)

    def _attend_rotated(
        self,
        q_BLND: torch.Tensor,
        raw_BTD: torch.Tensor,
        entries_BPD: torch.Tensor,
        sinks_N: torch.Tensor,
        chosen_BLK: torch.Tensor | None,
        *,
        plan: AttentionPlan,
        scale: float,
    ) -> torch.Tensor:
        return sparse_attention(
            q_BLND,
            raw_BTD,
            entries_BPD,
            sinks_N,
            chosen_BLK,
            plan,
            scale=scale,
            workspace_bytes=self.workspace_bytes,
        )
