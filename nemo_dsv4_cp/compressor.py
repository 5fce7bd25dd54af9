"""Windows of tokens -> compressed entries, with the parameters of the host's compressor.

An entry pools the r tokens of its window; with overlap (ratio 4) also the r tokens before, which
for a shard's first window live on the rank before.
"""

# B batch rows   L local tokens   n local windows   r compress ratio   D entry width   E hidden

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.host.deepseek_v4 import apply_partial_rope
from nemo_dsv4_cp.layout import SequenceLayout
from nemo_dsv4_cp.transport.base import LeftContext


def window_features(module: Any, hidden_BLE: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Project tokens to what pooling needs: values and gate logits, float32.

    Args:
        module: The host's ``DeepseekV4Compressor`` or ``DeepseekV4Indexer``: its ``wkv``, ``wgate``
            and ``ape_param`` are called as modules, since FSDP2 shards each on its own.
        hidden_BLE: Local hidden states.
        layout: Positions of this rank's tokens.

    Returns:
        [B, n * r, 2 * F], values then gates, F = D, or 2D with overlap. Tokens that fill no window
        are left out.
    """
    ratio = module.compress_ratio
    windows = layout.windows(ratio)
    hidden = hidden_BLE[:, : len(windows) * ratio].float()
    gates = module.wgate(hidden)
    # The gate's bias depends on the place in the window only.
    gates = gates + module.ape_param(hidden).repeat(len(windows), 1)
    return torch.cat((module.wkv(hidden), gates), dim=-1)


def overlap_half(module: Any, features: torch.Tensor) -> torch.Tensor:
    """Return the part of the features that the next window pools too, where windows overlap.

    The first D of the 2D value and gate features (host ``_overlap_transform``): [B, n * r, 2 * D].
    """
    values, _, gates, _ = features.split(module.head_dim, dim=-1)
    return torch.cat((values, gates), dim=-1)


def pool_windows(
    module: Any,
    features: torch.Tensor,
    overlap: LeftContext | None,
    layout: SequenceLayout,
    rotary: Any,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Pool this rank's windows into entries: softmax-gated sum, RMSNorm, rotary at w * r.

    The formula is the host's ``_pool_windows`` and ``DeepseekV4Compressor.forward``.

    Args:
        module: As for :func:`window_features`.
        features: From :func:`window_features`.
        overlap: :func:`overlap_half` with at least r tokens before the shard; None without overlap.
        layout: Positions of this rank's tokens.
        rotary: The host's compressor rotary embedding.
        dtype: Activation dtype, taken on before the norm.

    Returns:
        [B, n, D] of ``dtype``.
    """
    ratio, width = module.compress_ratio, module.head_dim
    windows = layout.windows(ratio)
    batch = features.shape[0]
    values, gates = features.unflatten(1, (len(windows), ratio)).chunk(2, dim=-1)
    if overlap is not None and len(windows):
        first, last = windows.start * ratio, windows.stop * ratio
        before = overlap.rows(first - ratio, last - ratio).unflatten(1, (len(windows), ratio))
        values_before, gates_before = before.split(width, dim=-1)
        if windows.start == 0:  # the first window of a document has no predecessor
            nothing = torch.full_like(gates_before[:, :1], -torch.inf)
            gates_before = torch.cat((nothing, gates_before[:, 1:]), dim=1)
        values = torch.cat((values_before, values[..., width:]), dim=2)
        gates = torch.cat((gates_before, gates[..., width:]), dim=2)
    elif overlap is not None:
        values, gates = values[..., width:], gates[..., width:]
    pooled = (values * gates.softmax(dim=2)).sum(dim=2)
    entries = module.kv_norm(pooled.to(dtype))
    starts = torch.arange(windows.start, windows.stop, device=entries.device) * ratio
    cos, sin = rotary(entries, starts.expand(batch, -1))
    rotated: torch.Tensor = apply_partial_rope(entries, cos, sin, module.rope_head_dim)
    return rotated
