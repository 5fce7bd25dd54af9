"""Windows of tokens -> compressed entries, with the parameters of the host's compressor.

An entry pools the r tokens of its window; with overlap (ratio 4) also the r tokens before them, of
the same document. Either may lie on the ranks before.
"""

# B batch rows   L local tokens   n local windows   r compress ratio   D entry width   E hidden

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout, Windows
from nemo_dsv4_cp.sequence.routes import before_shards


@dataclass(frozen=True)
class LeftContext:
    """A per-token tensor of this rank, extended to the left.

    Attributes:
        tensor: [B, T, F]; this rank's own L tokens and those before them.
        first: Global position of row 0. Rows before token 0 are zeros, so it may be negative.
    """

    tensor: torch.Tensor
    first: int

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Return the tokens at global positions [begin, end) as a view."""
        return self.tensor[:, begin - self.first : end - self.first]


class Pooling:
    """One compressor's windows: features now, entries once those before the shard are here.

    Attributes:
        module: The host's ``DeepseekV4Compressor`` or ``DeepseekV4Indexer``.
        asked: What must be fetched: features, and which tokens of them.
    """

    def __init__(self, module: Any, hidden_BLE: torch.Tensor, layout: SequenceLayout) -> None:
        """Project this rank's tokens.

        Raises:
            ValueError: If a window would straddle a cut.
        """
        ratio = module.compress_ratio
        self.module, self._layout = module, layout
        self._windows = layout.windows(ratio, hidden_BLE.device)
        features, straddling = window_features(module, hidden_BLE), layout.straddling(ratio)
        self._tokens_before = [straddling]
        tensors = [features]
        if ratio == OVERLAP_RATIO:
            self._tokens_before.append(ratio + straddling)
            tensors.append(overlap_half(module, features))
        self.asked = [
            (tensor, before_shards(layout, before))
            for tensor, before in zip(tensors, self._tokens_before, strict=True)
        ]

    def entries(
        self, answers: Iterator[torch.Tensor], rotary: Any, dtype: torch.dtype, kernels: Kernels
    ) -> torch.Tensor:
        """Pool this rank's windows, given what was asked for: :func:`pool_windows`."""
        contexts = [
            LeftContext(next(answers), self._layout.start - before)
            for before in self._tokens_before
        ]
        features, overlap = contexts if len(contexts) == 2 else (contexts[0], None)
        return pool_windows(self.module, features, overlap, self._windows, rotary, dtype, kernels)


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
