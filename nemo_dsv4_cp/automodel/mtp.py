# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction: its inputs under CP, and AutoModel's forward without the [L, S] mask.

The forward is restated: :data:`nemo_dsv4_cp.automodel.contracts.RESTATED` holds the fingerprint of
``DeepseekV4ForCausalLM.forward``, so that a release that changes it is refused.

# B batch rows   L local tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from nemo_automodel.components.models.common import mtp
from nemo_automodel.components.models.deepseek_v4.model import (
    DeepseekV4CausalLMOutput,
    compute_lm_head_logits,
)

from nemo_dsv4_cp.automodel.contracts import signatures_of

if TYPE_CHECKING:
    from nemo_automodel.components.models.common.mtp import MTPContextParallelInputs

_PREPARE = "prepare_mtp_context_parallel_inputs"
ASKS_MODELS = hasattr(mtp, _PREPARE)
"""Whether AutoModel's recipes request these inputs from the model (since 0.7)."""

SIGNATURES = (
    signatures_of({mtp.__name__: {_PREPARE: "batch num_depths ignore_index"}})
    if ASKS_MODELS
    else ()
)


def shifted_inputs(
    batch: dict[str, Any], *, num_depths: int, ignore_index: int
) -> MTPContextParallelInputs:
    """Return what AutoModel makes of a full batch for each depth.

    Raises:
        NotImplementedError: If AutoModel has no such contract.
    """
    if not ASKS_MODELS:
        raise NotImplementedError(
            "this nemo_automodel prepares nothing for multi-token prediction under context "
            "parallelism; install 0.7.0 or later, or set num_nextn_predict_layers: 0"
        )
    return getattr(mtp, _PREPARE)(batch, num_depths=num_depths, ignore_index=ignore_index)


def forward_with_mtp(
    model: Any,
    input_ids: torch.Tensor,
    shifted_ids: Sequence[torch.Tensor],
    *,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    output_hidden_states: bool | None,
    attn_kwargs: dict[str, Any],
) -> DeepseekV4CausalLMOutput:
    """Run a ``DeepseekV4ForCausalLM`` that is no pipeline stage, and its MTP layers.

    The arguments are AutoModel's, with ``shifted_ids`` [B, L] that each MTP depth embeds.
    """
    hidden, streams = model.model(
        input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        padding_mask=padding_mask,
        return_hc_hidden=True,
        **attn_kwargs,
    )
    logits = compute_lm_head_logits(model.lm_head, hidden, logits_to_keep, fp32_lm_head=True).logits
    predicted = model.mtp(
        streams,
        embed_inputs=[model.model.embed_tokens(ids) for ids in shifted_ids],
        position_ids=position_ids,
        padding_mask=padding_mask,
        **attn_kwargs,
    )
    if output_hidden_states is None:
        output_hidden_states = getattr(model.config, "output_hidden_states", False)
    return DeepseekV4CausalLMOutput(
        logits=logits,
        hidden_states=hidden if output_hidden_states else None,
        mtp_per_depth_h=predicted,
        mtp_loss_scaling_factor=model.mtp_config.loss_scaling_factor,
    )
