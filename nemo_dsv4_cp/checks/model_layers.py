# SPDX-License-Identifier: Apache-2.0
"""The fields of a model config on which kernels depend, and the kinds of layers they describe."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nemo_dsv4_cp.kernels.operations import ALL_ENTRIES, CANDIDATES, INSIDE

SIZES = (
    "compress_ratios",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "o_groups",
    "sliding_window",
    "rms_norm_eps",
)
"""Fields of V4's config."""

SIZES_V41 = (
    *(name for name in SIZES if name != "rms_norm_eps"),  # attention has no norm
    "index_source_layer_ids",
    "candidate_source_layer_id",
    "candidate_topk_blocks",
    "candidate_block_size",
)
"""Fields of V4.1's text config."""


def is_v41(sizes: Any) -> bool:
    """Return whether these are the fields of V4.1, whose layers share what few of them select."""
    return hasattr(sizes, "index_source_layer_ids")


def layers_of(sizes: Any) -> Counter[tuple[int, str | None]]:
    """Count a model's layers by compress ratio and, in V4.1, by how they select.

    The latter is one of :data:`ALL_ENTRIES`, :data:`CANDIDATES` and :data:`INSIDE`; None for layers
    that do not select, and for V4, whose ratio decides it.
    """
    ratios = sizes.compress_ratios[: sizes.num_hidden_layers]
    return Counter(kind_of(sizes, layer) for layer in range(len(ratios)))


def kind_of(sizes: Any, layer: int) -> tuple[int, str | None]:
    """Return a layer's compress ratio and how it selects, as :func:`layers_of` counts them."""
    return sizes.compress_ratios[layer], selects(sizes, layer)


def selects(sizes: Any, layer: int) -> str | None:
    """Return how a layer of V4.1 selects, as :func:`layers_of` names it."""
    if not is_v41(sizes) or layer not in sizes.index_source_layer_ids:
        return None
    chooser = sizes.candidate_source_layer_id  # -1 without
    if layer == chooser:
        return CANDIDATES
    return INSIDE if 0 <= chooser < layer else ALL_ENTRIES
