# SPDX-License-Identifier: Apache-2.0
"""The dense mask of AutoModel's CP functions: for callers of that API, and a reference for tests.

Training never builds it: at S = 1M on 64 ranks one alone would take 160 GiB per GPU.
"""

# B batch rows   L local queries   S global keys

from __future__ import annotations

import torch


def causal_padding_mask(
    queries_BL: torch.Tensor,
    keys_BS: torch.Tensor,
    pad_keys_BS: torch.Tensor | None,
    *,
    documents: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return the additive mask of local queries against global keys in sequence order.

    Args:
        queries_BL: Positions of the local queries, int64.
        keys_BS: Positions of all keys; B may be 1.
        pad_keys_BS: Bool, True = pad; pad keys are masked out.
        documents: Document numbers of queries and keys, int64; a query sees the keys of its own,
            and number 0 sees nothing. None: one document per row.
        dtype: Floating dtype of the mask.
        sliding_window: W; a query sees the W keys that end with its own. None: all before it.

    Returns:
        [B, 1, L, S] of ``dtype``: 0 where a query may look, ``torch.finfo(dtype).min`` elsewhere.
    """
    back = queries_BL[:, :, None] - keys_BS[:, None]
    allowed = back >= 0
    if documents is not None:
        of_queries, of_keys = documents[0][:, :, None], documents[1][:, None]
        allowed = allowed & (of_queries == of_keys) & (of_queries > 0)
    if sliding_window is not None:
        allowed = allowed & (back < sliding_window)
    if pad_keys_BS is not None:
        allowed = allowed & ~pad_keys_BS.to(allowed.device).bool()[:, None]
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return torch.where(allowed[:, None], torch.zeros_like(blocked), blocked)
