"""What CSA's choice goes by: index queries and head weights, by the host's indexer.

The choice itself, which past entries each query attends to, is the kernels'; it has no gradient.
"""

# B batch rows   L local queries   I index heads   D index width   P entries   K chosen entries

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout


def select_entries(
    indexer: Any,
    hidden_BLE: torch.Tensor,
    q_residual: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    index_keys_BPD: torch.Tensor,
    layout: SequenceLayout,
    kernels: Kernels,
) -> torch.Tensor:
    """Choose the ``index_topk`` best entries of each query (host ``DeepseekV4Indexer.forward``).

    Args:
        indexer: The host's ``DeepseekV4Indexer``.
        hidden_BLE: Local hidden states.
        q_residual: Normalised low-rank queries [B, L, q_lora_rank].
        position_embeddings: Cos and sin of the local positions, each [B, L, rope_head_dim].
        index_keys_BPD: Index keys of all ranks' entries.
        layout: Positions of this rank's tokens.
        kernels: What scores and ranks.

    Returns:
        Int32 [B, L, min(index_topk, P)]: entry indices, ``NOTHING`` in unused slots.
    """
    batch, length = hidden_BLE.shape[:2]
    heads = indexer.n_heads
    q_BLID = indexer.wq_b(q_residual).view(batch, length, heads, indexer.head_dim)
    weights_BLI = indexer.weights_proj(hidden_BLE).float() * heads**-0.5
    return kernels.choose_entries(
        q_BLID,
        weights_BLI * indexer.softmax_scale,
        index_keys_BPD,
        position_embeddings,
        layout=layout,
        ratio=indexer.compress_ratio,
        topk=indexer.index_topk,
    )
