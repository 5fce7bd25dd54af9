# SPDX-License-Identifier: Apache-2.0
"""V4 attention that sees across the cuts of a context-parallel sequence.

# B batch rows   L local tokens   E hidden   C queries   A query rank (q_lora_rank)   N heads
# D head_dim   I index heads   F index width   K selected entries
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention

from nemo_dsv4_cp.attention.compressor import pool_windows, split_projections, window_features
from nemo_dsv4_cp.attention.indexer import (
    KeptIndices,
    head_weights,
    index_features,
    index_queries,
    pool_index_keys,
    unseen_by_checkpointing,
)
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
        weights_BCI: Weights of the index heads, float32; None where nothing is selected.
    """

    plan: AttentionPlan
    low_BCA: torch.Tensor
    rope: Rope
    weights_BCI: torch.Tensor | None


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
            return self._windowed(hidden_states, position_embeddings, step.transport, plan), None
        rope = position_embeddings_compress
        assert rope is not None, "a compressing layer needs position_embeddings_compress"
        attend = self._local if plan.remote is None else self._with_remote
        return attend(hidden_states, rope, of_windows, step.transport, plan), None

    def _windowed(
        self, hidden: torch.Tensor, rope: Rope, transport: Transport, plan: LayerPlan
    ) -> torch.Tensor:
        """Attend to the sliding window alone; the halo exchange overlaps the query projections."""
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        fetched = transport.fetch({"keys": keys}, plan.moves)
        queries = _Queries(plan.local, self.q_norm(self.wq_a(hidden)), rope, None)
        q = self._project(queries)
        return self._attend(queries, q, fetched.wait()["keys"], keys[:, :0], None)

    def _local(
        self,
        hidden: torch.Tensor,
        rope: Rope,
        of_windows: Rope,
        transport: Transport,
        plan: LayerPlan,
    ) -> torch.Tensor:
        """Attend to this rank's own queries.

        Overlap, in order: the exchange of halos overlaps the low-rank query projection and the
        index queries, the all-gather of index keys the other projection, that of entries top-k
        selection.
        """
        assert plan.windows is not None
        indices = self._indices.recall(rope[0]) if self._indices else None
        select, indexer = self.kind.has_indexer and indices is None, self.compressor.indexer
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        moving = {"keys": keys, **self._features(hidden, index=select)}
        fetched = transport.fetch(moving, plan.moves)

        low = self.q_norm(self.wq_a(hidden))
        weights = head_weights(indexer, hidden) if select else None
        queries = _Queries(plan.local, low, rope, weights)
        q_index = index_queries(indexer, low) if select else None
        rows = fetched.wait()
        to_pool = rows, plan.windows, of_windows, hidden.dtype, self._kernels
        index_keys, entries = self._start_gathers(transport, to_pool, index=select)

        q = self._project(queries)
        if index_keys is not None:
            indices = [self._select(queries, q_index, plan.in_order(index_keys.wait()))]
            if self._indices:
                self._indices.keep(rope[0], indices)
        every = plan.in_order(entries.wait())
        return self._attend(queries, q, rows["keys"], every, indices[0] if indices else None)

    def _with_remote(
        self,
        hidden: torch.Tensor,
        rope: Rope,
        of_windows: Rope,
        transport: Transport,
        plan: LayerPlan,
    ) -> torch.Tensor:
        """Attend to some of this rank's queries and to queries of other ranks.

        Overlap, in order: the exchange of halos and remote queries overlaps the projections of
        local queries, the all-gather of index keys those of remote ones, that of entries top-k
        selection, and the return of remote outputs local attention.
        """
        assert plan.remote is not None and plan.windows is not None
        indices = self._indices.recall(rope[0]) if self._indices else None
        select, indexer = self.kind.has_indexer and indices is None, self.compressor.indexer
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        low, (cos, sin) = self.q_norm(self.wq_a(hidden)), rope
        weights = head_weights(indexer, hidden) if select else None
        moving = {"keys": keys, "remote_low": low, "remote_cos": cos, "remote_sin": sin}
        if weights is not None:
            moving["remote_weights"] = weights
        moving |= self._features(hidden, index=select)
        fetched = transport.fetch(moving, plan.moves)

        own = plan.local_rows
        local = _Queries(
            plan.local,
            take(low, own),
            (take(cos, own), take(sin, own)),
            None if weights is None else take(weights, own),
        )
        q_index = index_queries(indexer, local.low_BCA) if select else None
        q = self._project(local)
        rows = fetched.wait()
        to_pool = rows, plan.windows, of_windows, hidden.dtype, self._kernels
        index_keys, entries = self._start_gathers(transport, to_pool, index=select)

        remote = _Queries(
            plan.remote,
            rows["remote_low"],
            (rows["remote_cos"], rows["remote_sin"]),
            rows.get("remote_weights"),
        )
        remote_q_index = index_queries(indexer, remote.low_BCA) if select else None
        remote_q = self._project(remote)
        if index_keys is not None:
            of_all = plan.in_order(index_keys.wait())
            indices = [
                self._select(remote, remote_q_index, of_all),
                self._select(local, q_index, of_all),
            ]
            if self._indices:
                self._indices.keep(rope[0], indices)
        every = plan.in_order(entries.wait())
        of_remote, of_local = indices or (None, None)
        remote_keys, local_keys = rows["keys"].split(plan.n_keys, dim=1)
        out = self._attend(remote, remote_q, remote_keys, every, of_remote)
        returned = transport.send_back(out, plan.returned)
        return returned(self._attend(local, q, local_keys, every, of_local))

    def _features(self, hidden: torch.Tensor, *, index: bool) -> dict[str, torch.Tensor]:
        """Project tokens to what windows pool: for index keys where ``index``, and for entries."""
        compressor, overlaps = self.compressor, self.kind.overlaps
        features = window_features(compressor, hidden, overlaps=overlaps)
        if index:
            features |= index_features(compressor.indexer, hidden, overlaps=overlaps)
        return features

    def _start_gathers(
        self, transport: Transport, to_pool: _ToPool, *, index: bool
    ) -> tuple[Pending[torch.Tensor] | None, Pending[torch.Tensor]]:
        """Pool this rank's windows and start to gather index keys, where ``index``, and entries."""
        index_keys = None
        if index:
            index_keys = transport.gather(pool_index_keys(self.compressor.indexer, *to_pool))
        return index_keys, transport.gather(pool_windows(self.compressor, *to_pool))

    def _project(self, queries: _Queries) -> torch.Tensor:
        """Return queries [B, C, N, D] before norm and rotary."""
        q = self.wq_b(queries.low_BCA)
        heads: torch.Tensor = q.unflatten(-1, (self.num_heads, self.head_dim))
        return heads

    def _select(
        self, queries: _Queries, q_index: torch.Tensor | None, index_keys: torch.Tensor
    ) -> torch.Tensor:
        """Return the top-k indices of each query, int32 [B, C, K]."""
        assert q_index is not None and queries.weights_BCI is not None
        if not q_index.shape[1]:
            return index_keys.new_empty(len(index_keys), 0, 0, dtype=torch.int32)
        with torch.no_grad(), unseen_by_checkpointing():
            return self._kernels.select_entries(
                IndexQueries(q_index, queries.weights_BCI, queries.rope, queries.plan),
                index_keys,
                topk=self.compressor.indexer.index_topk,
            )

    def _attend(
        self,
        queries: _Queries,
        q: torch.Tensor,
        raw_keys: torch.Tensor,
        entries: torch.Tensor,
        indices: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the queries' rows of the layer's output, [B, C, E]."""
        groups = self.config.o_groups
        if q.shape[1]:
            # Per-head norm without weight: DeepSeek's inference code has it, transformers' not.
            grouped = self._kernels.attend(
                AttentionQueries(q, queries.rope, queries.plan, indices),
                AttentionKeys(raw_keys, entries, self.sinks_param(q)),
                AttentionConstants(self.scaling, self.config.rms_norm_eps, groups),
            )
        else:  # no query is left here, but other ranks wait for this rank's gradients
            nothing = (
                q + raw_keys[:, :0, None] + entries[:, :0, None] + self.sinks_param(q)[:, None]
            )
            grouped = nothing.to(q.dtype).flatten(2).unflatten(2, (groups, -1))
        out: torch.Tensor = self.wo_b(self.wo_a(grouped).flatten(2))
        return out
