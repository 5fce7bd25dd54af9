"""Windows of tokens -> compressed entries, with the parameters of the host's compressor.

An entry pools the r tokens of its window; with overlap (ratio 4) also the r tokens before them, of
the same document. Either may lie on the ranks before.
"""

# B batch rows   L local tokens   n local windows   r compress ratio   D entry width   E hidden

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.exchange.transport import LeftContext
from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.sequence.layout import Windows


def window_features(module: Any, hidden_BLE: torch.Tensor) -> torch.Tensor:
    """Project tokens to what pooling needs: values and gate logits, float32.

    Args:
        module: The host's ``DeepseekV4Compressor`` or ``DeepseekV4Indexer``: its ``wkv``, ``wgate``
            and ``ape_param`` are called as modules, since FSDP2 shards each on its own.
        hidden_BLE: Local hidden states.

    Returns:
        [B, L, 2 * F], values then gates, F = D, or 2D with overlap.
    """
    hidden = hidden_BLE.float()
    return torch.cat((module.wkv(hidden), module.wgate(hidden)), dim=-1)


def overlap_half(module: Any, features: torch.Tensor) -> torch.Tensor:
    """Return the part of the features that the next window pools too, where windows overlap.

    The first D of the 2D value and gate features (host ``_overlap_transform``): [B, L, 2 * D].
    """
    values, _, gates, _ = features.split(module.head_dim, dim=-1)
    return torch.cat((values, gates), dim=-1)


def pool_windows(
    module: Any,
    features: LeftContext,
    overlap: LeftContext | None,
    windows: Windows,
    rotary: Any,
    dtype: torch.dtype,
    kernels: Kernels,
) -> torch.Tensor:
    """Pool this rank's windows into entries: softmax-gated sum, RMSNorm, rotary at w * r.

    The formula is the host's ``_pool_windows`` and ``DeepseekV4Compressor.forward``.

    Args:
        module: As for :func:`window_features`.
        features: :func:`window_features`, with the tokens before the shard that windows straddle.
        overlap: :func:`overlap_half`, with r tokens more; None without overlap.
        windows: What to pool.
        rotary: The host's compressor rotary embedding.
        dtype: Activation dtype, taken on before the norm.
        kernels: What rotates.

    Returns:
        [B, n, D] of ``dtype``.
    """
    ratio, width = module.compress_ratio, module.head_dim
    batch = features.tensor.shape[0]
    values, gates = _tokens(features, windows).chunk(2, dim=-1)
    # The gate's bias depends on the place in the window only.
    bias = module.ape_param(features.tensor)
    gates = gates + bias
    if overlap is not None:
        values, gates = values[..., width:], gates[..., width:]
        if len(windows):
            before = _tokens(overlap, windows, earlier=ratio)
            values_before, gates_before = before.split(width, dim=-1)
            # the first window of a document has no predecessor
            first = (windows.places == 0)[..., None, None]
            gates_before = (gates_before + bias[..., :width]).masked_fill(first, -torch.inf)
            values = torch.cat((values_before, values), dim=2)
            gates = torch.cat((gates_before, gates), dim=2)
    pooled = (values * gates.softmax(dim=2)).sum(dim=2)
    entries = module.kv_norm(pooled.to(dtype))
    return kernels.rotate(entries, rotary(entries, windows.places.expand(batch, -1)))


def _tokens(context: LeftContext, windows: Windows, earlier: int = 0) -> torch.Tensor:
    """Return the features of each window's tokens, or of those ``earlier`` ones: [B, n, r, F]."""
    ratio = windows.ratio
    if windows.gapless_from is not None:
        begin = windows.gapless_from - earlier
        rows = context.rows(begin, begin + len(windows) * ratio)
        cut: torch.Tensor = rows.unflatten(1, (len(windows), ratio))
        return cut
    batch, length, width = context.tensor.shape
    within = torch.arange(ratio, device=context.tensor.device) - earlier - context.first
    rows_of_batch = torch.arange(batch, device=context.tensor.device)[:, None, None] * length
    index = windows.starts[..., None] + within + rows_of_batch
    picked = context.tensor.flatten(0, 1).index_select(0, index.flatten())
    return picked.view(*index.shape, width)
