# SPDX-License-Identifier: Apache-2.0
"""What ``DeepseekV4ForCausalLM.forward`` does with MTP, without its dense [L, S] mask.

Restated from AutoModel: :data:`nemo_dsv4_cp.automodel.contracts.RESTATED` holds the fingerprint of
the body, so that a release that changes it is refused.

# B batch rows   L local tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.model import (
    DeepseekV4CausalLMOutput,
    compute_lm_head_logits,
)


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
    """Run a model that is no pipeline stage, and its MTP layers.

    Args:
        model: A ``DeepseekV4ForCausalLM``.
        input_ids: Token ids [B, L].
        shifted_ids: For each MTP depth, the ids [B, L] that its layer embeds.
        position_ids: Positions [B, L].
        attention_mask: [B, L], 1 = real; for the backbone.
        padding_mask: Bool [B, L], True = pad.
        logits_to_keep: As in AutoModel's forward.
        output_hidden_states: As in AutoModel's forward.
        attn_kwargs: For attention.
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
