# SPDX-License-Identifier: Apache-2.0
"""AutoModel's V4 pieces that we call, by the private names it gives them, and their repairs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)
from nemo_automodel.components.models.deepseek_v4.layers import (
    _dsv4_kernel_backend as kernel_backend,
)
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4Block, DeepseekV4HashGate

__all__ = [
    "kernel_backend",
    "make_norms_uniform",
    "reset_uninitialised_norms",
    "reset_what_checkpoints_bring",
    "shows_images",
    "with_keywords",
]


_BLOCKS_PASS_KEYWORDS = inspect.getsource(DeepseekV4Block.forward).count("**attn_kwargs") > 1
"""Whether blocks hand a forward's keywords to attention (since 0.6)."""

_HASH_GATES_ARE_FORGOTTEN = (
    "buffer_device" in inspect.signature(DeepseekV4HashGate.init_weights).parameters
)
"""Whether AutoModel initialises no hash gates (0.5, recognized by its arguments)."""


@dataclass(frozen=True)
class _WithKeywords:
    """A rotary embedding that carries a forward's keywords past blocks that drop them."""

    rotary: Any
    keywords: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rotary(*args, **kwargs)


def with_keywords(rotary: Any, keywords: dict[str, Any]) -> Any:
    """Return what a block gets as ``rotary_compress``, which every release hands on to attention.

    Attention reads its ``keywords``, if it has any.

    Args:
        rotary: The model's rotary embedding of compressed entries.
        keywords: What attention needs of this forward.
    """
    return rotary if _BLOCKS_PASS_KEYWORDS else _WithKeywords(rotary, keywords)


def shows_images(
    backbone: Any,
    *,
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    vision_token_types: torch.Tensor | None,
    checked: bool,
) -> bool:
    """Return whether a batch shows images, which AutoModel's own forward serves.

    Args:
        backbone: A ``DeepseekV4Model``; AutoModel 0.5's and 0.6's have no vision tower.
        input_ids: Token ids [B, L]; an image's tokens have ids beyond the vocabulary.
        pixel_values: Patches of images.
        vision_token_types: [B, L], -1 for text.
        checked: The batch was cut by our sharder, which refuses images. Otherwise a config with a
            vision tower waits for the device, as in AutoModel.

    Returns:
        True for images of a config without a vision tower too: AutoModel refuses them.
    """
    if not hasattr(backbone, "vision_enabled"):
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


def make_norms_uniform(attention: Any) -> None:
    """Make the norms of a float32 attention float32, as FSDP2 needs it.

    AutoModel 0.5 builds them in bfloat16 whatever the model's dtype is.
    """
    if attention.wq_a.weight.dtype is torch.float32:
        for name, module in attention.named_modules():
            if name.endswith(("q_norm", "kv_norm")):
                module.float()


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


def reset_what_checkpoints_bring(model: Any) -> None:
    """Draw hyper-connections and hash gates where AutoModel leaves them as they are.

    AutoModel 0.5 leaves them to the checkpoint: without one they hold whatever the memory held.
    """
    for module in model.modules():
        if isinstance(module, DeepseekV4HashGate) and _HASH_GATES_ARE_FORGOTTEN:
            module.init_weights()  # the table of experts, all the first
            torch.nn.init.normal_(module.weight, std=0.02)
        mixes = isinstance(module, (DeepseekV4HyperConnection, DeepseekV4HyperHead))
        if mixes and not hasattr(module, "init_weights"):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("fn"):
                    torch.nn.init.normal_(parameter, std=0.02)
                elif name.endswith("scale"):
                    torch.nn.init.ones_(parameter)
                else:
                    torch.nn.init.zeros_(parameter)
