# SPDX-License-Identifier: Apache-2.0
"""V4 attention that sees across the cuts of a context-parallel sequence.

# B batch rows   L local tokens   E hidden   C queries   A query rank (q_lora_rank)   N heads
# D head_dim   I index heads   F index width   K selected entries
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.attention.compressor import overlap_half, pool_windows, window_features
from nemo_dsv4_cp.attention.indexer import head_weights, index_queries
from nemo_dsv4_cp.attention.recompute import KeptChoices, unseen_by_checkpointing
from nemo_dsv4_cp.attention.step import STEP_KEY, LayerKind, LayerPlan, QueryRows, StepContext
from nemo_dsv4_cp.automodel.deepseek_v4 import kernel_backend
from nemo_dsv4_cp.automodel.legacy.deepseek_v4 import keywords_of, make_norms_uniform
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, cp_enabled
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.row_plan import take

_IMAGE_PATH_KEYS = ("packed_seq_ids", "vision_token_types")


@dataclass
class _Queries:
    """Queries that are computed together, from low-rank query to attention.

    Attributes:
        rows: Which.
        low_BCA: Normalised low-rank queries.
        rope: Cos and sin of their positions, [B, C, r] each.
        weights_BCI: Weights of the index heads, float32; None where nothing is chosen.
    """

    rows: QueryRows
    low_BCA: torch.Tensor
    rope: Rope
    weights_BCI: torch.Tensor | None


class ContextParallelAttention(DeepseekV4Attention):
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
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is not supported with context "
                "parallelism; set attention_dropout: 0.0"
            )
        make_norms_uniform(self)
        self._options = ContextParallelOptions.of(self.config)
        self.kind = LayerKind.of(self.config, self.compress_ratio)
        named = self._options.kernels
        self.kernels_name = kernel_backend(self.backend) if named == AUTO else named
        self._kernels: Kernels = plugins.load(plugins.KERNELS, self.kernels_name)(
            workspace_bytes=self._options.workspace_mib << 20
        )
        self._kept = KeptChoices() if self._options.keep_index_choice else None

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
        kwargs = keywords_of(rotary_compress, kwargs)
        group: Group | None = kwargs.get(CP_GROUP_KEY) or getattr(self, "_cp_group", None)
        if any(kwargs.get(key) is not None for key in _IMAGE_PATH_KEYS):
            # Images exist at CP size 1 only, where AutoModel's own path serves them.
            assert not cp_enabled(group), f"{_IMAGE_PATH_KEYS} under CP passed the batch's checks"
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
        step: StepContext = kwargs.get(STEP_KEY) or StepContext.of_rows(
            hidden_states.shape[1], group, self._options
        )
        with unseen_by_checkpointing():  # a recomputation finds it made
            plan = step.plan(self.kind, hidden_states.device)
        rope = position_embeddings if self.compressor is None else position_embeddings_compress
        assert rope is not None, "a compressing layer needs position_embeddings_compress"
        if self.compressor is None:
            return self._windowed(hidden_states, rope, step, plan), None
        attend = self._local if plan.remote is None else self._with_remote
        return attend(hidden_states, rope, rotary_compress, step, plan), None

    def _windowed(
        self, hidden: torch.Tensor, rope: Rope, step: StepContext, plan: LayerPlan
    ) -> torch.Tensor:
        """Attend to the sliding window alone; its halo moves behind the query projections."""
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        fetched = step.transport.fetch({"keys": keys}, plan.moves)
        queries = _Queries(plan.local, self.q_norm(self.wq_a(hidden)), rope, None)
        q = self._project(queries)
        return self._attend(queries, q, fetched.wait()["keys"], keys[:, :0], None)

    def _local(
        self, hidden: torch.Tensor, rope: Rope, rotary: Any, step: StepContext, plan: LayerPlan
    ) -> torch.Tensor:
        """Attend to this rank's own queries.

        Overlap, in order: the exchange of halos runs behind the low-rank query projection and the
        index queries, the all-gather of index keys behind the other projection, that of entries
        behind top-k selection.
        """
        transport = step.transport
        chosen = self._recall(rope)
        choose = self._has_indexer and chosen is None
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        fetched = transport.fetch(
            {"keys": keys, **self._features(hidden, index=choose)}, plan.moves
        )
        low = self.q_norm(self.wq_a(hidden))
        weights = self._head_weights(hidden) if choose else None
        queries = _Queries(plan.local, low, rope, weights)
        q_index = self._project_index(queries) if choose else None
        rows = fetched.wait()
        index_keys = None
        if choose:
            index_keys = transport.gather(self._index_keys(rows, plan, rotary, hidden))
        entries = transport.gather(self._entries(rows, plan, rotary, hidden))

        q = self._project(queries)
        if index_keys is not None:
            with _indices_only():
                chosen = [self._choose(queries, q_index, plan.in_order(index_keys.wait()))]
            self._keep(rope, chosen)
        every = plan.in_order(entries.wait())
        return self._attend(queries, q, rows["keys"], every, chosen[0] if chosen else None)

    def _with_remote(
        self, hidden: torch.Tensor, rope: Rope, rotary: Any, step: StepContext, plan: LayerPlan
    ) -> torch.Tensor:
        """Attend to some of this rank's queries and to queries of other ranks.

        Overlap, in order: the exchange of halos and remote queries runs behind the projections of
        local queries, the all-gather of index keys behind those of remote ones, that of entries
        behind top-k selection, and the return of remote outputs behind local attention.
        """
        transport = step.transport
        assert plan.remote is not None and plan.returned is not None
        assert plan.local.rows is not None
        chosen = self._recall(rope)
        choose = self._has_indexer and chosen is None
        keys = self._kernels.rotate(self.kv_norm(self.wkv(hidden)), rope)
        low, (cos, sin) = self.q_norm(self.wq_a(hidden)), rope
        moving = {"keys": keys, "remote_low": low, "remote_cos": cos, "remote_sin": sin}
        weights = None
        if choose:
            moving["remote_weights"] = weights = self._head_weights(hidden)
        moving |= self._features(hidden, index=choose)
        fetched = transport.fetch(moving, plan.moves)

        own = plan.local.rows
        local = _Queries(
            plan.local,
            take(low, own),
            (take(cos, own), take(sin, own)),
            None if weights is None else take(weights, own),
        )
        q_index = self._project_index(local) if choose else None
        q = self._project(local)
        rows = fetched.wait()
        remote = _Queries(
            plan.remote,
            rows["remote_low"],
            (rows["remote_cos"], rows["remote_sin"]),
            rows.get("remote_weights"),
        )
        index_keys = (
            transport.gather(self._index_keys(rows, plan, rotary, hidden)) if choose else None
        )
        entries = transport.gather(self._entries(rows, plan, rotary, hidden))
        remote_q_index = self._project_index(remote) if choose else None
        remote_q = self._project(remote)

        if index_keys is not None:
            with _indices_only():
                keys_of_all = plan.in_order(index_keys.wait())
                chosen = [
                    self._choose(remote, remote_q_index, keys_of_all),
                    self._choose(local, q_index, keys_of_all),
                ]
            self._keep(rope, chosen)
        every = plan.in_order(entries.wait())
        of_remote, of_local = chosen or (None, None)
        remote_keys, local_keys = rows["keys"].split(plan.n_keys, dim=1)
        out = self._attend(remote, remote_q, remote_keys, every, of_remote)
        returning = transport.send_back(out, plan.returned)
        out = self._attend(local, q, local_keys, every, of_local)
        return returning.wait({"rows": out})["rows"]

    @property
    def _has_indexer(self) -> bool:
        return self.compressor.indexer is not None

    def _recall(self, rope: Rope) -> Sequence[torch.Tensor] | None:
        """Return the choice of the forward that is being recomputed, if one was kept."""
        return self._kept.recall(rope[0]) if self._kept and self._has_indexer else None

    def _keep(self, rope: Rope, chosen: Sequence[torch.Tensor]) -> None:
        if self._kept:
            self._kept.keep(rope[0], chosen)

    def _features(self, hidden: torch.Tensor, *, index: bool) -> dict[str, torch.Tensor]:
        """Project tokens to what windows pool: of the compressor, and of the indexer if asked."""
        features: dict[str, torch.Tensor] = {}
        if index:
            with _indices_only():
                features |= self._features_of(self.compressor.indexer, hidden, "index_")
        return features | self._features_of(self.compressor, hidden, "")

    def _features_of(self, module: Any, hidden: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        features = window_features(module, hidden)
        if not self.kind.overlaps:
            return {f"{name}features": features}
        return {f"{name}features": features, f"{name}overlap": overlap_half(module, features)}

    def _entries(
        self, rows: dict[str, torch.Tensor], plan: LayerPlan, rotary: Any, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Pool this rank's entries, [B, n, D]."""
        return self._pooled(self.compressor, "", rows, plan, rotary, hidden)

    def _index_keys(
        self, rows: dict[str, torch.Tensor], plan: LayerPlan, rotary: Any, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Pool this rank's index keys, [B, n, F]."""
        with _indices_only():
            return self._pooled(self.compressor.indexer, "index_", rows, plan, rotary, hidden)

    def _pooled(
        self,
        module: Any,
        name: str,
        rows: dict[str, torch.Tensor],
        plan: LayerPlan,
        rotary: Any,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Pool the windows of a compressor or indexer, whose rows were fetched under ``name``."""
        assert plan.windows is not None
        with _indices_only():  # made by the first layer that needs them
            rope = plan.windows.rope(rotary, hidden)
        return pool_windows(
            module,
            rows[f"{name}features"],
            rows.get(f"{name}overlap"),
            plan.windows,
            rope=rope,
            dtype=hidden.dtype,
            kernels=self._kernels,
        )

    def _head_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        with _indices_only():
            return head_weights(self.compressor.indexer, hidden)

    def _project(self, queries: _Queries) -> torch.Tensor:
        """Return queries [B, C, N, D] before norm and rotary."""
        q = self.wq_b(queries.low_BCA)
        heads: torch.Tensor = q.unflatten(-1, (self.num_heads, self.head_dim))
        return heads

    def _project_index(self, queries: _Queries) -> torch.Tensor:
        with _indices_only():
            return index_queries(self.compressor.indexer, queries.low_BCA)

    def _choose(
        self, queries: _Queries, q_index: torch.Tensor | None, index_keys: torch.Tensor
    ) -> torch.Tensor:
        """Return the top-k indices of each query, int32 [B, C, K]."""
        if not len(queries.rows):
            return index_keys.new_empty(len(index_keys), 0, 0, dtype=torch.int32)
        assert q_index is not None and queries.weights_BCI is not None
        return self._kernels.choose_entries(
            q_index,
            queries.weights_BCI,
            index_keys,
            queries.rope,
            queries=queries.rows.attention.queries,
            ratio=self.kind.ratio,
            topk=self.compressor.indexer.index_topk,
        )

    def _attend(
        self,
        queries: _Queries,
        q: torch.Tensor,
        raw_keys: torch.Tensor,
        entries: torch.Tensor,
        chosen: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the queries' rows of the layer's output, [B, C, E]."""
        groups = self.config.o_groups
        if len(queries.rows):
            # Per-head norm without weight: DeepSeek's inference code has it, transformers' not.
            grouped = self._kernels.attend(
                q,
                raw_keys,
                entries,
                self.sinks_param(q),
                chosen,
                queries.rope,
                plan=queries.rows.attention,
                scale=self.scaling,
                eps=self.config.rms_norm_eps,
                groups=groups,
            )
        else:  # other ranks have them all, and wait for gradients, be they of nothing
            grouped = (q + raw_keys[:, :0, None]).flatten(2).unflatten(2, (groups, -1))
        out: torch.Tensor = self.wo_b(self.wo_a(grouped).flatten(2))
        return out


@contextmanager
def _indices_only() -> Iterator[None]:
    """Compute what top-k indices are made of: integers, without gradient."""
    with torch.no_grad(), unseen_by_checkpointing():
        yield
