# SPDX-License-Identifier: Apache-2.0
"""Token verbs for rows whose documents were laid out again: tensors of any trailing shape.

AutoModel's ``ContextParallelSharder`` moves only [B, S] tensors to such rows and back, and refuses
the [B, S, V] of a teacher's logits. A subclass would not help: if a model returns an instance of
one, AutoModel replaces it by an instance of its own class. The class's two verbs are therefore
wrapped; the wrappers handle our layout, and call the original for any other.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.automodel.sharding import ContextParallelSharder, PackedShardLayout
from nemo_dsv4_cp.sequence.repacking import inverse_places, place_tokens


def install() -> None:
    """Wrap AutoModel's verbs; again does nothing."""
    patches.wrap(ContextParallelSharder, "shard_token_tensor", _shard_token_tensor)
    patches.wrap(ContextParallelSharder, "gather_token_tensor", _gather_token_tensor)


def _shard_token_tensor(
    original: Any, self: Any, tensor: torch.Tensor, seq_dim: int = 1, fill: float | None = None
) -> torch.Tensor:
    layout = self.shard_layout
    if not isinstance(layout, PackedShardLayout):
        sharded: torch.Tensor = original(self, tensor, seq_dim, fill)
        return sharded
    target, length = _target(layout, tensor), tensor.shape[seq_dim]
    if length == target.shape[1]:
        if fill is None:
            raise ValueError(
                "a tensor in the batch's own coordinates needs `fill`, the value of padding, once "
                "packed documents were laid out again"
            )
        source = inverse_places(target, layout.padded_seq_len)
        tensor = place_tokens(tensor, source, tuple(target.shape), seq_dim, fill)
    elif length != layout.padded_seq_len:
        raise ValueError(
            f"a tensor of {length} tokens on dimension {seq_dim} follows neither the batch "
            f"({target.shape[1]}) nor its padded rows ({layout.padded_seq_len})"
        )
    indices = self._indices(layout.padded_seq_len, tensor.device)
    return tensor.index_select(seq_dim, indices)


def _gather_token_tensor(
    original: Any,
    self: Any,
    tensor: torch.Tensor,
    seq_dim: int = 1,
    trim: bool = False,
    fill: float | None = None,
) -> torch.Tensor:
    layout = self.shard_layout
    if not (isinstance(layout, PackedShardLayout) and trim):
        gathered: torch.Tensor = original(self, tensor, seq_dim, trim, fill)
        return gathered
    if fill is None:
        raise ValueError(
            "trimming to the batch's own coordinates needs `fill`, the value of tokens that belong "
            "to no document, once packed documents were laid out again"
        )
    full = original(self, tensor, seq_dim)
    rows = (full.shape[0], layout.padded_seq_len)
    return place_tokens(full, _target(layout, full), rows, seq_dim, fill)


def _target(layout: Any, tensor: torch.Tensor) -> torch.Tensor:
    target: torch.Tensor = layout.input_token_stream_positions
    return target.to(tensor.device)
