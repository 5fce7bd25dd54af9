# SPDX-License-Identifier: Apache-2.0
"""What ``DeepseekV41Model.forward`` does with text, given the state and hashes of a shard.

Restated from AutoModel: :data:`nemo_dsv4_cp.automodel.contracts.RESTATED_V41` holds the
fingerprint of the body, so that a release that changes it is refused.

# B batch rows   L local tokens   E hidden   M hyper-connection streams
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v41.layers import DeepseekV41HyperConnection


def run_blocks(
    backbone: Any,
    input_ids: torch.Tensor,
    state: Any,
    *,
    hashes: torch.Tensor | None,
    output_hidden_states: bool,
    **of_shard: Any,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Embed a shard's tokens and run a backbone's blocks and norm.

    Args:
        backbone: A ``DeepseekV41Model``.
        input_ids: Token ids [B, L].
        state: What the first block's attention receives.
        hashes: Engram rows of each token, [B, L, Engram layers, hashes of a layer].
        output_hidden_states: Return the streams before each block too.
        **of_shard: What every block receives.

    Returns:
        Hidden states [B, L, E], and the streams [B, L, M, E] before each block or None.
    """
    embedded = backbone.embed_tokens(input_ids)
    streams_BLME = embedded.unsqueeze(2).expand(-1, -1, backbone.config.hc_mult, -1)
    # A one-hot mix: the first block reads stream 0.
    mix_BLM = torch.zeros(streams_BLME.shape[:3], device=embedded.device, dtype=torch.float32)
    mix_BLM[..., 0] = 1
    captured = []
    for block in backbone.layers.values():
        if output_hidden_states:
            captured.append(streams_BLME)
        of_block = None
        if block.engram is not None:
            assert hashes is not None, "a model with Engram layers has their hash"
            of_block = hashes[:, :, block.engram.layer_hash_index]
        streams_BLME, mix_BLM, state = block(
            streams_BLME, mix_BLM, state, engram_hash_ids=of_block, **of_shard
        )
    hidden = backbone.norm(DeepseekV41HyperConnection.collapse(streams_BLME, mix_BLM))
    return hidden, tuple(captured) if output_hidden_states else None
