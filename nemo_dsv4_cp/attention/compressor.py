# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens -> compressed KV entries, with the parameters of AutoModel's compressor.

An entry pools the r tokens of its window; with overlap (ratio 4) also the r tokens before them, of
the same document. Either may lie on the ranks before.
"""

# B batch rows   L local tokens   T L and the tokens fetched before them   n local windows
# r compress ratio   D entry width   E hidden   F feature width: D, 2D with overlap

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.sequence.windows import WindowRows


def window_features(module: Any, hidden_BLE: torch.Tensor) -> torch.Tensor:
    """Project tokens to what pooling needs: values and gate logits, float32.

    Args:
        module: AutoModel's ``DeepseekV4Compressor`` or ``DeepseekV4Indexer``: its ``wkv``,
            ``wgate`` and ``ape_param`` are called as modules, since FSDP2 shards each on its own.
        hidden_BLE: Local hidden states.

    Returns:
        [B, L, 2 * F], values then gates.
    """
    hidden = hidden_BLE.float()
    return torch.cat((module.wkv(hidden), module.wgate(hidden)), dim=-1)


def overlap_half(module: Any, features: torch.Tensor) -> torch.Tensor:
    """Return the part of the features that the next window pools too, where windows overlap.

    The first D of the 2D value and gate features (AutoModel ``_overlap_transform``): [B, L, 2 * D].
    """
    values, _, gates, _ = features.split(module.head_dim, dim=-1)
    return torch.cat((values, gates), dim=-1)


def pool_windows(
    module: Any,
    features_BTF: torch.Tensor,
    overlap_BTF: torch.Tensor | None,
    windows: WindowRows,
    *,
    rope: Rope,
    dtype: torch.dtype,
    kernels: Kernels,
) -> torch.Tensor:
    """Pool this rank's windows into entries: softmax-gated sum, RMSNorm, rotary at w * r.

    The formula is AutoModel's ``_pool_windows`` and ``DeepseekV4Compressor.forward``.

    Args:
        module: As for :func:`window_features`.
        features_BTF: :func:`window_features`, with the tokens before the shard that windows
            straddle.
        overlap_BTF: :func:`overlap_half`, with r tokens more; None without overlap.
        windows: What to pool.
        rope: Cos and sin of the windows' places.
        dtype: Activation dtype, taken on before the norm.
        kernels: What rotates.

    Returns:
        [B, n, D] of ``dtype``.
    """
    width = module.head_dim
    values, gates = windows.tokens(features_BTF).chunk(2, dim=-1)
    # The gate's bias depends on the place in the window only.
    bias = module.ape_param(features_BTF)
    gates = gates + bias
    if overlap_BTF is not None:
        values, gates = values[..., width:], gates[..., width:]
        if len(windows):
            values_before, gates_before = windows.tokens(overlap_BTF).split(width, dim=-1)
            # the first window of a document has no predecessor
            gates_before = gates_before + bias[..., :width]
            gates_before = gates_before.masked_fill(windows.is_first, -torch.inf)
            values = torch.cat((values_before, values), dim=2)
            gates = torch.cat((gates_before, gates), dim=2)
    pooled = (values * gates.softmax(dim=2)).sum(dim=2)
    return kernels.rotate(module.kv_norm(pooled.to(dtype)), rope)
