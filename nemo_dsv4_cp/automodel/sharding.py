# SPDX-License-Identifier: Apache-2.0
"""AutoModel's sharder contract, or the part that we use where a release has none (0.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

PLACE = "nemo_automodel.components.distributed.context_parallel"
HAS_SHARDER = find_spec(PLACE) is not None
"""Whether recipes request a model's ``ContextParallelSharder`` (since 0.6)."""

if HAS_SHARDER:
    from nemo_automodel.components.distributed.context_parallel.sharder import (
        ContextParallelSharder,
        ShardLayout,
    )
else:

    @dataclass(frozen=True)
    class ShardLayout:  # type: ignore[no-redef]
        """What a batch function learned: the fields that AutoModel's class of 0.6 has."""

        local_token_global_indices: torch.Tensor | None = None
        original_seq_len: int | None = None
        padded_seq_len: int | None = None
        input_row_shape: tuple[int, ...] | None = None
        input_token_stream_positions: torch.Tensor | None = None

    @dataclass
    class ContextParallelSharder:  # type: ignore[no-redef]
        """How a batch is sharded, for callers of ``prepare_model_inputs_for_cp``."""

        shard_batch: Callable[..., Any]
        local_token_global_indices: Callable[..., Any] | None = None
        shard_layout: ShardLayout | None = None


@dataclass(frozen=True)
class PackedShardLayout(ShardLayout):
    """Documents were laid out again: only ``padded_seq_len`` and ``Repacked.target`` are set."""


__all__ = ["HAS_SHARDER", "ContextParallelSharder", "PackedShardLayout", "ShardLayout"]
