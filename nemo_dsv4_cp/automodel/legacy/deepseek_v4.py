# SPDX-License-Identifier: Apache-2.0
"""What AutoModel 0.5's V4 lacks: keywords for attention, uniform norms, some initial weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4Block, DeepseekV4HashGate

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
    """Return what a block gets as ``rotary_compress``, which attention gets in any release.

    Attention reads its ``keywords``, if it has any.
    """
    return rotary if _BLOCKS_PASS_KEYWORDS else _WithKeywords(rotary, keywords)


def make_norms_uniform(attention: Any) -> None:
    """Make the norms of a float32 attention float32, as FSDP2 needs it.

    AutoModel 0.5 builds them in bfloat16 whatever the model's dtype is.
    """
    if attention.wq_a.weight.dtype is torch.float32:
        for name, module in attention.named_modules():
            if name.endswith(("q_norm", "kv_norm")):
                module.float()


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
