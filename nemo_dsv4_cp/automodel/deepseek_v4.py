# SPDX-License-Identifier: Apache-2.0
"""AutoModel's V4 pieces that we call, by the private names it gives them, and their repairs."""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import (
    _dsv4_kernel_backend as kernel_backend,
)

__all__ = ["kernel_backend", "reset_uninitialised_norms", "shows_images"]


def shows_images(
    backbone: Any,
    *,
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    vision_token_types: torch.Tensor | None,
    checked: bool,
) -> bool:
    """Return whether a batch shows images, which AutoModel's own forward serves or refuses.

    Args:
        backbone: A ``DeepseekV4Model``.
        input_ids: Token ids [B, L]; an image's tokens have ids beyond the vocabulary.
        pixel_values: Patches of images.
        vision_token_types: [B, L], -1 for text.
        checked: Our sharder, which refuses images, saw the batch. Otherwise a config with a vision
            tower waits for the device, as in AutoModel.
    """
    if not hasattr(backbone, "vision_enabled"):  # AutoModel 0.5 and 0.6
        return False
    if pixel_values is not None:
        return True
    if checked:
        return False
    if vision_token_types is not None:
        return bool((vision_token_types >= 0).any())
    has_tower = backbone.vision_enabled and backbone.embed_tokens is not None
    ids_BL = input_ids if has_tower else None
    return ids_BL is not None and bool((ids_BL >= backbone.config.vocab_size).any())


def reset_uninitialised_norms(attention: Any) -> None:
    """Set the norms that ``DeepseekV4Attention.init_weights`` forgets to ones.

    It resets neither ``compressor.kv_norm`` nor ``compressor.indexer.kv_norm``: materialised from
    the meta device, as every run of two ranks or more without a checkpoint is, they hold whatever
    the memory held, and the loss is NaN.
    """
    compressor = attention.compressor
    for module in (compressor, getattr(compressor, "indexer", None)):
        if module is not None:
            module.kv_norm.reset_parameters()
