# SPDX-License-Identifier: Apache-2.0
"""Compression of windows of tokens to KV entries, with the parameters of AutoModel's compressor.

An entry pools the r tokens of its window; with overlap (ratio 4) also the r tokens before them, of
the same document. Either may lie on the ranks before.
"""

# B batch rows   L local tokens   T L and the tokens fetched before them   n local windows
# r compress ratio   D entry width   E hidden   F feature width: D, 2D with overlap

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nemo_dsv4_cp.attention.split_linear import SplitLinear
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.sequence.windows import Windows


def split_projections(compressor: Any) -> None:
    """Have a compressor's projections, and its indexer's, multiply on bfloat16 tensor cores."""
    for module in (compressor, getattr(compressor, "indexer", None)):
        if module is not None:
            SplitLinear.adopt(module.wkv)
            SplitLinear.adopt(module.wgate)


def window_features(
    module: Any, hidden_BLE: torch.Tensor, *, overlaps: bool, exact: bool, name: str = ""
) -> dict[str, torch.Tensor]:
    """Project tokens to what pooling needs: values and gate logits, float32.

    Args:
        module: AutoModel's ``DeepseekV4Compressor`` or ``DeepseekV4Indexer``: its ``wkv``,
            ``wgate`` and ``ape_param`` are called as modules, since FSDP2 shards each on its own.
        hidden_BLE: Local hidden states, float32.
        overlaps: Whether windows also pool the window before.
        exact: Whether they are numbers of bfloat16.
        name: What the results' names begin with.

    Returns:
        ``features`` [B, L, 2 * F], values then gates; where windows overlap also ``overlap``
        [B, L, 2 * D], the part that the next window pools too: the first D of the 2D value and
        gate features (AutoModel ``_overlap_transform``).
    """
    projected = []
    for linear in (module.wkv, module.wgate):
        # LoRA's linears, also of this class, have a forward of their own.
        splits = exact and type(linear).forward is SplitLinear.forward
        projected.append(linear(hidden_BLE, exact=True) if splits else linear(hidden_BLE))
    features = torch.cat(projected, dim=-1)
    named = {f"{name}features": features}
    if overlaps:
        values, _, gates, _ = features.split(module.head_dim, dim=-1)
        named[f"{name}overlap"] = torch.cat((values, gates), dim=-1)
    return named


def pool_windows(
    module: Any,
    rows: Mapping[str, torch.Tensor],
    windows: Windows,
    rope: Rope,
    dtype: torch.dtype,
    kernels: Kernels,
    *,
    name: str = "",
) -> torch.Tensor:
    """Pool this rank's windows into entries: softmax-gated sum, RMSNorm, rotary at w * r.

    The formula is AutoModel's ``_pool_windows`` and ``DeepseekV4Compressor.forward``.

    Args:
        module: As for :func:`window_features`.
        rows: :func:`window_features` with the tokens before the shard that windows straddle,
            [B, T, ...]; of the overlap with r tokens more.
        windows: What to pool.
        name: What the names of the module's rows begin with.
        rope: Cos and sin of the windows' places.
        dtype: Activation dtype, taken on before the norm.
        kernels: The backend that rotates.

    Returns:
        [B, n, D] of ``dtype``.
    """
    width = module.head_dim
    features, overlap = rows[f"{name}features"], rows.get(f"{name}overlap")
    values, gates = _tokens(features, windows, windows.rows).chunk(2, dim=-1)
    # The gate's bias depends on the place in the window only.
    bias = module.ape_param(features)
    gates = gates + bias
    if overlap is not None:
        values, gates = values[..., width:], gates[..., width:]
        if windows.count:
            before = _tokens(overlap, windows, windows.overlap_rows)
            values_before, gates_before = before.split(width, dim=-1)
            # the first window of a document has no predecessor
            gates_before = gates_before + bias[..., :width]
            gates_before = gates_before.masked_fill(windows.is_first, -torch.inf)
            values = torch.cat((values_before, values), dim=2)
            gates = torch.cat((gates_before, gates), dim=2)
    pooled = (values * gates.softmax(dim=2)).sum(dim=2)
    return kernels.rotate(module.kv_norm(pooled.to(dtype)), rope)


def _tokens(
    features_BTF: torch.Tensor, windows: Windows, rows: torch.Tensor | None
) -> torch.Tensor:
    """Return the features of each window's tokens, [B, n, r, F]."""
    batch, _, width = features_BTF.shape
    if rows is None:
        whole = features_BTF[:, : windows.count * windows.ratio]
    else:
        whole = features_BTF.flatten(0, 1).index_select(0, rows)
    tokens: torch.Tensor = whole.reshape(batch, windows.count, windows.ratio, width)
    return tokens
