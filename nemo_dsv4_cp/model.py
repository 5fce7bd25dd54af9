# SPDX-License-Identifier: Apache-2.0
"""The registered architecture: AutoModel's V4 with attention that sees across the cuts.

# B batch rows   L local tokens   E hidden   M hyper-connection streams
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention
from nemo_automodel.components.models.deepseek_v4.model import (
    DeepseekV4CausalLMOutput,
    DeepseekV4ForCausalLM,
)

from nemo_dsv4_cp.attention.indexer_loss import step_metrics
from nemo_dsv4_cp.attention.kernel_use import UsesKernels
from nemo_dsv4_cp.attention.layer import ContextParallelAttention
from nemo_dsv4_cp.attention.step import STEP_KEY
from nemo_dsv4_cp.automodel import lora, router_replay
from nemo_dsv4_cp.automodel.contracts import batch_contract
from nemo_dsv4_cp.automodel.deepseek_v4 import reset_uninitialised_norms, shows_images
from nemo_dsv4_cp.automodel.hash_routing import keep_ids_for_recomputation
from nemo_dsv4_cp.automodel.indexer_freeze import train_indexer
from nemo_dsv4_cp.automodel.legacy.deepseek_v4 import reset_what_checkpoints_bring
from nemo_dsv4_cp.automodel.mtp import forward_with_mtp, shifted_inputs
from nemo_dsv4_cp.automodel.rope_scaling import resolve_rope_scaling
from nemo_dsv4_cp.automodel.tilelang import named_but_missing
from nemo_dsv4_cp.backbone import ContextParallelModel, route_over_whole_rows, step_of
from nemo_dsv4_cp.checks.batch_rules import padding_of
from nemo_dsv4_cp.checks.certificate import Subject, with_measured_rate
from nemo_dsv4_cp.checks.consistency import compare_settings, settings_of
from nemo_dsv4_cp.checks.finite import FiniteCheck
from nemo_dsv4_cp.checks.kernel_choice import TORCH, choose_kernels
from nemo_dsv4_cp.exchange.collectives import (
    CP_GROUP_KEY,
    cp_enabled,
    is_first_rank,
    sharding_groups,
    trains_on_gpus,
)
from nemo_dsv4_cp.gpus import gpu_here
from nemo_dsv4_cp.model_batches import ShardsBatches
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.packing import is_packed, token_documents, tokens_ahead
from nemo_dsv4_cp.startup import balancing_of, log_first_step

if TYPE_CHECKING:
    from nemo_automodel.components.models.common.mtp import MTPContextParallelInputs

_logger = logging.getLogger(__name__)


def use_certified_kernels(model: Any) -> None:
    """Train with the kernels that certificates settle for this job; all ranks call it together.

    AutoModel's check of a model against the job's mesh does. On CPUs and for ``kernels: torch``
    there is nothing to settle.

    Args:
        model: One of V4 or V4.1; its layers compute with these kernels from now on, and
            ``balance: auto`` decides by their rate.

    Raises:
        ValueError: If kernels that the recipe names fail on a rank's GPU and ``kernels_check`` is
            strict.
    """
    options = ContextParallelOptions.of(model.config)
    if not trains_on_gpus() or options.kernels == TORCH or options.kernels_check == "off":
        if options.kernels == AUTO and named_but_missing(model.backend) and is_first_rank():
            _logger.info(
                "TileLang, which model.backend.attn: tilelang names, is not installed: torch"
            )
        return
    chosen = choose_kernels(
        None if options.kernels == AUTO else options.kernels,
        partial(
            Subject.of,
            config=model.config.get_text_config(),
            dtype=str(next(model.parameters()).dtype).split(".")[-1],
            workspace_bytes=options.workspace_bytes,
        ),
        strict=options.kernels_check == "strict",
    )
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.use_kernels(chosen.kernels)
    model.model.gpu = with_measured_rate(gpu_here(), chosen)


class DeepseekV4ContextParallelForCausalLM(ShardsBatches, DeepseekV4ForCausalLM):
    """V4 for causal language modelling at any ``distributed.cp_size``.

    Registered in AutoModel's ``nemo_automodel.architectures`` and named by
    ``DeepseekV4ContextParallelConfig``. Parameters, state dict and checkpoints are AutoModel's.
    """

    _owns_cp_attention = True
    _owns_packed_attention = True
    _resumes_on_other_ranks = True
    # Set here, not by the constructor alone: AutoModel's tools make models without calling it.
    _finite: FiniteCheck | None = None
    _logged = False
    supports_thd = True  # AutoModel then calls our sharder at CP size 1 too, for packed rows
    # AutoModel keeps these by exact class name (_transformers/model_parallelization.py).
    parallel_layer_groups = {"language": ("model.layers",), "vision": ("model.vision.blocks",)}  # noqa: RUF012

    @dataclass(frozen=True)
    class ModelCapabilities(DeepseekV4ForCausalLM.ModelCapabilities):
        """AutoModel's, and MTP under CP; not with pipeline stages beside it."""

        supports_mtp_cp: bool = True

    def __init__(
        self, config: Any, moe_config: Any = None, backend: Any = None, **kwargs: Any
    ) -> None:
        # AutoModel reads this signature to separate the constructor's arguments from config fields.
        config.rope_scaling = resolve_rope_scaling(config.rope_scaling)
        with router_replay.own_gates_only(self):
            super().__init__(config, moe_config, backend, **kwargs)
        keep_ids_for_recomputation(self)
        batch_contract().adopt(self)
        options = ContextParallelOptions.of(config)
        self._shard_as(options, config.compress_ratios)
        self.model.__class__ = ContextParallelModel
        for module in self.modules():
            if type(module) is DeepseekV4Attention:
                ContextParallelAttention.adopt(module)
        self._finite = FiniteCheck(self) if options.check_finite else None

    def prepare_mtp_inputs_for_cp(
        self, batch: dict[str, Any], *, ignore_index: int = -100
    ) -> MTPContextParallelInputs:
        """Shift the full batch for each MTP depth, before it is sharded: AutoModel's contract.

        Args:
            batch: The full batch; not changed but for ``position_ids`` where it has none.
            ignore_index: Label of tokens that have no target.

        Returns:
            Ids, positions and targets [B, S] per depth. None crosses into the next document.

        Raises:
            NotImplementedError: Before AutoModel 0.7, whose recipes are the first to call it.
        """
        documents = {"seq_idx": token_documents(batch)} if is_packed(batch) else {}
        return shifted_inputs(
            batch | documents, num_depths=self.mtp_config.num_layers, ignore_index=ignore_index
        )

    def choose_kernels(self) -> None:
        """Compute with the kernels that this job chooses: :func:`use_certified_kernels`."""
        use_certified_kernels(self)

    resolve_lora_targets = lora.resolve_targets

    def select_trained_parameters(self) -> bool:
        """Train the indexer where it has a loss; False leaves it frozen, as AutoModel does."""
        options = ContextParallelOptions.of(self.config)
        if options.trains_indexer:
            train_indexer(self, alone=options.train_only == "indexer")
        return options.trains_indexer

    take_indexer_metrics = staticmethod(step_metrics)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *mtp_embed_inputs: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        n_images_per_sample: torch.Tensor | None = None,
        vision_token_types: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        mtp_per_depth_input_ids: Sequence[torch.Tensor] | None = None,
        mtp_per_depth_position_ids: Sequence[torch.Tensor] | None = None,
        **attn_kwargs: Any,
    ) -> Any:
        """Run the model, its MTP layers too while training, and return AutoModel's output.

        The arguments are AutoModel's, whose recipes read this signature: tokens [B, L] of this
        rank's shard, and images and an ``attention_mask`` (1 = real) at CP size 1 only.

        Args:
            input_ids: Token ids.
            *mtp_embed_inputs: What an earlier pipeline stage embedded for MTP.
            position_ids: Global positions.
            attention_mask: As AutoModel's; so with the next seven.
            padding_mask: Bool, True = pad.
            pixel_values: Patches of images.
            image_grid_hws: Grids of images.
            n_images_per_sample: Images of each row.
            vision_token_types: -1 for text.
            logits_to_keep: How many of the last positions get logits, 0 for all, or which.
            output_hidden_states: Return the final hidden states [B, L, E] too.
            mtp_per_depth_input_ids: Under CP, this rank's shard, one per depth, of the ids that
                :meth:`prepare_mtp_inputs_for_cp` shifted.
            mtp_per_depth_position_ids: Not read: as in AutoModel at CP size 1, an MTP layer rotates
                by the position of the token that it predicts from.
            **attn_kwargs: For attention, such as ``_dsv4_cp_group``.

        Raises:
            FloatingPointError: With ``check_finite``, where a tensor is not finite.
            RuntimeError: If training runs under CP with a batch that this model's sharder did not
                cut.
            ValueError: If MTP runs under CP without ``mtp_per_depth_input_ids``.
        """
        group = attn_kwargs.get(CP_GROUP_KEY)
        self._refuse_uncut_batch(CP_GROUP_KEY in attn_kwargs)
        if group is not None and group is not self._routed_over:
            route_over_whole_rows(self, group)
            self._routed_over = group
        images = shows_images(
            self.model,
            input_ids=input_ids,
            pixel_values=pixel_values,
            vision_token_types=vision_token_types,
            checked=cp_enabled(group),
        )
        tokens = input_ids if input_ids is not None else attn_kwargs.get("inputs_embeds")
        if tokens is not None and tokens.dim() > 1 and not images:
            options = ContextParallelOptions.of(self.config)
            rows, length = tokens.shape[:2]
            step, padding_mask = step_of(
                attn_kwargs, rows, length, options, padding_mask, self.model.gpu
            )
            if self.training and not self._logged:
                self._logged = True
                all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
                log_first_step(
                    self,
                    tokens,
                    cp_size=step.layout.cp_size,
                    packed=step.layout.packed,
                    balancing=balancing_of(self, step),
                    all_logits=all_logits,
                    padding=self._padding,
                )
        text: dict[str, Any] = {
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "padding_mask": padding_mask,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
        }
        predicts = self.mtp is not None and self.training and not images
        if predicts and input_ids is not None and not self._is_pipeline_parallel_stage():
            out = self._forward_with_mtp(input_ids, mtp_per_depth_input_ids, text, attn_kwargs)
        else:
            shown = {
                "pixel_values": pixel_values,
                "image_grid_hws": image_grid_hws,
                "n_images_per_sample": n_images_per_sample,
                "vision_token_types": vision_token_types,
            }
            # Releases without a vision tower take none of these.
            shown = {name: value for name, value in shown.items() if value is not None}
            out = super().forward(input_ids, *mtp_embed_inputs, **text, **shown, **attn_kwargs)
        if self._finite is not None:
            self._finite.raise_on_all_ranks(group)
        return out

    def _forward_with_mtp(
        self,
        input_ids: torch.Tensor,
        shifted_ids: Sequence[torch.Tensor] | None,
        text: dict[str, Any],
        attn_kwargs: dict[str, Any],
    ) -> DeepseekV4CausalLMOutput:
        """Prepare what MTP needs of this step, and run the model with it."""
        layout = attn_kwargs[STEP_KEY].layout
        device = input_ids.device
        if shifted_ids is None and cp_enabled(attn_kwargs.get(CP_GROUP_KEY)):
            raise ValueError(
                "MTP under context parallelism needs mtp_per_depth_input_ids: the tokens after a "
                "shard's last are the next rank's. Call prepare_mtp_inputs_for_cp on the full "
                "batch and shard what it returns, or set num_nextn_predict_layers: 0"
            )
        if shifted_ids is None:
            starts, _ = layout.documents_at(layout.positions(device))
            documents = starts if layout.packed else None
            depths = range(1, self.mtp_config.num_layers + 1)
            shifted_ids = [tokens_ahead(input_ids, depth, documents) for depth in depths]
        if text["position_ids"] is None:
            positions = layout.document_positions(device)
            text = text | {"position_ids": positions.expand(len(input_ids), -1)}
        if text["attention_mask"] is not None and text["padding_mask"] is None:
            text = text | {"padding_mask": padding_of(text["attention_mask"])}
        return forward_with_mtp(self, input_ids, shifted_ids, **text, attn_kwargs=attn_kwargs)

    @torch.no_grad()
    def initialize_weights(
        self, buffer_device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Initialise as AutoModel does, and the norms that it forgets.

        Args:
            buffer_device: Where buffers live; by default with the parameters (AutoModel: CUDA).
            dtype: Dtype that unsharded parameters are cast to.
        """
        first = next(self.parameters())
        for group in sharding_groups(first):
            # Models of other sizes would be lost before the first step, among the collectives that
            # AutoModel runs for each parameter.
            compare_settings(settings_of(self), group)
        device = buffer_device or first.device
        for module in self.modules():
            if isinstance(module, ContextParallelAttention):
                reset_uninitialised_norms(module)
        reset_what_checkpoints_bring(self)
        super().initialize_weights(buffer_device=device, dtype=dtype)
