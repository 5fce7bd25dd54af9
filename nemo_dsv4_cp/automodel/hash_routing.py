# SPDX-License-Identifier: Apache-2.0
"""Token ids for gates that route by them, in the recomputation of activation checkpointing too.

A block hands its ids to the gate just before it calls its MoE, and the gate forgets them once it
has routed (``DeepseekV4HashGate``, ``DeepseekV4VisionGate``). At ep_size 1 AutoModel checkpoints
the MoE alone: its recomputation finds no ids, routes by score, and yields tensors of other shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4HashGate
from nemo_automodel.components.moe.layers import MoE
from torch.utils.weak import WeakTensorKeyDictionary

from nemo_dsv4_cp.automodel.contracts import UnsupportedAutoModel
from nemo_dsv4_cp.automodel.torch_api import NO_BACKWARD, backward_id

_PENDING = ("_pending_input_ids", "_pending_vision_token_types")

# By the MoE's input, which checkpointing holds for the recomputation: an entry lives as long as it.
_routed_by: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep_ids_for_recomputation(model: torch.nn.Module) -> None:
    """Have every MoE of a model whose gate routes by token ids keep them until its backward.

    Raises:
        UnsupportedAutoModel: If AutoModel's gates hold their ids under another name.
    """
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        if hasattr(module.gate, _PENDING[0]):
            module.register_forward_pre_hook(_restore_or_keep)
        elif isinstance(module.gate, DeepseekV4HashGate):
            raise UnsupportedAutoModel(f"DeepseekV4HashGate has no {_PENDING[0]}")


def _restore_or_keep(moe: Any, inputs: tuple[Any, ...]) -> None:
    """Store the ids that the block passed to the gate, or in a recomputation pass them again."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    hidden, gate = inputs[0], moe.gate
    if backward_id() == NO_BACKWARD:
        _routed_by[hidden] = {name: getattr(gate, name, None) for name in _PENDING}
    elif gate._pending_input_ids is None:  # else the block was recomputed, and handed them over
        ids = _routed_by.get(hidden)
        if ids is None:
            raise RuntimeError(
                "activation checkpointing recomputes an MoE that routes by token ids, from another "
                "tensor than its forward had, so that the ids are lost; set "
                "distributed.activation_checkpointing: false, or num_hash_layers: 0"
            )
        for name, value in ids.items():
            if hasattr(gate, name):
                setattr(gate, name, value)
