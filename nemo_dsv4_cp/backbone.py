# SPDX-License-Identifier: Apache-2.0
"""V4's backbone under context parallelism: documents in place of AutoModel's dense [L, S] mask.

# B batch rows   L local tokens   E hidden   M hyper-connection streams
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4Model
from nemo_automodel.components.moe.layers import MoE

from nemo_dsv4_cp.attention.step import STEP_KEY, StepContext
from nemo_dsv4_cp.automodel.auxiliary_loss import refuse_unscaled
from nemo_dsv4_cp.automodel.deepseek_v4 import shows_images, with_keywords
from nemo_dsv4_cp.checks.batch import padding_of, refuse_left_padding
from nemo_dsv4_cp.exchange.collectives import (
    CP_GROUP_KEY,
    Group,
    all_reduce_sum,
    cp_enabled,
    cp_rank,
    cp_size,
    mesh_of,
    sharding_groups,
)
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.lengths import document_starts, packed_padding
from nemo_dsv4_cp.sequence.packed_layout import PackedLayout
from nemo_dsv4_cp.sequence.packing import is_packed


def route_over_whole_rows(model: torch.nn.Module, group: Group) -> None:
    """Have the auxiliary loss of every MoE balance the tokens of whole rows, not of this shard.

    AutoModel sets ``MoE.cp_mesh`` where it sets up expert parallelism, at ep_size > 1 alone.

    Args:
        model: Changed in place; a mesh that is there stays.
        group: The CP group.

    Raises:
        ValueError: If AutoModel's release does not scale the auxiliary loss for CP.
    """
    if not cp_enabled(group):
        return
    for module in model.modules():
        if isinstance(module, MoE):
            refuse_unscaled(getattr(module.gate, "aux_loss_coeff", 0))
            if module.cp_mesh is None:
                module.cp_mesh = mesh_of(group, next(module.parameters()).device)


def step_of(
    kwargs: dict[str, Any],
    rows: int,
    length: int,
    options: ContextParallelOptions,
    padding_mask: torch.Tensor | None,
) -> tuple[StepContext, torch.Tensor | None]:
    """Take what describes a step out of a forward's keyword arguments.

    Args:
        kwargs: Changed in place: what describes packing leaves it, and ``cp_step`` is there.
        rows: B.
        length: L, local tokens.
        options: The model's.
        padding_mask: What the batch says of padding, bool [B, L]; as it does under CP.

    Returns:
        The step's context, and which local tokens are padding: ``padding_mask``, or what packed
        rows say by their lengths.

    Raises:
        KeyError: If rows are marked as packed and no lengths describe their documents.
    """
    if STEP_KEY in kwargs:
        return kwargs[STEP_KEY], padding_mask
    group = kwargs.get(CP_GROUP_KEY)
    rank, size = cp_rank(group), cp_size(group)
    layout = SequenceLayout(length, rank, size)
    if is_packed(kwargs):
        starts = document_starts(kwargs, rows, length * size)
        padding = None
        if padding_mask is None:
            padding = packed_padding(kwargs, rows, length * size)
        for key in _PACKING_KEYS:
            kwargs.pop(key, None)
        if starts is None:
            raise KeyError(
                "packed rows (qkv_format: thd) need `seq_lens` or `cu_seqlens` beside them; "
                "nothing else tells where documents end"
            )
        layout = PackedLayout.of_documents(starts, length, cp_rank=rank, cp_size=size)
        if padding is not None:
            padding_mask = padding[:, layout.start : layout.end]
    kwargs[STEP_KEY] = StepContext(layout, group, options)
    return kwargs[STEP_KEY], padding_mask


_PACKING_KEYS = (
    "qkv_format",
    "seq_lens",
    "seq_lens_padded",
    "cu_seqlens",
    "cu_seqlens_padded",
    "packed_seq_ids",
    "_packed_seq_ids",
)


class ContextParallelModel(DeepseekV4Model):
    """AutoModel's V4 backbone without its dense [L, S] attention mask."""

    _cp_group: Group | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        n_images_per_sample: torch.Tensor | None = None,
        vision_token_types: torch.Tensor | None = None,
        return_hc_hidden: bool = False,
        **attn_kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the backbone on this rank's shard.

        Args:
            input_ids: Token ids [B, L]; on later pipeline stages the hidden streams [B, L, M, E].
            inputs_embeds: Embeddings [B, L, E] in place of ids.
            position_ids: Global positions of the local tokens [B, L]; counting from 0 by default.
            attention_mask: [B, L], 1 = real, right-padded; only at CP size 1, where the batch was
                not checked when it was cut.
            padding_mask: Bool [B, L], True = pad, for the MoE routers.
            pixel_values: Patches of images. A batch that shows images takes AutoModel's own path,
                at CP size 1 only; so with the next three.
            image_grid_hws: Grids of images.
            n_images_per_sample: Images of each row.
            vision_token_types: [B, L], -1 for text.
            return_hc_hidden: Return the hidden streams too.
            **attn_kwargs: For attention; ``_dsv4_cp_group`` above all.

        Returns:
            Hidden states [B, L, E], or on an earlier pipeline stage the streams [B, L, M, E]; with
            ``return_hc_hidden`` the streams as well.

        Raises:
            ValueError: For left padding, or when there is no input.
        """
        self._cp_group = attn_kwargs.get(CP_GROUP_KEY)
        # A model that made the step's context found text.
        if STEP_KEY not in attn_kwargs and shows_images(
            self,
            input_ids=input_ids,
            pixel_values=pixel_values,
            vision_token_types=vision_token_types,
            checked=cp_enabled(self._cp_group),
        ):
            with_images: torch.Tensor = super().forward(
                input_ids,
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                pixel_values=pixel_values,
                image_grid_hws=image_grid_hws,
                n_images_per_sample=n_images_per_sample,
                vision_token_types=vision_token_types,
                return_hc_hidden=return_hc_hidden,
                **attn_kwargs,
            )
            return with_images
        if attention_mask is not None:
            padded = padding_of(attention_mask)
            refuse_left_padding(padded)
            padding_mask = padded if padding_mask is None else padding_mask

        if self.embed_tokens is None:  # a later pipeline stage
            streams_BLME = input_ids if input_ids is not None else inputs_embeds
            routed_ids = None
        else:
            routed_ids = input_ids
            if inputs_embeds is None and input_ids is not None:
                inputs_embeds = self.embed_tokens(input_ids)
            streams_BLME = (
                None
                if inputs_embeds is None
                else inputs_embeds.unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
            )
        if streams_BLME is None:
            raise ValueError("the model needs input_ids or inputs_embeds")

        like_BLE = streams_BLME[:, :, 0]
        batch, length = like_BLE.shape[:2]
        options = ContextParallelOptions.of(self.config)
        step, padding_mask = step_of(attn_kwargs, batch, length, options, padding_mask)
        if position_ids is None:
            position_ids = step.layout.document_positions(like_BLE.device)
        position_ids = torch.atleast_2d(position_ids).expand(batch, -1)
        rope = self.rotary_emb(like_BLE, position_ids)
        rope_compress = self.rotary_emb_compress(like_BLE, position_ids)
        rotary_compress = with_keywords(self.rotary_emb_compress, attn_kwargs)
        blocks = [block for block in self.layers.values() if block is not None]
        for block in blocks:  # plans stand before the first block, which may be compiled
            step.plan(block.self_attn.kind, like_BLE.device)
        for block in blocks:
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
        if self.hc_head is not None:
            hidden = self.hc_head(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return (hidden, streams_BLME) if return_hc_hidden else hidden

    def update_moe_gate_bias(self) -> None:
        """Balance the experts by the tokens of the whole batch, not of this rank's shard.

        AutoModel sums expert loads over the mesh that shards the bias. With ep_size 1 none does,
        and each rank would come to route by a bias of its own. AutoModel also updates no gate whose
        MoE stands in a checkpoint wrapper, as at ep_size 1 with activation checkpointing.
        """
        for block in self.layers.values():
            gate: Any = getattr(getattr(block, "mlp", None), "gate", None)
            if getattr(gate, "bias_update_factor", 0) <= 0:  # off, or routed by token ids alone
                continue
            load = gate._cumulative_expert_load
            if load is not None and not sharding_groups(gate.e_score_correction_bias):
                # FSDP2's mesh, which shards the weight, spans data and CP ranks.
                groups = sharding_groups(gate.weight) or [self._cp_group]
                gate._cumulative_expert_load = all_reduce_sum(load, groups)
            with torch.no_grad():
                gate.update_bias()
