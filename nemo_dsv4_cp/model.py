"""The registered architecture: the host's V4 with attention that sees across the cuts.

# B batch rows   L local tokens   E hidden   M hyper-connection streams
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention
from nemo_automodel.components.models.deepseek_v4.model import (
    DeepseekV4CausalLMOutput,
    DeepseekV4ForCausalLM,
    DeepseekV4Model,
    compute_lm_head_logits,
)

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.agreement import compare_settings, settings_of
from nemo_dsv4_cp.attention.layer import LAYOUT_KEY, ContextParallelAttention
from nemo_dsv4_cp.batch import local_token_indices
from nemo_dsv4_cp.batch_checks import padding_of, refuse_left_padding
from nemo_dsv4_cp.exchange import roll_call
from nemo_dsv4_cp.exchange.collectives import (
    CP_GROUP_KEY,
    Group,
    all_reduce_sum,
    cp_enabled,
    cp_rank,
    cp_size,
    sharding_groups,
)
from nemo_dsv4_cp.finite import FiniteCheck
from nemo_dsv4_cp.host import fsdp, resume
from nemo_dsv4_cp.host.contracts import batch_contract
from nemo_dsv4_cp.host.deepseek_v4 import (
    reset_uninitialised_norms,
    reset_what_checkpoints_bring,
    sees_images,
    with_keywords,
)
from nemo_dsv4_cp.host.job import cp_size_of
from nemo_dsv4_cp.host.mtp_contract import shifted_inputs
from nemo_dsv4_cp.host.sharding import ContextParallelSharder
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import validate_cp_size
from nemo_dsv4_cp.sequence.packed_layout import PackedLayout
from nemo_dsv4_cp.sequence.packing import document_starts, is_packed, token_documents, tokens_ahead

if TYPE_CHECKING:
    from nemo_automodel.components.models.common.mtp import MTPContextParallelInputs


def packed_layout_of(kwargs: dict[str, Any], rows: int, length: int) -> PackedLayout | None:
    """Take the documents of packed rows out of a forward's keyword arguments.

    Args:
        kwargs: Changed in place: what describes packing leaves it.
        rows: B.
        length: L, local tokens.

    Returns:
        The layout of this step, None for rows of one document each.

    Raises:
        KeyError: If rows are marked as packed and no lengths tell their documents.
    """
    if LAYOUT_KEY in kwargs:
        layout: PackedLayout = kwargs[LAYOUT_KEY]
        return layout
    if not is_packed(kwargs):
        return None
    group = kwargs.get(CP_GROUP_KEY)
    starts = document_starts(kwargs, rows, length * cp_size(group))
    for key in _PACKING_KEYS:
        kwargs.pop(key, None)
    if starts is None:
        raise KeyError(
            "packed rows (qkv_format: thd) need `seq_lens` or `cu_seqlens` beside them; nothing "
            "else tells where documents end"
        )
    return PackedLayout.of_documents(starts, length, cp_rank=cp_rank(group), cp_size=cp_size(group))


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
    """The host's V4 backbone without its dense [L, S] attention mask."""

    _cp_group: Group | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
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
            return_hc_hidden: Return the hidden streams too.
            **attn_kwargs: For attention; ``_dsv4_cp_group`` above all.

        Returns:
            Hidden states [B, L, E], or on an earlier pipeline stage the streams [B, L, M, E]; with
            ``return_hc_hidden`` the streams as well.

        Raises:
            ValueError: For left padding, or when there is no input.
        """
        self._cp_group = attn_kwargs.get(CP_GROUP_KEY)
        if sees_images(self):  # at CP size 1 only, where the host serves images
            hosted: torch.Tensor = super().forward(
                input_ids,
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                return_hc_hidden=return_hc_hidden,
                **attn_kwargs,
            )
            return hosted
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
        layout = packed_layout_of(attn_kwargs, batch, length)
        if layout is not None:
            attn_kwargs[LAYOUT_KEY] = layout
        if position_ids is None:
            position_ids = torch.arange(length, device=like_BLE.device)
            if layout is not None:
                position_ids = layout.document_positions(like_BLE.device)
        position_ids = torch.atleast_2d(position_ids).expand(batch, -1)
        rope = self.rotary_emb(like_BLE, position_ids)
        rope_compress = self.rotary_emb_compress(like_BLE, position_ids)
        attn_kwargs.pop("vision_token_types", None)
        rotary_compress = with_keywords(self.rotary_emb_compress, attn_kwargs)
        for block in self.layers.values():
            if block is None:  # trimmed from this pipeline stage
                continue
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

        The host sums expert loads over the mesh that shards the bias. With ep_size 1 none does, and
        each rank would come to route by a bias of its own.
        """
        for gate in self.modules():
            load = getattr(gate, "_cumulative_expert_load", None)
            if load is None or sharding_groups(gate.e_score_correction_bias):
                continue
            # FSDP2's mesh, which shards the weight, spans data and CP ranks.
            groups = sharding_groups(gate.weight) or [self._cp_group]
            gate._cumulative_expert_load = all_reduce_sum(load, groups)
        super().update_moe_gate_bias()


