# SPDX-License-Identifier: Apache-2.0
"""The registered architecture of V4.1: AutoModel's, with attention that sees across the cuts.

V4's is in :mod:`nemo_dsv4_cp.model`.

# B batch rows   L local tokens
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v41.attention import DeepseekV41Attention
from nemo_automodel.components.models.deepseek_v41.model import DeepseekV41ForCausalLM

from nemo_dsv4_cp.attention.layer_v41 import ContextParallelAttentionV41
from nemo_dsv4_cp.automodel import lora
from nemo_dsv4_cp.backbone import route_over_whole_rows
from nemo_dsv4_cp.backbone_v41 import ContextParallelModelV41
from nemo_dsv4_cp.checks.finite import FiniteCheck
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, cp_enabled, cp_size
from nemo_dsv4_cp.model import use_certified_kernels
from nemo_dsv4_cp.model_batches import ShardsBatches
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.startup import log_first_step

_OF_PACKED_ROWS = ("seq_lens", "seq_lens_padded", "qkv_format")


class DeepseekV41ContextParallelForCausalLM(ShardsBatches, DeepseekV41ForCausalLM):
    """V4.1 for causal language modelling at any ``distributed.cp_size``.

    Registered in AutoModel's ``nemo_automodel.architectures`` and named by
    ``DeepseekV41ContextParallelConfig``. Parameters, state dict and checkpoints are AutoModel's.
    """

    _owns_packed_attention = True
    _resumes_on_other_ranks = True
    _finite: FiniteCheck | None = None
    _logged = False

    def __init__(
        self,
        config: Any,
        moe_config: Any = None,
        backend: Any = None,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        engram_process_group: Group | None = None,
    ) -> None:
        # AutoModel reads this signature to separate the constructor's arguments from config fields.
        super().__init__(
            config,
            moe_config,
            backend,
            tokenizer=tokenizer,
            revision=revision,
            engram_process_group=engram_process_group,
        )
        options, text = ContextParallelOptions.of(config), config.text_config
        self._shard_as(options, text.compress_ratios[: text.num_hidden_layers])
        self._pad_documents = True  # no window straddles a cut or a document's end
        self.model.__class__ = ContextParallelModelV41
        self.model.options = options
        for module in self.modules():
            if type(module) is DeepseekV41Attention:
                ContextParallelAttentionV41.adopt(module, text, options)
        self._finite = FiniteCheck(self) if options.check_finite else None

    def choose_kernels(self) -> None:
        """Compute with the kernels that this job chooses: :func:`use_certified_kernels`."""
        use_certified_kernels(self)

    resolve_lora_targets = lora.resolve_targets

    def check_sizes(self, mesh: Any) -> None:
        """Refuse parallel sizes that V4.1 cannot train with, before the model is sharded.

        Args:
            mesh: The job's, with ``pp_size`` and ``ep_size``.

        Raises:
            ValueError: With the setting and a value that works.
        """
        stages, experts = getattr(mesh, "pp_size", 1), getattr(mesh, "ep_size", 1)
        if stages > 1:
            raise ValueError(
                f"distributed.pp_size={stages} is not supported with DeepSeek-V4.1, whose layers "
                "share compressed entries; set distributed.pp_size: 1"
            )
        engrams = [block.engram for block in self.model.layers.values() if block.engram]
        if experts == 1 and any(engram.embed.process_group for engram in engrams):
            raise ValueError(
                "distributed.ep_size=1 cannot train Engram, whose tables AutoModel distributes "
                "with expert parallelism alone; use an ep_size of 2 or more that divides the ranks"
            )

    def _balancing(
        self, input_ids: torch.Tensor, cp_group: Group | None, documents: torch.Tensor | None
    ) -> str:
        """Return which layers select for queries of other ranks, in words."""
        if not cp_enabled(cp_group):
            return "none"
        step = self.model.state_of(input_ids, cp_group, documents).step
        moving = [
            layer
            for layer, block in self.model.layers.items()
            if step.schedule(block.attn.selection_kind).moves
        ]
        return f"top-k selection of layers {', '.join(moving)}" if moving else "none"

    def _shard_batch(self, cp_mesh: Any, tp_mesh: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        if cp_mesh is None or cp_mesh.size() == 1:
            own = DeepseekV41ForCausalLM.prepare_model_inputs_for_cp(self, batch)["cp_sharder"]
            return own.shard_batch(cp_mesh, tp_mesh, batch, **kwargs)
        context, batch, layout = super()._shard_batch(cp_mesh, tp_mesh, batch, **kwargs)
        padding = batch.pop("padding_mask", None)
        if padding is None:
            padding = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        batch["attention_mask"] = ~padding
        batch["cp_group"] = batch.pop(CP_GROUP_KEY)
        for key in _OF_PACKED_ROWS:  # the documents' numbers say it all
            batch.pop(key, None)
        return context, batch, layout

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        vision_token_types: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_hidden_states: bool = False,
        output_hidden_states: bool = False,
        cp_group: Group | None = None,
        packed_seq_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_padded: torch.Tensor | None = None,
        qkv_format: str | None = None,
    ) -> Any:
        """Run the model and return AutoModel's output; AutoModel's recipes read this signature.

        Args:
            input_ids: Token ids of this rank's shard, [B, L].
            attention_mask: [B, L], 1 = real; so with all below, as AutoModel's.
            position_ids: Of each token in its document.
            labels: At CP size 1 only.
            pixel_values: Patches of images, at CP size 1 only; so with the next two.
            image_grid_hws: Grids of images.
            vision_token_types: -1 for text.
            logits_to_keep: How many of the last positions get logits, 0 for all, or which.
            return_hidden_states: Return the final hidden states [B, L, E] too.
            output_hidden_states: The same, where AutoModel's V4.1 returns the streams before each
                block (as ``self.model`` does): recipes pass this for losses that project hidden
                states, and give them the last.
            cp_group: CP group.
            packed_seq_ids: Number of each token's document, [B, L], 0 for padding.
            seq_lens: Documents of rows that were not sharded, at CP size 1 only; so with the next.
            seq_lens_padded: With the padding after each.
            qkv_format: "thd" with those.

        Raises:
            FloatingPointError: With ``check_finite``, where a tensor is not finite.
            RuntimeError: If training runs under CP with a batch that this model's sharder did not
                cut.
        """
        self._refuse_uncut_batch(cp_group is not None)
        if cp_group is not None and cp_group is not self._routed_over:
            route_over_whole_rows(self, cp_group)
            self._routed_over = cp_group
        if self.training and not self._logged:
            self._logged = True
            log_first_step(
                self,
                input_ids,
                cp_size=cp_size(cp_group),
                packed=packed_seq_ids is not None or seq_lens is not None,
                balancing=self._balancing(input_ids, cp_group, packed_seq_ids),
                all_logits=isinstance(logits_to_keep, int) and logits_to_keep == 0,
                padding=self._padding,
            )
        out = super().forward(
            input_ids,
            attention_mask,
            position_ids,
            labels=labels,
            pixel_values=pixel_values,
            image_grid_hws=image_grid_hws,
            vision_token_types=vision_token_types,
            logits_to_keep=logits_to_keep,
            return_hidden_states=return_hidden_states or output_hidden_states,
            cp_group=cp_group,
            packed_seq_ids=packed_seq_ids,
            seq_lens=seq_lens,
            seq_lens_padded=seq_lens_padded,
            qkv_format=qkv_format,
        )
        if self._finite is not None:
            self._finite.raise_on_all_ranks(cp_group)
        return out
