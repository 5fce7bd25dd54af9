# SPDX-License-Identifier: Apache-2.0
"""V4.1 attention (CSA2) that sees across the cuts of a context-parallel sequence.

V4's is in :mod:`nemo_dsv4_cp.attention.layer`. Here few layers compress: those of
``kv_source_layer_ids`` gather entries and index keys once, for themselves and for all layers up to
the next source. Those of ``index_source_layer_ids`` select; the layers after them reuse what they
selected. All of that travels from layer to layer in a :class:`SharedState`.

Attention costs the same at every position. Selecting among all visible entries does not, and some
of it moves to other ranks: they receive index queries, and return what they select.

# B batch rows   L local tokens   E hidden   A query rank (q_lora_rank)   N heads   D head_dim
# P compressed entries of all ranks   I index heads   F index width   K selected entries
# M candidate blocks   C remote queries
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v41 import attention as automodels
from nemo_automodel.components.models.deepseek_v41.attention import (
    DeepseekV41Attention,
    DeepseekV41AttentionOutput,
)

from nemo_dsv4_cp.attention.gradient_sum import GradientSum, summing_gradients
from nemo_dsv4_cp.attention.indexer import (
    KeptIndices,
    checkpoints_selectively,
    unseen_by_checkpointing,
)
from nemo_dsv4_cp.attention.kernel_use import UsesKernels
from nemo_dsv4_cp.attention.step import LayerKind, StepContext
from nemo_dsv4_cp.exchange.collectives import Group, Pending, all_gather_metadata, cp_rank, cp_size
from nemo_dsv4_cp.gpus import Gpu
from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    CandidateBlocks,
    RotatedIndexQueries,
)
from nemo_dsv4_cp.kernels.reference.cache_formats import MXFP4, NVFP4, CacheCodec, CacheFormat
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.lengths import aligned_starts
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.row_plan import take
from nemo_dsv4_cp.sequence.schedule import SelectionCost


@dataclass(frozen=True, eq=False)
class SharedState:
    """What layers of one forward hand on, in place of AutoModel's ``DeepseekV41AttentionState``.

    Attributes:
        step: The forward's context.
        ratio: Compress ratio of the entries, 0 before the first source.
        entries_BPD: Compressed entries of all ranks, rotated and quantized.
        entries_grad: Sum of their gradients over the layers that attend to them; None where
            autograd sums.
        index_keys_BPF: Their index keys, rotated and quantized; no gradient.
        selected_BLK: Entries that each local query attends to, int32.
        candidates_BLM: Blocks of entries within which later layers select, int32; None before the
            layer that chooses them.
    """

    step: StepContext
    ratio: int = 0
    entries_BPD: torch.Tensor | None = None
    entries_grad: GradientSum | None = None
    index_keys_BPF: torch.Tensor | None = None
    selected_BLK: torch.Tensor | None = None
    candidates_BLM: torch.Tensor | None = None

    @classmethod
    def start(
        cls,
        length: int,
        options: ContextParallelOptions,
        *,
        group: Group | None,
        documents_BL: torch.Tensor | None,
        alignment: int,
        gpu: Gpu | None = None,
    ) -> SharedState:
        """Return the state before the first layer.

        Args:
            length: L.
            options: The model's.
            group: CP group, None without CP.
            documents_BL: Number of each local token's document, 0 for padding; None if each row
                is one document. The ranks gather them: 4 bytes per token.
            alignment: What the documents' starts are multiples of.
            gpu: By whose rates ``balance: auto`` decides; by default those of the table.
        """
        rank, ranks = cp_rank(group), cp_size(group)
        if documents_BL is None:
            layout = SequenceLayout(length, rank, ranks)
        else:
            numbers = all_gather_metadata(documents_BL.int(), dim=1, cp_group=group)
            layout = SequenceLayout.of_documents(
                aligned_starts(numbers, alignment), length, cp_rank=rank, cp_size=ranks
            )
        return cls(StepContext(layout, group, options, gpu))


@dataclass(frozen=True, eq=False)
class _IndexQueries:
    """The queries that one rank selects for.

    Attributes:
        local: Of its own tokens.
        remote: Of other ranks' tokens, on their way; None where each rank selects for its own.
    """

    local: RotatedIndexQueries
    remote: Pending[RotatedIndexQueries] | None


class ContextParallelAttentionV41(UsesKernels, DeepseekV41Attention):
    """AutoModel's ``DeepseekV41Attention``: same constructor, parameters and call, any cp_size."""

    quantizes = True
    """Whether keys are quantized, as AutoModel does always; tests of gradients switch it off."""

    def __init__(self, config: Any, layer_idx: int, backend: Any) -> None:
        super().__init__(config, layer_idx, backend)
        self._adopted(config, ContextParallelOptions())

    @classmethod
    def adopt(
        cls, attention: DeepseekV41Attention, config: Any, options: ContextParallelOptions
    ) -> ContextParallelAttentionV41:
        """Turn an AutoModel attention into this class in place, keeping its parameters.

        Args:
            attention: Changed.
            config: The model's text config.
            options: The model's.
        """
        attention.__class__ = cls
        adopted: ContextParallelAttentionV41 = attention
        adopted._adopted(config, options)
        return adopted

    def _adopted(self, config: Any, options: ContextParallelOptions) -> None:
        self._take_options(options)
        ratio = self.compress_ratio
        self.kind = LayerKind(
            ratio=ratio,
            overlaps=False,
            has_indexer=False,  # not pooled with the entries, as V4's index keys are
            window=self.window_size,
            cost=None,  # attention stays
        )
        self.selection_kind = replace(self.kind, cost=_selection_cost(config, self.indexer))
        self._alignment = document_alignment(config)
        keeps = self.indexer is not None and options.keep_index_choice
        self._selections = KeptIndices() if keeps else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        state: Any,
        attention_mask: torch.Tensor | None = None,
        cp_group: Group | None = None,
        packed_seq_ids: torch.Tensor | None = None,
    ) -> DeepseekV41AttentionOutput:
        """Attend within the documents of a row, cut into equal contiguous shards.

        Overlap, in order: the exchange of halos overlaps the low-rank query projection and a
        source's compression, the all-gather of index keys and the exchange of remote index queries
        the query projection, the all-gather of entries top-k selection, and the return of what was
        selected for remote queries the selection for local ones.

        Args:
            hidden_states: This rank's [B, L, E].
            position_ids: Of each token in its document, [B, L] or [1, L].
            state: What the layer before returned; before the first, AutoModel's empty state.
            attention_mask: [B, L], 1 = real; padding gets zeros. It must be on the right.
            cp_group: CP group; by default that of ``setup_cp_attention``.
            packed_seq_ids: Number of each token's document, [B, L], 0 for padding.

        Returns:
            [B, L, E], and the state for the next layer.
        """
        length = hidden_states.shape[1]
        if not isinstance(state, SharedState):
            group: Group | None = self.cp_group if cp_group is None else cp_group
            state = SharedState.start(
                length,
                self._options,
                group=group,
                documents_BL=packed_seq_ids,
                alignment=self._alignment,
            )
        step, real = state.step, _real_tokens(hidden_states, attention_mask)
        with torch.no_grad(), unseen_by_checkpointing():
            plan = step.plan(self.kind, hidden_states.device)
        angles = self.rotary_emb(position_ids)
        keys = automodels._apply_rope(self.kv_norm(self.wkv(hidden_states)), angles)
        if self.quantizes:
            keys = automodels.quantize_cache(keys, format="fp8", block_size=32)
        fetched = step.transport.fetch({"keys": keys}, plan.moves)
        gathers = None
        if self.compressor is not None:
            gathers = self._start_gathers(hidden_states, position_ids, state)
        low = self.q_norm(self.wq_a(hidden_states))
        kept = self._selections.recall(position_ids) if self._selections else None
        queries = None
        if self.indexer is not None and kept is None:
            queries = self._index_queries(hidden_states, low, angles, step)
        q = self.wq_b(low).unflatten(-1, (self.num_heads, self.head_dim))
        if checkpoints_selectively():
            q = q.clone()  # kernels may rotate it in place, and this product may be saved
        if gathers is not None:
            index_keys, entries = gathers
            state = replace(state, ratio=self.compress_ratio, index_keys_BPF=index_keys.wait())
        if queries is not None:
            kept = self._select(queries, state)
            del queries  # not there too while attention runs
            if self._selections:
                self._selections.keep(position_ids, kept)
        if kept is not None:
            selected, *made = kept
            candidates = made[0] if made else state.candidates_BLM
            state = replace(state, selected_BLK=selected, candidates_BLM=candidates)
        if gathers is not None:
            every, entries_grad = summing_gradients(entries.wait())
            state = replace(state, entries_BPD=every, entries_grad=entries_grad)
        rope = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
        grouped = self._kernels.attend(
            AttentionQueries(q, rope, plan.local, state.selected_BLK if self.kind.ratio else None),
            self._keys(fetched.wait()["keys"], state, self.sinks_param(q)),
            AttentionConstants(self.head_dim**-0.5, None, self.num_groups),
        )
        out = self.wo_b(self.wo_a(grouped).flatten(2))
        return DeepseekV41AttentionOutput(out.masked_fill(~real[..., None], 0), state)

    def _start_gathers(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, state: SharedState
    ) -> tuple[Pending[torch.Tensor], Pending[torch.Tensor]]:
        """Compress this rank's tokens, and start to gather index keys and entries of all ranks."""
        latent, ratio = self.compressor(hidden), self.compress_ratio
        angles = self.rotary_emb(position_ids[:, : latent.shape[1] * ratio : ratio])
        indexer, gather = self.indexer, state.step.transport.gather
        with torch.no_grad(), unseen_by_checkpointing():
            keys = automodels._apply_rope(indexer.k_norm(indexer.wk(latent)), angles)
            index_keys = gather(keys, codec=self._codec(MXFP4, keys))
        entries = automodels._apply_rope(latent, angles)
        return index_keys, gather(entries, codec=self._codec(NVFP4, entries))

    def _codec(self, format: CacheFormat, values: torch.Tensor) -> CacheCodec | None:
        return CacheCodec(format, values.shape[-1], values.dtype) if self.quantizes else None

    def _index_queries(
        self, hidden: torch.Tensor, low: torch.Tensor, angles: torch.Tensor, step: StepContext
    ) -> _IndexQueries:
        """Project index queries, and start to move those that another rank selects for.

        The weights' formula is that of AutoModel's ``_Indexer.forward``.
        """
        indexer = self.indexer
        with torch.no_grad(), unseen_by_checkpointing():
            plan = step.plan(self.selection_kind, hidden.device)
            q = indexer.wq_b(low).unflatten(-1, (indexer.num_heads, indexer.head_dim))
            q = automodels._apply_rope(q, angles)
            weights = indexer.weights_proj(hidden)
            weights = weights * (indexer.head_dim**-0.5 * indexer.num_heads**-0.5)
            remote = plan.remote
            if remote is None:
                if self.quantizes:
                    q = automodels.quantize_cache(q, format="mxfp4", block_size=32)
                return _IndexQueries(RotatedIndexQueries(q, weights, plan.local), None)
            codec = self._codec(MXFP4, q)
            sent = {"remote_index": codec.encode(q) if codec else q, "remote_weights": weights}
            fetched = step.transport.fetch(sent, plan.moves)
            own = {name: take(rows, plan.local_rows) for name, rows in sent.items()}

            def ready(rows: Mapping[str, torch.Tensor], of: AttentionPlan) -> RotatedIndexQueries:
                codes = rows["remote_index"]
                q = codec.decode(codes) if codec else codes
                return RotatedIndexQueries(q, rows["remote_weights"], of)

            arriving = Pending(lambda: ready(fetched.wait(), remote))
            return _IndexQueries(ready(own, plan.local), arriving)

    def _select(self, queries: _IndexQueries, state: SharedState) -> list[torch.Tensor]:
        """Return top-k indices [B, L, K], and candidates [B, L, M] if this layer chooses them."""
        with torch.no_grad(), unseen_by_checkpointing():
            if queries.remote is None:
                return self._select_for(queries.local, state)
            plan = state.step.plan(self.selection_kind, queries.local.q_BLIF.device)
            of_remote = self._select_for(queries.remote.wait(), state)
            send_back = state.step.transport.send_back
            returned = [send_back(each_BCx, plan.returned) for each_BCx in of_remote]
            of_local = self._select_for(queries.local, state)
            return [finish(each) for finish, each in zip(returned, of_local, strict=True)]

    def _select_for(self, queries: RotatedIndexQueries, state: SharedState) -> list[torch.Tensor]:
        """Return what :meth:`_select` does, for queries that are here."""
        indexer, keys = self.indexer, state.index_keys_BPF
        assert keys is not None, "a layer that selects comes before any that compresses"
        selected, candidates = self._kernels.select_shared(
            queries,
            keys,
            topk=indexer.topk,
            blocks=CandidateBlocks(indexer.candidate_topk_blocks, indexer.candidate_block_size)
            if indexer.is_candidate_source or indexer.uses_candidates
            else None,
            candidates_BLM=state.candidates_BLM if indexer.uses_candidates else None,
        )
        return [selected] if candidates is None else [selected, candidates]

    def _keys(
        self, raw_BTD: torch.Tensor, state: SharedState, sinks_N: torch.Tensor
    ) -> AttentionKeys:
        """Return what this layer attends to; no entries if it does not compress."""
        if not self.compress_ratio:
            return AttentionKeys(raw_BTD, raw_BTD[:, :0], sinks_N)
        entries, gradients = state.entries_BPD, state.entries_grad
        # AutoModel's config refuses a compressed layer without a source of its ratio before it.
        assert entries is not None and state.ratio == self.compress_ratio
        if gradients is None:
            return AttentionKeys(raw_BTD, entries, sinks_N)
        return AttentionKeys(raw_BTD, gradients.read(entries), sinks_N, gradients.total)


def _selection_cost(config: Any, indexer: Any) -> SelectionCost | None:
    """Return what selecting for a query costs; None where it does not grow with the position."""
    if indexer is None or indexer.uses_candidates:
        return None
    return SelectionCost.of(
        config,
        head_bytes=MXFP4.bytes_of(config.index_head_dim),
        chooses_candidates=indexer.is_candidate_source,
    )


def document_alignment(config: Any) -> int:
    """Return what AutoModel aligns the documents of packed rows to: the LCM of the ratios."""
    return math.lcm(
        *(ratio for ratio in config.compress_ratios[: config.num_hidden_layers] if ratio)
    )


def _real_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which local tokens are not padding, bool [B, L]."""
    if attention_mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return attention_mask.bool()
