# SPDX-License-Identifier: Apache-2.0
"""What CSA's choice goes by: index queries and head weights, by AutoModel's indexer.

The choice itself, which past entries each query attends to, is the kernels'; it has no gradient.
"""

# B batch rows   L tokens   I index heads   D index width

from __future__ import annotations

from typing import Any

import torch


def index_queries(indexer: Any, q_residual: torch.Tensor) -> torch.Tensor:
    """Project low-rank queries [B, L, q_lora_rank] to index queries [B, L, I, D]."""
    batch, length = q_residual.shape[:2]
    queries: torch.Tensor = indexer.wq_b(q_residual)
    return queries.view(batch, length, indexer.n_heads, indexer.head_dim)


def head_weights(indexer: Any, hidden_BLE: torch.Tensor) -> torch.Tensor:
    """Return each head's weight of a token's scores, their scale in it: float32 [B, L, I].

    The formula is that of AutoModel's ``DeepseekV4Indexer.forward``.
    """
    scale: float = indexer.n_heads**-0.5 * indexer.softmax_scale
    weights: torch.Tensor = indexer.weights_proj(hidden_BLE).float()
    return weights * scale
