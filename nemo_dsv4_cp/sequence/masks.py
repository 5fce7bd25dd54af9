# SPDX-License-Identifier: Apache-2.0
"""Dense masks of the seed's API: a reference for tests, and for callers of that API.

Training never builds them: at S = 1M on 64 ranks one alone would take 160 GiB a GPU.
"""

# B batch rows   L local queries   S global keys

from __future__ import annotations

import torch


def causal_padding_mask(
    queries_BL: torch.Tensor,
    key_len: int,
    pad_keys_BS: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return the additive mask of local queries against global keys in sequence order.

    Args:
        queries_BL: Global positions of the local queries, int.
        key_len: S.
        pad_keys_BS: Bool, True = pad; pad keys are masked out.
        dtype: Floating dtype of the mask.
        sliding_window: W; a query sees the W keys that end with its own. None: all before it.

    Returns:
        [B, 1, L, S] of ``dtype``: 0 where a query may look, ``torch.finfo(dtype).min`` elsewhere.
    """
    queries = queries_BL.long()[:, :, None]
    keys = torch.arange(key_len, device=queries.device)
    allowed = keys <= queries
    if sliding_window is not None:
        allowed = allowed & (queries - keys < sliding_window)
    return _additive(allowed, pad_keys_BS, dtype)


def packed_causal_padding_mask(
    query_positions_BL: torch.Tensor,
    query_documents_BL: torch.Tensor,
    key_positions_BS: torch.Tensor,
    key_documents_BS: torch.Tensor,
    pad_keys_BS: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return the additive mask of packed rows: queries see their own document's past.

    Args:
        query_positions_BL: Document positions of the local queries, int64.
        query_documents_BL: Their document numbers, int64; 0 sees nothing.
        key_positions_BS: Document positions of all keys.
        key_documents_BS: Their document numbers.
        pad_keys_BS: Bool, True = pad; pad keys are masked out.
        dtype: Floating dtype of the mask.
        sliding_window: W; a query sees the W keys that end with its own. None: all before it.

    Returns:
        [B, 1, L, S] as :func:`causal_padding_mask` does.
    """
    back = query_positions_BL[:, :, None] - key_positions_BS[:, None]
    same = query_documents_BL[:, :, None] == key_documents_BS[:, None]
    allowed = same & (query_documents_BL > 0)[:, :, None] & (back >= 0)
    if sliding_window is not None:
        allowed = allowed & (back < sliding_window)
    return _additive(allowed, pad_keys_BS, dtype)


def _additive(
    allowed_BLS: torch.Tensor, pad_keys_BS: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if pad_keys_BS is not None:
        allowed_BLS = allowed_BLS & ~pad_keys_BS.to(allowed_BLS.device).bool()[:, None]
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed_BLS.device)
    return torch.where(allowed_BLS[:, None], torch.zeros_like(blocked), blocked)
