# SPDX-License-Identifier: Apache-2.0
"""What ``DeepseekV4Model.forward`` and ``update_moe_gate_bias`` do, without the dense [L, S] mask.

Restated from AutoModel: :data:`nemo_dsv4_cp.automodel.contracts.RESTATED` holds the fingerprints of
the bodies, so that a release that changes one is refused.

# B batch rows   L local tokens   E hidden   M hyper-connection streams
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_dsv4_cp.automodel.legacy.deepseek_v4 import with_keywords


def embed(
    backbone: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the hidden streams [B, L, M, E] that the first block reads.

    Args:
        backbone: A ``DeepseekV4Model``, or a pipeline stage of it.
        input_ids: Token ids [B, L]; on later pipeline stages the streams themselves.
        inputs_embeds: Embeddings [B, L, E] in place of ids.

    Returns:
        The streams, and the token ids that hash gates route by, None on later stages.

    Raises:
        ValueError: When there is no input.
    """
    if backbone.embed_tokens is None:  # a later pipeline stage
        streams_BLME = input_ids if input_ids is not None else inputs_embeds
        routed_ids = None
    else:
        routed_ids = input_ids
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = backbone.embed_tokens(input_ids)
        streams_BLME = (
            None
            if inputs_embeds is None
            else inputs_embeds.unsqueeze(2).repeat(1, 1, backbone.config.hc_mult, 1)
        )
    if streams_BLME is None:
        raise ValueError("the model needs input_ids or inputs_embeds")
    return streams_BLME, routed_ids


def run_blocks(
    backbone: Any,
    streams_BLME: torch.Tensor,
    *,
    position_ids: torch.Tensor,
    padding_mask: torch.Tensor | None,
    routed_ids: torch.Tensor | None,
    return_hc_hidden: bool,
    attn_kwargs: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run a backbone's blocks, and its head and norm where this pipeline stage has them.

    Args:
        backbone: A ``DeepseekV4Model``, or a pipeline stage of it.
        streams_BLME: What :func:`embed` returned.
        position_ids: Global positions [B, L], or one row of them.
        padding_mask: Bool [B, L], True = pad, for the MoE routers.
        routed_ids: What :func:`embed` returned.
        return_hc_hidden: Return the last streams too.
        attn_kwargs: For attention.

    Returns:
        Hidden states [B, L, E], or on an earlier pipeline stage the streams [B, L, M, E]; with
        ``return_hc_hidden`` the streams as well.
    """
    like_BLE = streams_BLME[:, :, 0]
    position_ids = torch.atleast_2d(position_ids).expand(len(like_BLE), -1)
    rope = backbone.rotary_emb(like_BLE, position_ids)
    rope_compress = backbone.rotary_emb_compress(like_BLE, position_ids)
    rotary_compress = with_keywords(backbone.rotary_emb_compress, attn_kwargs)
    for block in backbone.layers.values():
        if block is not None:
            streams_BLME = block(
                x=streams_BLME,
                position_embeddings=rope,
                position_ids=position_ids,
                position_embeddings_compress=rope_compress,
                rotary_compress=rotary_compress,
                padding_mask=padding_mask,
                input_ids=routed_ids,
                **attn_kwargs,
            )
    hidden = streams_BLME
    if backbone.hc_head is not None:
        hidden = backbone.hc_head(hidden)
    if backbone.norm is not None:
        hidden = backbone.norm(hidden)
    return (hidden, streams_BLME) if return_hc_hidden else hidden


def update_gate_biases(
    backbone: Any, whole_load: Callable[[Any, torch.Tensor], torch.Tensor]
) -> None:
    """Update the bias by which each gate balances its experts.

    AutoModel updates no gate whose MoE stands in a checkpoint wrapper, as at ep_size 1 with
    activation checkpointing.

    Args:
        backbone: A ``DeepseekV4Model``.
        whole_load: Returns the expert load of the whole batch, given a gate and its load of
            this rank's tokens.
    """
    for block in backbone.layers.values():
        gate: Any = getattr(getattr(block, "mlp", None), "gate", None)
        if getattr(gate, "bias_update_factor", 0) <= 0:  # off, or routed by token ids alone
            continue
        load = gate._cumulative_expert_load
        if load is not None:
            gate._cumulative_expert_load = whole_load(gate, load)
        with torch.no_grad():
            gate.update_bias()
