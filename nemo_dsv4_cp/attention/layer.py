"""V4 attention that sees across the cuts of a context-parallel sequence.

# B batch rows   L local tokens   E hidden   C queries of a part
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4Attention

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.attention.compressor import Pooling
from nemo_dsv4_cp.attention.indexer import head_weights, index_queries
from nemo_dsv4_cp.attention.parts import Part, Tokens
from nemo_dsv4_cp.attention.recompute import KeptChoices, unseen_by_checkpointing
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, cp_enabled, cp_rank, cp_size
from nemo_dsv4_cp.exchange.rows import start_exchange
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.host.deepseek_v4 import (
    kernel_backend,
    keywords_of,
    make_norms_uniform,
)
from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.routes import routes
from nemo_dsv4_cp.sequence.schedule import QueryCost, Schedule, contiguous, schedule_of

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
        self._overlap, self._balance = options.overlap, str(options.balance)
        self._query_cost = QueryCost.of(self.config, self.compress_ratio)
        named = kernel_backend(self.backend) if options.kernels == AUTO else options.kernels
        self.kernels_name = named
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

        layout = kwargs.get(LAYOUT_KEY) or SequenceLayout(
            hidden_states.shape[1], cp_rank(group), cp_size(group)
        )
        compresses = self.compressor is not None
        rope = position_embeddings_compress if compresses else position_embeddings
        assert rope is not None, "a compressing layer needs position_embeddings_compress"
        transport: Transport = self._transport_cls(group, overlap=self._overlap)
        keys_BLD = self._kernels.rotate(self.kv_norm(self.wkv(hidden_states)), rope)
        tokens = Tokens(hidden_states, keys_BLD, rope)
        if not compresses:
            return self._windowed(tokens, layout, transport), None
        return self._compressed(tokens, layout, transport, group, rotary_compress), None

    def schedule(self, layout: SequenceLayout) -> Schedule:
        """Return which rank computes which queries of this layer."""
        return schedule_of(layout, self.compress_ratio, self._balance, self._query_cost)

    def _windowed(
        self, tokens: Tokens, layout: SequenceLayout, transport: Transport
    ) -> torch.Tensor:
        """Attend to the window alone."""
        route = routes(layout, contiguous(layout), self.sliding_window)
        fetched = transport.fetch([tokens.keys], [route.kept_keys])
        self._project_low_rank(tokens)
        part = Part.of_own(route.kept, tokens)
        self._project(part)
        (part.raw,) = fetched.wait()
        return self._attend(part, tokens.keys[:, :0], None)

    def _compressed(
        self,
        tokens: Tokens,
        layout: SequenceLayout,
        transport: Transport,
        group: Group | None,
        rotary: Any,
    ) -> torch.Tensor:
        """Attend to the window and to past entries, each query where the schedule says.

        What hides what, in forward and the same in backward: low-rank queries the exchange, or
        where they are sent by it, projections of the kept ones; other projections the gather of
        index keys, the choice that of entries, and attention of the kept queries the way home of
        what the taken ones yield.
        """
        ratio, indexer = self.compress_ratio, self.compressor.indexer
        route = routes(layout, self.schedule(layout), self.sliding_window)
        moved = route.moved
        recalled = self._kept.recall(tokens.rope[0]) if self._kept else None
        choices: Sequence[torch.Tensor | None] = recalled or (None, None)
        chooses = indexer is not None and recalled is None

        pools = [Pooling(self.compressor, tokens.hidden, layout)]
        if chooses:
            with _whole_numbers_only():
                pools.insert(0, Pooling(indexer, tokens.hidden, layout))
                tokens.index_weights = head_weights(indexer, tokens.hidden)
        asked = [(tokens.keys, route.kept_keys)]
        if moved is not None:
            self._project_low_rank(tokens)
            asked.append((tokens.keys, moved.keys))
            asked += [(rows, moved.rows) for rows in tokens.of_queries()]
        for pool in pools:
            asked += pool.asked
        fetched = transport.fetch([rows for rows, _ in asked], [moves for _, moves in asked])

        self._project_low_rank(tokens)
        kept = Part.of_own(route.kept, tokens)
        parts = [kept]
        if chooses:
            self._project_index(kept)
        if moved is not None:
            self._project(kept)
        answers = iter(fetched.wait())
        kept.raw = next(answers)
        if moved is not None:
            raw = next(answers)
            rows = [next(answers) for _ in tokens.of_queries()]
            parts.insert(0, Part.of_rows(moved.queries, rows, raw))
        gathers = []
        for pool in pools:
            with _whole_numbers_only() if pool.module is indexer else nullcontext():
                entries = pool.entries(answers, rotary, tokens.hidden.dtype, self._kernels)
                gathers.append(transport.gather_entries(entries))

        for part in parts:
            if chooses:
                self._project_index(part)
            self._project(part)
        if chooses:
            with _whole_numbers_only():
                index_keys = layout.entries_in_order(gathers[0].wait(), ratio)
                choices = made = [self._choose(part, index_keys) for part in parts]
            if self._kept:
                self._kept.keep(tokens.rope[0], made)
        every = layout.entries_in_order(gathers[-1].wait(), ratio)
        if moved is None:
            return self._attend(kept, every, choices[0])
        taken = self._attend(parts[0], every, choices[0])
        home = start_exchange([taken], [moved.returned], cp_group=group, overlap=self._overlap)
        return home([self._attend(kept, every, choices[1])])[0]

    def _project_low_rank(self, tokens: Tokens) -> None:
        """Compute all tokens' low-rank queries, unless they are there."""
        if tokens.q_residual is None:
            tokens.q_residual = self.q_norm(self.wq_a(tokens.hidden))

    def _project(self, part: Part) -> None:
        """Compute a part's queries, unless they are there."""
        if part.q is None:
            batch = part.q_residual.shape[0]
            q = self.wq_b(part.q_residual)
            part.q = q.view(batch, len(part.queries), self.num_heads, self.head_dim)

    def _project_index(self, part: Part) -> None:
        """Compute a part's index queries, unless they are there."""
        if part.q_index is None:
            with _whole_numbers_only():
                part.q_index = index_queries(self.compressor.indexer, part.q_residual)

    def _choose(self, part: Part, index_keys: torch.Tensor) -> torch.Tensor:
        """Choose the entries of a part's queries."""
        if not len(part.queries):
            return index_keys.new_empty(len(index_keys), 0, 0, dtype=torch.int32)
        assert part.q_index is not None and part.index_weights is not None
        return self._kernels.choose_entries(
            part.q_index,
            part.index_weights,
            index_keys,
            part.rope,
            queries=part.queries,
            ratio=self.compress_ratio,
            topk=self.compressor.indexer.index_topk,
        )

    def _attend(
        self, part: Part, entries: torch.Tensor, chosen: torch.Tensor | None
    ) -> torch.Tensor:
        """Return a part's share of the layer's output, [B, C, E]."""
        q, groups = part.q, self.config.o_groups
        assert q is not None and part.raw is not None
        if len(part.queries):
            # Per-head norm without weight: DeepSeek's inference code has it, transformers' not.
            grouped = self._kernels.attend(
                q,
                part.raw,
                entries,
                self.sinks_param(q),
                chosen,
                part.rope,
                plan=AttentionPlan(part.queries, self.sliding_window, self.compress_ratio),
                scale=self.scaling,
                eps=self.config.rms_norm_eps,
                groups=groups,
            )
        else:  # other ranks have them all, and wait for gradients, be they of nothing
            grouped = (q + part.raw[:, :0, None]).flatten(2).unflatten(2, (groups, -1))
        out: torch.Tensor = self.wo_b(self.wo_a(grouped).flatten(2))
        return out


@contextmanager
def _whole_numbers_only() -> Iterator[None]:
    """Compute what a choice is made of: whole numbers, without gradient."""
    with torch.no_grad(), unseen_by_checkpointing():
        yield
