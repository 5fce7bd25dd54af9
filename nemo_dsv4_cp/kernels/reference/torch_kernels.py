"""The torch path as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`."""

# B batch rows   L local queries   N heads   D head_dim   T raw keys   P entries   K chosen entries
# I index heads   F index width   r rotary dims

from __future__ import annotations

import torch

from nemo_dsv4_cp.kernels.reference.attention import sparse_attention
from nemo_dsv4_cp.kernels.reference.index_choice import choose_entries
from nemo_dsv4_cp.kernels.reference.rotary import norm_and_rotate, rotate_back_
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan


class TorchKernels:
    """Operations of torch in chunks, on any device."""

    def __init__(self, *, workspace_bytes: int) -> None:
        """Remember how much one chunk of scores or of float32 rows may take."""
        self.workspace_bytes = workspace_bytes

    def norm_and_rotate(
        self, x_BLND: torch.Tensor, cos_BLr: torch.Tensor, sin_BLr: torch.Tensor, *, eps: float
    ) -> torch.Tensor:
        """RMS-normalise each head without weight, then rotate its last r dims."""
        return norm_and_rotate(
            x_BLND, cos_BLr, sin_BLr, eps=eps, workspace_bytes=self.workspace_bytes
        )

    def rotate_back_(
        self, x_BLND: torch.Tensor, cos_BLr: torch.Tensor, sin_BLr: torch.Tensor
    ) -> torch.Tensor:
        """Undo the rotation of the last r dims, in place."""
        return rotate_back_(x_BLND, cos_BLr, sin_BLr, workspace_bytes=self.workspace_bytes)

    def choose_entries(
        self,
        q_BLIF: torch.Tensor,
        weights_BLI: torch.Tensor,
        keys_BPF: torch.Tensor,
        *,
        layout: SequenceLayout,
        ratio: int,
        topk: int,
    ) -> torch.Tensor:
        """Return the ``topk`` best of the entries that each query may see."""
        return choose_entries(
            q_BLIF,
            weights_BLI,
            keys_BPF,
            layout=layout,
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
        *,
        plan: AttentionPlan,
        scale: float,
    ) -> torch.Tensor:
        """Attend to the window and to entries, all that are past or the chosen."""
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
