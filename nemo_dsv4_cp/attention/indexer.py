# SPDX-License-Identifier: Apache-2.0
"""What top-k selection (CSA) reads, from AutoModel's indexer: keys, queries and head weights.

The selection itself is the kernels'. It returns integers, so nothing here has a gradient, and
selective checkpointing saves none of it.
"""

# B batch rows   L tokens   n windows   I index heads   D index width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nemo_dsv4_cp.attention.compressor import pool_windows, window_features
from nemo_dsv4_cp.attention.recompute import unseen_by_checkpointing
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.sequence.windows import Windows


def index_features(
    indexer: Any, hidden_BLE: torch.Tensor, *, overlaps: bool
) -> dict[str, torch.Tensor]:
    """Project tokens to what index keys are pooled from, under names that begin with index_."""
    with torch.no_grad(), unseen_by_checkpointing():
        return window_features(indexer, hidden_BLE, name="index_", overlaps=overlaps)


def pool_index_keys(
    indexer: Any,
    rows: Mapping[str, torch.Tensor],
    windows: Windows,
    rope: Rope,
    dtype: torch.dtype,
    kernels: Kernels,
) -> torch.Tensor:
    """Pool this rank's index keys, [B, n, D], as :func:`pool_windows` pools entries."""
    with torch.no_grad(), unseen_by_checkpointing():
        return pool_windows(indexer, rows, windows, rope, dtype, kernels, name="index_")


def index_queries(indexer: Any, q_residual: torch.Tensor) -> torch.Tensor:
    """Project low-rank queries [B, L, q_lora_rank] to index queries [B, L, I, D]."""
    with torch.no_grad(), unseen_by_checkpointing():
        queries = indexer.wq_b(q_residual)
        heads: torch.Tensor = queries.unflatten(-1, (indexer.n_heads, indexer.head_dim))
        return heads


def head_weights(indexer: Any, hidden_BLE: torch.Tensor) -> torch.Tensor:
    """Return each head's weight of a token's scores, their scale in it: float32 [B, L, I].

    The formula is that of AutoModel's ``DeepseekV4Indexer.forward``.
    """
    scale: float = indexer.n_heads**-0.5 * indexer.softmax_scale
    with torch.no_grad(), unseen_by_checkpointing():
        weights: torch.Tensor = indexer.weights_proj(hidden_BLE).float()
        return weights * scale