class DeepseekV4ContextParallelForCausalLM(DeepseekV4ForCausalLM):
    """V4 for causal language modelling at any ``distributed.cp_size``.

    Registered in the host's ``nemo_automodel.architectures`` and named by
    ``DeepseekV4ContextParallelConfig``. Parameters, state dict and checkpoints are the host's.
    """

    _owns_cp_attention = True
    _owns_packed_attention = True
    _settings_are_one = False  # the ranks of the CP group compare them on the first step
    supports_thd = True  # the host then asks for our sharder at CP size 1 too, for packed rows
    # The host keeps these by exact class name (_transformers/model_parallelization.py).
    parallel_layer_groups = {"language": ("model.layers",), "vision": ("model.vision.blocks",)}  # noqa: RUF012

    @dataclass(frozen=True)
    class ModelCapabilities(DeepseekV4ForCausalLM.ModelCapabilities):
        """The host's, and MTP under CP; not with pipeline stages beside it."""

        supports_mtp_cp: bool = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        batch_contract().install(self)
        fsdp.install()
        resume.install(type(self))
        roll_call.install()
        options = getattr(config, "context_parallel", None) or ContextParallelOptions()
        self._batch_fn = plugins.load(plugins.BATCH_FNS, options.batch_fn)
        self._pad_multiple = options.resolve_pad_multiple(config.compress_ratios)
        self._pad_documents = options.pad_documents
        self._compare_ranks = options.compare_ranks
        self.model.__class__ = ContextParallelModel
        for module in self.modules():
            if type(module) is DeepseekV4Attention:
                ContextParallelAttention.adopt(module)
        self._finite = FiniteCheck(self) if options.check_finite else None

    def prepare_model_inputs_for_cp(
        self, batch: dict[str, Any], *, num_chunks: int = 1
    ) -> dict[str, Any]:
        """Return the sharder of this model under ``cp_sharder``, the host's contract.

        Args:
            batch: The full batch; not changed here.
            num_chunks: Pipeline microbatches; they split the batch dimension, which is not cut.
        """
        return {
            "cp_sharder": ContextParallelSharder(
                shard_batch=self._shard_batch, local_token_global_indices=local_token_indices
            )
        }

    def _shard_batch(self, cp_mesh: Any, tp_mesh: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        if cp_mesh is not None and cp_mesh.size() > 1 and not self._settings_are_one:
            # Before all else, and whatever the options say: they may be what differs.
            compare_settings(settings_of(self), cp_mesh.get_group())
            self._settings_are_one = True
        if cp_mesh is not None:
            validate_cp_size(
                cp_mesh.size(),
                pad_multiple=self._pad_multiple,
                max_seq_len=self.config.max_position_embeddings,
            )
        compare = self._compare_ranks != "never"
        if self._compare_ranks == "first":
            self._compare_ranks = "never"
        return self._batch_fn(
            cp_mesh,
            tp_mesh,
            batch,
            pad_multiple=self._pad_multiple,
            pad_documents=self._pad_documents,
            compare_ranks=compare,
            sync_packed_length=self.backend.dispatcher == "hybridep",
            vocab_size=getattr(self.model.embed_tokens, "num_embeddings", self.config.vocab_size),
            **kwargs,
        )

    def prepare_mtp_inputs_for_cp(
        self, batch: dict[str, Any], *, ignore_index: int = -100
    ) -> MTPContextParallelInputs:
        """Shift the full batch for each MTP depth, before it is cut: the host's contract.

        Args:
            batch: The full batch; not changed but for ``position_ids`` where it has none.
            ignore_index: Label of tokens that have no target.

        Returns:
            Ids, positions and targets [B, S] a depth. None crosses from a document into the next.

        Raises:
            NotImplementedError: If the host's recipes do not ask for it (before 0.7).
        """
        documents = {"seq_idx": token_documents(batch)} if is_packed(batch) else {}
        return shifted_inputs(
            batch | documents, num_depths=self.mtp_config.num_layers, ignore_index=ignore_index
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *mtp_embed_inputs: torch.Tensor,
        mtp_per_depth_input_ids: Sequence[torch.Tensor] | None = None,
        mtp_per_depth_position_ids: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model, its MTP layers too while training.

        Args:
            input_ids: Token ids [B, L].
            *mtp_embed_inputs: What an earlier pipeline stage embedded for MTP.
            mtp_per_depth_input_ids: Under CP, this rank's shard of the ids that
                :meth:`prepare_mtp_inputs_for_cp` shifted, [B, L] a depth.
            mtp_per_depth_position_ids: Not read: as in the host at CP size 1, an MTP layer rotates
                by the position of the token that it predicts from.
            **kwargs: As the host's forward takes them.

        Returns:
            The host's output.

        Raises:
            FloatingPointError: With ``check_finite``, where a tensor is not finite.
            RuntimeError: If training runs under CP with a batch that this model's sharder did not
                cut.
            ValueError: If MTP runs under CP without ``mtp_per_depth_input_ids``.
        """
        size = cp_size_of(self)
        if size > 1 and self.training and CP_GROUP_KEY not in kwargs:
            raise RuntimeError(
                f"distributed.cp_size={size}, and the recipe did not cut the batch with this "
                "model's prepare_model_inputs_for_cp; use a recipe that does, such as "
                "TrainFinetuneRecipeForNextTokenPrediction, or set distributed.cp_size: 1"
            )
        stage = self._is_pipeline_parallel_stage()
        hosted = self.mtp is None or not self.training or stage or sees_images(self.model)
        if hosted or input_ids is None:
            out = super().forward(input_ids, *mtp_embed_inputs, **kwargs)
        else:
            out = self._forward_with_mtp(input_ids, mtp_per_depth_input_ids, **kwargs)
        if self._finite is not None:
            self._finite.raise_on_all_ranks(kwargs.get(CP_GROUP_KEY))
        return out

    def _forward_with_mtp(
        self,
        input_ids: torch.Tensor,
        shifted_ids: Sequence[torch.Tensor] | None,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        **attn_kwargs: Any,
    ) -> DeepseekV4CausalLMOutput:
        """What the host's forward does with MTP, less its dense [L, S] mask."""
        rows, length = input_ids.shape
        packed = attn_kwargs.get("qkv_format") == "thd"
        layout = packed_layout_of(attn_kwargs, rows, length)
        if layout is not None:
            attn_kwargs[LAYOUT_KEY] = layout
        depths = range(1, self.mtp_config.num_layers + 1)
        if shifted_ids is None and cp_enabled(attn_kwargs.get(CP_GROUP_KEY)):
            raise ValueError(
                "MTP under context parallelism needs mtp_per_depth_input_ids: the tokens after a "
                "shard's last are the next rank's. Call prepare_mtp_inputs_for_cp on the full "
                "batch and shard what it returns, or set num_nextn_predict_layers: 0"
            )
        if shifted_ids is None:
            documents = (
                None if layout is None else layout.first_keys(layout.positions(input_ids.device))
            )
            shifted_ids = [tokens_ahead(input_ids, depth, documents) for depth in depths]
        hidden, streams = self.model(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            padding_mask=padding_mask,
            return_hc_hidden=True,
            **attn_kwargs,
        )
        logits = compute_lm_head_logits(
            self.lm_head, hidden, logits_to_keep, is_thd=packed, fp32_lm_head=True
        ).logits
        if position_ids is None and layout is not None:
            position_ids = layout.document_positions(input_ids.device)
        if attention_mask is not None and padding_mask is None:
            padding_mask = padding_of(attention_mask)
        predicted = self.mtp(
            streams,
            embed_inputs=[self.model.embed_tokens(ids) for ids in shifted_ids],
            position_ids=position_ids,
            padding_mask=padding_mask,
            **attn_kwargs,
        )
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        return DeepseekV4CausalLMOutput(
            logits=logits,
            hidden_states=hidden if output_hidden_states else None,
            mtp_per_depth_h=predicted,
            mtp_loss_scaling_factor=self.mtp_config.loss_scaling_factor,
        )

    @torch.no_grad()
    def initialize_weights(
        self, buffer_device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Initialise as the host does, and the norms that it forgets.

        Args:
            buffer_device: Where buffers live; by default with the parameters (the host: CUDA).
            dtype: Dtype that unsharded parameters are cast to.
        """
        first = next(self.parameters())
        for group in sharding_groups(first):
            # Models of other sizes would be lost before the first step, among the collectives that
            # the host runs for each parameter.
            compare_settings(settings_of(self), group)
        device = buffer_device or first.device
        for module in self.modules():
            if isinstance(module, ContextParallelAttention):
                reset_uninitialised_norms(module)
        reset_what_checkpoints_bring(self)
        super().initialize_weights(buffer_device=device, dtype=dtype)
