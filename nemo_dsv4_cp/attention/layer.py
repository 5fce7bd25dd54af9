"""V4 attention that sees across the cuts of a context-parallel sequence.

# B batch rows   L local tokens   E hidden   N heads   D head_dim   T raw keys   P entries
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.attention.compressor import overlap_half, pool_windows, window_features
from nemo_dsv4_cp.attention.indexer import select_entries
from nemo_dsv4_cp.attention.recompute import KeptChoices, unseen_by_checkpointing
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, cp_enabled, cp_rank, cp_size
from nemo_dsv4_cp.exchange.transport import LeftContext, Transport
from nemo_dsv4_cp.host.deepseek_v4 import (
    kernel_backend,
    keywords_of,
    make_norms_uniform,
)
from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan

LAYOUT_KEY = "cp_layout"
"""Keyword under which the model hands a step's layout to attention."""

_HOST_PATH_KEYS = ("packed_seq_ids", "vision_token_types")


class ContextParallelAttention(DeepseekV4Attention):
    """The host's ``DeepseekV4Attention``: same constructor, parameters and call, any cp_size.

    It goes by positions and never reads ``attention_mask``, which the host strips at cp_size > 1
    and ep_size 1; padding must be on the right.
    """

    def __init__(self, config: Any, layer_idx: int, backend: Any = None) -> None:
        super().__init__(config, layer_idx, backend)
        self._adopted()

    @classmethod
    def adopt(cls, attention: DeepseekV4Attention) -> ContextParallelAttention:
        """Turn a host attention into this class in place, keeping its parameters.

        The host's blocks name their attention class themselves. Building a second one would draw
        random numbers that the host's model does not draw, and other weights after them.
        """
        attention.__class__ = cls
        attention._adopted()
        adopted: ContextParallelAttention = attention
        return adopted

    def _adopted(self) -> None:
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is not supported with context "
                "parallelism; set attention_dropout: 0.0"
            )
        make_norms_uniform(self)
        options = getattr(self.config, "context_parallel", None) or ContextParallelOptions()
        self._transport_cls = plugins.load(plugins.TRANSPORTS, options.transport)
        named = kernel_backend(self.backend) if options.kernels == AUTO else options.kernels
        self._kernels: Kernels = plugins.load(plugins.KERNELS, named)(
            workspace_bytes=options.workspace_mib << 20
        )
        self._kept = KeptChoices() if options.keep_index_choice else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_embeddings_compress: tuple[torch.Tensor, torch.Tensor] | None = None,
        rotary_compress: Any = None,
        start_pos: int = 0,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend within one document a row, cut into equal contiguous shards.

        Args:
            hidden_states: This rank's [B, L, E].
            position_embeddings: Cos and sin for layers without compression, [B, L, rope].
            attention_mask: Not read.
            position_embeddings_compress: Cos and sin for layers with compression.
            rotary_compress: The host's rotary embedding of compressed entries.
            start_pos: 0; there is no cache in training.
            position_ids: Not read; the embeddings hold them.
            **kwargs: ``_dsv4_cp_group`` hands over the CP group when ``setup_cp_attention`` did
                not.

        Returns:
            [B, L, E], and None in place of attention weights.

        Raises:
            ValueError: If the shard length or ``start_pos`` cannot work.
        """
        kwargs = keywords_of(rotary_compress, kwargs)
        group: Group | None = kwargs.get(CP_GROUP_KEY) or getattr(self, "_cp_group", None)
        if any(kwargs.get(key) is not None for key in _HOST_PATH_KEYS):
            # Packed rows and images exist at CP size 1 only, where the host's path serves them.
            assert not cp_enabled(group), f"{_HOST_PATH_KEYS} under CP passed the batch's checks"
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                position_embeddings,
                attention_mask,
                position_embeddings_compress,
                rotary_compress,
                start_pos,
                position_ids,
                **kwargs,
            )
        if start_pos:
            raise ValueError(f"start_pos={start_pos} is not supported in training; use 0")

        batch, length = hidden_states.shape[:2]
        layout = kwargs.get(LAYOUT_KEY) or SequenceLayout(length, cp_rank(group), cp_size(group))
        transport: Transport = self._transport_cls(group, layout)
        compresses = self.compressor is not None
        rope = position_embeddings_compress if compresses else position_embeddings
        assert rope is not None, "a compressing layer needs position_embeddings_compress"

        q_residual = self.q_norm(self.wq_a(hidden_states))
        q_BLND = self.wq_b(q_residual).view(batch, length, self.num_heads, self.head_dim)
        kv_BLD = self.kv_norm(self.wkv(hidden_states))
        kv_BLD = self._kernels.rotate(kv_BLD, rope)

        if compresses:
            raw, entries_BPD, chosen_BLK = self._compressed(
                hidden_states, q_residual, kv_BLD, rope, rotary_compress, layout, transport
            )
        else:
            (raw,) = transport.left_context([kv_BLD], [self.sliding_window - 1])
            entries_BPD, chosen_BLK = kv_BLD[:, :0], None

        plan = AttentionPlan(
            layout=layout,
            raw_first=raw.first,
            window=self.sliding_window,
            ratio=self.compress_ratio,
        )
        # Per-head norm without weight: DeepSeek's inference code has it, transformers' port not.
        grouped = self._kernels.attend(
            q_BLND,
            raw.tensor,
            entries_BPD,
            self.sinks_param(q_BLND),
            chosen_BLK,
            rope,
            plan=plan,
            scale=self.scaling,
            eps=self.config.rms_norm_eps,
            groups=self.config.o_groups,
        )
        return self.wo_b(self.wo_a(grouped).flatten(2)), None

    def _compressed(
        self,
        hidden_BLE: torch.Tensor,
        q_residual: torch.Tensor,
        kv_BLD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        rotary: Any,
        layout: SequenceLayout,
        transport: Transport,
    ) -> tuple[LeftContext, torch.Tensor, torch.Tensor | None]:
        """Return raw keys, all ranks' entries, and for CSA the indexer's choice."""
        compressor, indexer = self.compressor, self.compressor.indexer
        dtype, kernels = hidden_BLE.dtype, self._kernels
        ratio, window_left = self.compress_ratio, self.sliding_window - 1
        windows, straddling = layout.windows(ratio, hidden_BLE.device), layout.straddling(ratio)
        halos = [kv_BLD, window_features(compressor, hidden_BLE)]
        tokens = [window_left, straddling]
        if indexer is None:
            raw, features = transport.left_context(halos, tokens)
            entries = pool_windows(compressor, features, None, windows, rotary, dtype, kernels)
            return raw, self._gather(entries, layout, transport), None

        halos.append(overlap_half(compressor, halos[-1]))
        tokens.append(ratio + straddling)
        chosen = self._kept.recall(rope[0]) if self._kept else None
        if chosen is None:
            with torch.no_grad(), unseen_by_checkpointing():
                index_features = window_features(indexer, hidden_BLE)
                halos += [index_features, overlap_half(indexer, index_features)]
            tokens += tokens[1:]
        raw, features, before, *index = transport.left_context(halos, tokens)
        entries = pool_windows(compressor, features, before, windows, rotary, dtype, kernels)
        if chosen is None:
            with torch.no_grad(), unseen_by_checkpointing():  # the choice is made of integers
                index_keys = pool_windows(
                    indexer, index[0], index[1], windows, rotary, dtype, kernels
                )
                chosen = select_entries(
                    indexer,
                    hidden_BLE,
                    q_residual,
                    rope,
                    self._gather(index_keys, layout, transport),
                    layout,
                    kernels,
                )
            if self._kept:
                self._kept.keep(rope[0], chosen)
        return raw, self._gather(entries, layout, transport), chosen

    def _gather(
        self, entries: torch.Tensor, layout: SequenceLayout, transport: Transport
    ) -> torch.Tensor:
        return layout.entries_in_order(transport.gather_entries(entries), self.compress_ratio)
