# SPDX-License-Identifier: Apache-2.0
"""V4's backbone under context parallelism: documents in place of AutoModel's dense [L, S] mask.

# B batch rows   L local tokens   E hidden   M hyper-connection streams
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4Model
from nemo_automodel.components.moe.layers import MoE

from nemo_dsv4_cp.attention.indexer_loss import token_weights
from nemo_dsv4_cp.attention.step import STEP_KEY, StepContext
from nemo_dsv4_cp.automodel.backbone import embed, run_blocks, update_gate_biases
from nemo_dsv4_cp.automodel.deepseek_v4 import shows_images
from nemo_dsv4_cp.automodel.legacy.auxiliary_loss import refuse_unscaled
from nemo_dsv4_cp.checks.batch_rules import padding_of, refuse_left_padding
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
from nemo_dsv4_cp.gpus import Gpu
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.lengths import document_starts, packed_padding
from nemo_dsv4_cp.sequence.packing import is_packed

_AUX_LOSS = "moe_overrides.aux_loss_coeff"


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
            refuse_unscaled(_AUX_LOSS, getattr(module.gate, "aux_loss_coeff", 0))
            if module.cp_mesh is None:
                module.cp_mesh = mesh_of(group, next(module.parameters()).device)


def step_of(
    kwargs: dict[str, Any],
    rows: int,
    length: int,
    options: ContextParallelOptions,
    padding_mask: torch.Tensor | None,
    gpu: Gpu | None = None,
) -> tuple[StepContext, torch.Tensor | None]:
    """Take what describes a step out of a forward's keyword arguments.

    Args:
        kwargs: Changed in place: what describes packing leaves it, and ``cp_step`` is there.
        rows: B.
        length: L, local tokens.
        options: The model's.
        padding_mask: What the batch says of padding, bool [B, L]; as it does under CP.
        gpu: By whose rates ``balance: auto`` decides.

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
        layout = SequenceLayout.of_documents(starts, length, cp_rank=rank, cp_size=size)
        if padding is not None:
            padding_mask = padding[:, layout.start : layout.end]
    kwargs[STEP_KEY] = StepContext(layout, group, options, gpu)
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
    gpu: Gpu | None = None  # with the measured rate of its kernels; None for the table's

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with: a process group cannot be copied.

        The copy's next forward names it again.
        """
        return {name: value for name, value in vars(self).items() if name != "_cp_group"}

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
        # If the model already made the step's context, the batch has no images.
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

        streams_BLME, routed_ids = embed(self, input_ids, inputs_embeds)
        rows, length = streams_BLME.shape[:2]
        device = streams_BLME.device
        options = ContextParallelOptions.of(self.config)
        step, padding_mask = step_of(attn_kwargs, rows, length, options, padding_mask, self.gpu)
        if options.trains_indexer and self.training and step.loss_weights_BL1 is None:
            step.loss_weights_BL1 = token_weights(
                padding_mask, rows, length, self._cp_group, device
            )
        if position_ids is None:
            position_ids = step.layout.document_positions(device)
        for block in self.layers.values():  # before the first block, which may be compiled
            if block is not None:
                step.plan(block.self_attn.kind, device)
        return run_blocks(
            self,
            streams_BLME,
            position_ids=position_ids,
            padding_mask=padding_mask,
            routed_ids=routed_ids,
            return_hc_hidden=return_hc_hidden,
            attn_kwargs=attn_kwargs,
        )

    def update_moe_gate_bias(self) -> None:
        """Balance the experts by the tokens of the whole batch, not of this rank's shard.

        AutoModel sums expert loads over the mesh that shards the bias. With ep_size 1 none does,
        and each rank would come to route by a bias of its own. With ``train_only: indexer`` the
        biases stay as they are.
        """
        if ContextParallelOptions.of(self.config).train_only == "indexer":
            return

        def whole_load(gate: Any, load: torch.Tensor) -> torch.Tensor:
            if sharding_groups(gate.e_score_correction_bias):
                return load
            # FSDP2's mesh, which shards the weight, spans data and CP ranks.
            return all_reduce_sum(load, sharding_groups(gate.weight) or [self._cp_group])

        update_gate_biases(self, whole_load)
