"""The seed's dense masks: a reference for tests and for callers of the seed's API.

Training never builds them: at S = 1M on 64 ranks one alone would take 160 GiB a GPU.
"""

# B batch rows   L local queries   S global keys

from __future__ import annotations

import torch

from nemo_dsv4_cp.exchange.collectives import Group, all_gather_metadata


def build_dsv4_cp_causal_padding_mask(
    *,
    position_ids: torch.Tensor,
    key_len: int,
    dtype: torch.dtype,
    device: torch.device,
    cp_group: Group | None,
    padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Build the additive mask of local queries against global keys in sequence order.

    Args:
        position_ids: Global positions of the local queries, int [B, L] or [L].
        key_len: S, number of global keys.
        dtype: Floating dtype of the mask.
        device: Device of the mask.
        cp_group: CP group that ``padding_mask`` is gathered over; None without CP.
        padding_mask: This rank's bool [B, L], True = pad; pad keys are masked out.
        sliding_window: W; a query sees the W keys that end with its own. None or 0: all before it.

    Returns:
        [B, 1, L, S] of ``dtype``: 0 where a query may look, ``torch.finfo(dtype).min`` elsewhere.
    """
    queries = torch.atleast_2d(position_ids).to(device=device, dtype=torch.long)[:, :, None]
    keys = torch.arange(key_len, device=device)
    allowed = keys <= queries
    if sliding_window is not None:
        allowed = allowed & (queries - keys < sliding_window)
    return _additive(_without_padding(allowed, padding_mask, cp_group), dtype, device)


def build_dsv4_cp_packed_causal_padding_mask(
    *,
    position_ids: torch.Tensor,
    packed_seq_ids: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    cp_group: Group | None,
    padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Build the additive mask of packed rows: queries see their own document's past.

    Args:
        position_ids: Document positions of the local queries, int [B, L] or [L].
        packed_seq_ids: This rank's document numbers, int [B, L] or [L]; 0 sees nothing.
        dtype: Floating dtype of the mask.
        device: Device of the mask.
        cp_group: CP group that the three tensors are gathered over; None without CP.
        padding_mask: This rank's bool [B, L], True = pad; pad keys are masked out.
        sliding_window: W; a query sees the W keys that end with its own. None: all before it.

    Returns:
        [B, 1, L, S] of ``dtype``: 0 where a query may look, ``torch.finfo(dtype).min`` elsewhere.
    """
    positions = torch.atleast_2d(position_ids).to(device=device, dtype=torch.long)
    documents = torch.atleast_2d(packed_seq_ids).to(device=device, dtype=torch.long)
    back = positions[:, :, None] - all_gather_metadata(positions, dim=1, cp_group=cp_group)[:, None]
    same = (
        documents[:, :, None] == all_gather_metadata(documents, dim=1, cp_group=cp_group)[:, None]
    )
    allowed = same & (documents > 0)[:, :, None] & (back >= 0)
    if sliding_window is not None:
        allowed = allowed & (back < sliding_window)
    return _additive(_without_padding(allowed, padding_mask, cp_group), dtype, device)


def _without_padding(
    allowed: torch.Tensor, padding_mask: torch.Tensor | None, cp_group: Group | None
) -> torch.Tensor:
    if padding_mask is None:
        return allowed
    pad_keys = all_gather_metadata(padding_mask, dim=1, cp_group=cp_group)
    return allowed & ~pad_keys.to(device=allowed.device, dtype=torch.bool)[:, None]


def _additive(allowed: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
    return torch.where(allowed[:, None], torch.zeros_like(blocked), blocked)
