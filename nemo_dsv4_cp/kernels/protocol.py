"""What attention asks of the device: four operations, each with or without a kernel behind it."""

# B batch rows   L local queries   N heads   D head_dim   T raw keys   P entries   K chosen entries
# I index heads   F index width   r rotary dims

from __future__ import annotations

from typing import Protocol

import torch

from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan


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

    def norm_and_rotate(
        self, x_BLND: torch.Tensor, cos_BLr: torch.Tensor, sin_BLr: torch.Tensor, *, eps: float
    ) -> torch.Tensor:
        """RMS-normalise each head without weight, then rotate its last r dims; differentiable."""

    def rotate_back_(
        self, x_BLND: torch.Tensor, cos_BLr: torch.Tensor, sin_BLr: torch.Tensor
    ) -> torch.Tensor:
        """Undo the rotation of the last r dims, in place where it likes; differentiable."""

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
        """Return the ``topk`` best of the entries that each query may see.

        A score is the sum over heads of weight * relu(q . k), in float32; equal scores go to the
        earlier entry.

        Returns:
            Int32 [B, L, min(topk, P)], ``NOTHING`` in unused slots; no gradient.
        """

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
        """Attend to the window and to entries, all that are past or the chosen; differentiable.

        Returns:
            [B, L, N, D] of the queries' dtype.
        """
