# SPDX-License-Identifier: Apache-2.0
"""V4 attention that sees across the cuts of a context-parallel sequence.

# B batch rows   L local tokens   E hidden   C queries   A query rank (q_lora_rank)   N heads
# D head_dim   I index heads   F index width   K selected entries
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention

from nemo_dsv4_cp.attention.compressor import pool_windows, split_projections, window_features
from nemo_dsv4_cp.attention.indexer import Indexer, KeptIndices, unseen_by_checkpointing
from nemo_dsv4_cp.attention.indexer_loss import IndexerLossSums, loss_of, with_loss
from nemo_dsv4_cp.attention.kernel_use import UsesKernels
from nemo_dsv4_cp.attention.split_linear import BF16X3
from nemo_dsv4_cp.attention.step import STEP_KEY, LayerKind, LayerPlan, StepContext
from nemo_dsv4_cp.automodel.legacy.deepseek_v4 import make_norms_uniform
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, Pending, cp_enabled
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexerLossTerms,
    IndexQueries,
    Kernels,
    Rope,
)
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.row_plan import take
from nemo_dsv4_cp.sequence.windows import Windows

_ToPool = tuple[dict[str, torch.Tensor], Windows, Rope, torch.dtype, Kernels]
"""What windows are pooled from and how: the arguments of ``pool_windows`` after its module."""

_IMAGE_PATH_KEYS = ("packed_seq_ids", "vision_token_types")


@dataclass(frozen=True)
class _Queries:
    """Queries that are computed together, from low-rank query to attention.

    Attributes:
        plan: Which keys each sees.
        low_BCA: Normalized low-rank queries.
        rope: Cos and sin of their positions, [B, C, r] each.
        index_BCIF: Index queries; None where the indexer has nothing to do.
        weights_BCI: Weights of the index heads, float32; None with them.
        share_BC1: What each query weighs in the indexer's loss; None without one.
    """

    plan: AttentionPlan
    low_BCA: torch.Tensor
    rope: Rope
    index_BCIF: torch.Tensor | None = None
    weights_BCI: torch.Tensor | None = None
    share_BC1: torch.Tensor | None = None

    @classmethod
    def of(
        cls, plan: AttentionPlan, tensors: Mapping[str, torch.Tensor], indexer: Indexer | None
    ) -> _Queries:
        """Return queries of what moves with them, as ``_of_queries`` names it."""
        low = tensors["remote_low"]
        return cls(
            plan,
            low,
            (tensors["remote_cos"], tensors["remote_sin"]),
            None if indexer is None else indexer.queries(low),
            tensors.get("remote_weights"),
            tensors.get("remote_share"),
        )


class ContextParallelAttention(UsesKernels, DeepseekV4Attention):
    """AutoModel's ``DeepseekV4Attention``: same constructor, parameters and call, any cp_size.

    It goes by positions and never reads ``attention_mask``, which AutoModel strips at cp_size > 1
    and ep_size 1; padding must be on the right.
    """

    def __init__(self, config: Any, layer_idx: int, backend: Any = None) -> None:
        super().__init__(config, layer_idx, backend)
        self._adopted()

    @classmethod
    def adopt(cls, attention: DeepseekV4Attention) -> ContextParallelAttention:
        """Turn an AutoModel attention into this class in place, keeping its parameters.

        AutoModel's blocks name their attention class themselves. Building a second one would draw
        random numbers that AutoModel's model does not draw, and other weights after them.
        """
        attention.__class__ = cls
        attention._adopted()
        adopted: ContextParallelAttention = attention
        return adopted

    def _adopted(self) -> None:
        self._take_options(ContextParallelOptions.of(self.config))
        make_norms_uniform(self)
        if self._options.compressor_precision == BF16X3:
            split_projections(self.compressor)
        self.kind = LayerKind.of(self.config, self.compress_ratio)
        keeps = self.kind.has_indexer and self._options.keep_index_choice
        self._indices = KeptIndices() if keeps else None
        self.indexer_losses = IndexerLossSums() if self.kind.has_indexer else None
        # Per-head norm without weight: DeepSeek's inference code has it, transformers' not.
        eps = self.config.rms_norm_eps
        self._constants = AttentionConstants(self.scaling, eps, self.config.o_groups)

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
        """Attend within the documents of a row, cut into equal contiguous shards.

        Args:
            hidden_states: This rank's [B, L, E].
            position_embeddings: Cos and sin for layers without compression, [B, L, rope].
            attention_mask: Not read.
            position_embeddings_compress: Cos and sin for layers with compression.
            rotary_compress: AutoModel's rotary embedding of compressed entries.
            start_pos: 0; there is no cache in training.
            position_ids: Not read; the embeddings hold them.
            **kwargs: ``cp_step``, the forward's :class:`StepContext`; without it rows of one
                document each, cut over the group of ``_dsv4_cp_group`` or ``setup_cp_attention``.

        Returns:
            [B, L, E], and None in place of attention weights.

        Raises:
            ValueError: If the shard length or ``start_pos`` cannot work.
        """
        # The blocks of AutoModel 0.5 drop a forward's keywords: they come with the embedding.
        kwargs |= getattr(rotary_compress, "keywords", {})
        step: StepContext | None = kwargs.get(STEP_KEY)
        if step is None:
            group: Group | None = kwargs.get(CP_GROUP_KEY) or getattr(self, "_cp_group", None)
            if any(kwargs.get(key) is not None for key in _IMAGE_PATH_KEYS):
                # Images exist at CP size 1 only, where AutoModel's own path serves them.
                assert not cp_enabled(group), "images under CP passed the batch's checks"
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
            step = StepContext.of_rows(hidden_states.shape[1], group, self._options)
        if start_pos:
            raise ValueError(f"start_pos={start_pos} is not supported in training; use 0")
        with torch.no_grad(), unseen_by_checkpointing():  # a recomputation finds both made
            plan = step.plan(self.kind, hidden_states.device)
            of_windows = step.window_rope(plan, rotary_compress, hidden_states)
        if of_windows is None:
            return self._windowed(hidden_states, position_embeddings, step, plan), None
        rope = position_embeddings_compress
        assert rope is not None, "a compressing layer needs position_embeddings_compress"
        attend = self._local if plan.remote is None else self._with_remote
        return attend(hidden_states, rope, of_windows, step, plan), None

    def _windowed(
        self, hidden: torch.Tensor, rope: Rope, step: StepContext, plan: LayerPlan
    ) -> torch.Tensor:
        """Attend to the sliding window alone; the halo exchange overlaps the query projections."""
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        fetched = step.transport.fetch({"keys": keys}, plan.moves)
        queries = _Queries(plan.local, self.q_norm(self.wq_a(hidden)), rope)
        q = self._project(queries)
        of_window = AttentionKeys(fetched.wait()["keys"], keys[:, :0], self.sinks_param(q))
        return self._attend(queries, q, of_window, None)

    def _local(
        self,
        hidden: torch.Tensor,
        rope: Rope,
        of_windows: Rope,
        step: StepContext,
        plan: LayerPlan,
    ) -> torch.Tensor:
        """Attend to this rank's own queries.

        Overlap, in order: the exchange of halos overlaps the low-rank query projection and the
        index queries, the all-gather of index keys the other projection, that of entries top-k
        selection.
        """
        assert plan.windows is not None
        indices, indexer = self._begin(rope, step)
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        fetched = step.transport.fetch({"keys": keys} | self._features(hidden, indexer), plan.moves)

        queries = _Queries.of(plan.local, self._of_queries(hidden, rope, indexer), indexer)
        rows = fetched.wait()
        to_pool = rows, plan.windows, of_windows, hidden.dtype, self._kernels
        index_keys, entries = self._start_gathers(step.transport, to_pool, indexer)

        q = self._project(queries)
        of_all = None if index_keys is None else plan.in_order(index_keys.wait())
        if indexer is not None and indices is None:
            indices = [self._select(queries, of_all)]
            if self._indices:
                self._indices.keep(rope[0], indices)
        (selected,) = indices or (None,)
        seen = AttentionKeys(rows["keys"], plan.in_order(entries.wait()), self.sinks_param(q))
        out = self._attend(queries, q, seen, selected)
        if indexer is None or indexer.share_BL1 is None:
            return out
        return self._with_loss(out, self._loss(queries, q, seen, selected, of_all))

    def _with_remote(
        self,
        hidden: torch.Tensor,
        rope: Rope,
        of_windows: Rope,
        step: StepContext,
        plan: LayerPlan,
    ) -> torch.Tensor:
        """Attend to some of this rank's queries and to queries of other ranks.

        Overlap, in order: the exchange of halos and remote queries overlaps the projections of
        local queries, the all-gather of index keys those of remote ones, that of entries top-k
        selection, and the return of remote outputs local attention.
        """
        assert plan.remote is not None and plan.windows is not None
        indices, indexer = self._begin(rope, step)
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        own = self._of_queries(hidden, rope, indexer)
        moving = {"keys": keys} | own | self._features(hidden, indexer)
        fetched = step.transport.fetch(moving, plan.moves)

        stay = {name: take(own[name], plan.local_rows) for name in own}
        local = _Queries.of(plan.local, stay, indexer)
        q = self._project(local)
        rows = fetched.wait()
        to_pool = rows, plan.windows, of_windows, hidden.dtype, self._kernels
        index_keys, entries = self._start_gathers(step.transport, to_pool, indexer)

        remote = _Queries.of(plan.remote, rows, indexer)
        remote_q = self._project(remote)
        of_all = None if index_keys is None else plan.in_order(index_keys.wait())
        if indexer is not None and indices is None:
            indices = [self._select(remote, of_all), self._select(local, of_all)]
            if self._indices:
                self._indices.keep(rope[0], indices)
        of_remote, of_local = indices or (None, None)
        every, sinks = plan.in_order(entries.wait()), self.sinks_param(q)
        remote_keys, local_keys = rows["keys"].split(plan.n_keys, dim=1)
        seen = AttentionKeys(local_keys, every, sinks)
        remote_seen = AttentionKeys(remote_keys, every, sinks)
        out = self._attend(remote, remote_q, remote_seen, of_remote)
        returned = step.transport.send_back(out, plan.returned)
        out = returned(self._attend(local, q, seen, of_local))
        if indexer is None or indexer.share_BL1 is None:
            return out
        loss = self._loss(remote, remote_q, remote_seen, of_remote, of_all)
        return self._with_loss(out, loss + self._loss(local, q, seen, of_local, of_all))

    def _begin(
        self, rope: Rope, step: StepContext
    ) -> tuple[Sequence[torch.Tensor] | None, Indexer | None]:
        """Return the top-k indices of a forward that this one computes again, and the indexer.

        None where there are none, and where the indexer has nothing to do.
        """
        indices = self._indices.recall(rope[0]) if self._indices else None
        share = step.loss_weights_BL1 if torch.is_grad_enabled() else None
        if not self.kind.has_indexer or (indices is not None and share is None):
            return indices, None
        return indices, Indexer(self.compressor.indexer, share)

    def _of_queries(
        self, hidden: torch.Tensor, rope: Rope, indexer: Indexer | None
    ) -> dict[str, torch.Tensor]:
        """Return what moves with queries that another rank computes, each [B, L, ...]."""
        low, (cos, sin) = self.q_norm(self.wq_a(hidden)), rope
        tensors = {"remote_low": low, "remote_cos": cos, "remote_sin": sin}
        if indexer is not None:
            tensors["remote_weights"] = indexer.weights(hidden)
            if indexer.share_BL1 is not None:
                tensors["remote_share"] = indexer.share_BL1
        return tensors

    def _features(self, hidden: torch.Tensor, indexer: Indexer | None) -> dict[str, torch.Tensor]:
        """Project tokens to what windows pool: for entries, and for index keys with an indexer."""
        exact, hidden = hidden.dtype is torch.bfloat16, hidden.float()  # one copy for both
        overlaps = self.kind.overlaps
        features = window_features(self.compressor, hidden, overlaps=overlaps, exact=exact)
        if indexer is not None:
            features |= indexer.features(hidden, overlaps=overlaps, exact=exact)
        return features

    def _start_gathers(
        self, transport: Transport, to_pool: _ToPool, indexer: Indexer | None
    ) -> tuple[Pending[torch.Tensor] | None, Pending[torch.Tensor]]:
        """Pool this rank's windows and start to gather index keys, with an indexer, and entries."""
        index_keys = None
        if indexer is not None:
            index_keys = transport.gather(indexer.pool_keys(*to_pool))
        return index_keys, transport.gather(pool_windows(self.compressor, *to_pool))

    def _project(self, queries: _Queries) -> torch.Tensor:
        """Return queries [B, C, N, D] before norm and rotary."""
        q = self.wq_b(queries.low_BCA)
        heads: torch.Tensor = q.unflatten(-1, (self.num_heads, self.head_dim))
        return heads

    def _select(self, queries: _Queries, index_keys: torch.Tensor | None) -> torch.Tensor:
        """Return the top-k indices of each query, int32 [B, C, K]."""
        q_index, weights = queries.index_BCIF, queries.weights_BCI
        assert q_index is not None and weights is not None and index_keys is not None
        if not q_index.shape[1]:
            return index_keys.new_empty(len(index_keys), 0, 0, dtype=torch.int32)
        with torch.no_grad(), unseen_by_checkpointing():
            if queries.share_BC1 is not None:
                q_index = q_index.clone()  # kernels may write over it, and the loss reads it
            return self._kernels.select_entries(
                IndexQueries(q_index, weights, queries.rope, queries.plan),
                index_keys,
                topk=self.compressor.indexer.index_topk,
            )

    def _attend(
        self,
        queries: _Queries,
        q: torch.Tensor,
        keys: AttentionKeys,
        indices: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the queries' rows of the layer's output, [B, C, E]."""
        constants = self._constants
        if q.shape[1]:
            attended = AttentionQueries(q, queries.rope, queries.plan, indices)
            grouped = self._kernels.attend(attended, keys, constants)
        else:  # no query is left here, but other ranks wait for this rank's gradients
            nothing = q + keys.raw_BTD[:, :0, None] + keys.entries_BPD[:, :0, None]
            nothing = (nothing + keys.sinks_N[:, None]).to(q.dtype)
            grouped = nothing.flatten(2).unflatten(2, (constants.groups, -1))
        out: torch.Tensor = self.wo_b(self.wo_a(grouped).flatten(2))
        return out

    def _loss(
        self,
        queries: _Queries,
        q: torch.Tensor,
        keys: AttentionKeys,
        indices: torch.Tensor | None,
        index_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the indexer's loss of the queries, and what it captured: float32 [2]."""
        q_index, weights, share = queries.index_BCIF, queries.weights_BCI, queries.share_BC1
        assert q_index is not None and weights is not None and share is not None
        assert index_keys is not None

        def compute() -> IndexerLossTerms:
            return self._kernels.indexer_loss(
                IndexQueries(q_index, weights, queries.rope, queries.plan),
                index_keys,
                AttentionQueries(q, queries.rope, queries.plan, indices),
                keys,
                self._constants,
                token_weights_BL=share[..., 0],
                full=self._options.indexer_loss.mode == "full",
            )

        with unseen_by_checkpointing():
            return loss_of(q_index, weights, index_keys, compute)

    def _with_loss(self, out: torch.Tensor, loss_captured: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, whose gradient brings the loss's, and note it for the log."""
        assert self.indexer_losses is not None
        self.indexer_losses.add(loss_captured)
        return with_loss(out, loss_captured[0], self._options.indexer_loss.coefficient)
