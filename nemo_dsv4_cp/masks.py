"""The seed's dense mask: a reference for tests and for callers of the seed's API.

Training never builds it: at S = 1M on 64 ranks it alone would take 160 GiB a GPU.
"""

# B batch rows   L local queries   S global keys

from __future__ import annotations

import torch

from nemo_dsv4_cp.collectives import Group, all_gather_metadata


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
    if padding_mask is not None:
        pad_keys = all_gather_metadata(padding_mask, dim=1, cp_group=cp_group)
        allowed = allowed & ~pad_keys.to(device=device, dtype=torch.bool)[:, None]
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
    return torch.where(allowed[:, None], torch.zeros_like(blocked), blocked)
