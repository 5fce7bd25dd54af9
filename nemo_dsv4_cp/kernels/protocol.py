# SPDX-License-Identifier: Apache-2.0
"""What attention needs from the device: the operations that a kernel backend computes.

A backend subclasses :class:`nemo_dsv4_cp.kernels.reference.TorchKernels`, which computes all of
them on any device, and overrides those that it has. One that has only the core of an operation
overrides ``index_scores`` or ``attend_rotated``, from which ``TorchKernels`` builds the operation.
Declare the class in the entry-point group ``nemo_dsv4_cp.kernels``; ``context_parallel.kernels``
names it, and ``nemo-dsv4-cp verify --kernels`` compares it with the torch path.
"""

# B batch rows   L queries   N heads   D head_dim   T raw keys   P entries   K selected entries
# I index heads   F index width   r rotary dims   G groups of heads   C queries of a chunk
# M candidate blocks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_dsv4_cp.sequence.plan import AttentionPlan

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cos and sin from AutoModel's rotary embedding, [B, L, r] each: the r / 2 angles, twice."""


@dataclass(frozen=True, eq=False)
class AttentionQueries:
    """Queries that a rank computes together.

    Attributes:
        q_BLND: As projected, before norm and rotary.
        rope: Angles of the queries' positions.
        plan: Which keys each query sees: its window of raw keys, and a range of entries.
        selected_BLK: The entries of its range that each query attends to, as
            :meth:`Kernels.select_entries` returns them; None for the whole range.
    """

    q_BLND: torch.Tensor
    rope: Rope
    plan: AttentionPlan
    selected_BLK: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class IndexQueries:
    """Index queries that a rank computes together.

    Attributes:
        q_BLIF: As projected, before rotary. Their memory may be written over.
        weights_BLI: Float32 weight of each head, with the scale of the scores.
        rope: Angles of the queries' positions.
        plan: Which entries each query may see.
    """

    q_BLIF: torch.Tensor
    weights_BLI: torch.Tensor
    rope: Rope
    plan: AttentionPlan


@dataclass(frozen=True, eq=False)
class RotatedIndexQueries:
    """Index queries of DeepSeek-V4.1 that a rank computes together.

    Attributes:
        q_BLIF: After rotary and quantization.
        weights_BLI: Weight of each head, with the scale of the scores; of the queries' dtype.
        plan: Which entries each query may see.
    """

    q_BLIF: torch.Tensor
    weights_BLI: torch.Tensor
    plan: AttentionPlan


@dataclass(frozen=True)
class CandidateBlocks:
    """How many blocks of entries one layer keeps for later layers to select in.

    Attributes:
        keep: Blocks kept for each query.
        size: Entries of a block. Blocks are counted from the document's first entry.
    """

    keep: int
    size: int

    def count(self, entries: int) -> int:
        """Return how many blocks hold the first ``entries`` of a document."""
        return -(-entries // self.size)


@dataclass(frozen=True, eq=False)
class AttentionKeys:
    """What queries attend to; keys are values.

    Attributes:
        raw_BTD: Raw keys, rotated, in the order of :func:`raw_tokens`.
        entries_BPD: Compressed entries in the order that the layout counts them; P may be 0.
        sinks_N: Logit per head of the sink, which takes probability and adds nothing.
        entries_grad: Returns, in backward, a float32 sum [B, P, D] that other layers add to.
            Kernels that add the entries' gradient to it return None for them, and save memory;
            others ignore it. None where entries are of one layer.
    """

    raw_BTD: torch.Tensor
    entries_BPD: torch.Tensor
    sinks_N: torch.Tensor
    entries_grad: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class AttentionConstants:
    """Numbers of a model.

    Attributes:
        scale: Score multiplier.
        eps: Added to the mean square of the queries' norm; None for queries without norm (V4.1),
            whose memory may be written over.
        groups: G, into which the output projection takes the heads.
    """

    scale: float
    eps: float | None
    groups: int


@dataclass(frozen=True, eq=False)
class IndexerLossTerms:
    """The indexer's loss of some queries, and its gradient, which is computed with it.

    Attributes:
        loss: Float32 scalar: sum over queries of weight * KL(target || prediction).
        captured: Float32 scalar: sum over queries of weight * a share of attention's probability,
            mean of the heads; see :meth:`Kernels.indexer_loss`.
        grad_q_BLIF: Of the loss, of index queries before rotary, in their dtype.
        grad_weights_BLI: Float32.
        grad_keys_BPF: In the index keys' dtype.
    """

    loss: torch.Tensor
    captured: torch.Tensor
    grad_q_BLIF: torch.Tensor
    grad_weights_BLI: torch.Tensor
    grad_keys_BPF: torch.Tensor


class Kernels(Protocol):
    """One way to compute a layer's attention.

    It receives this rank's tensors and positions only, no process groups and no modules.
    """

    score_bytes: int | None
    """Scratch that :meth:`index_scores` takes per score; None for a float32 per head."""

    def __init__(self, *, workspace_bytes: int | None) -> None:
        """Make ready for a layer.

        Args:
            workspace_bytes: How much scratch an operation may take at a time; None for what suits
                the device.

        Raises:
            ValueError: If it cannot run here, with what to use instead.
        """

    def rotate(self, x_BLD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Return keys or entries with their last r dims rotated; differentiable."""

    def select_entries(
        self, queries: IndexQueries, keys_BPF: torch.Tensor, *, topk: int
    ) -> torch.Tensor:
        """Rotate index queries and return the ``topk`` best of the entries that each may see.

        A score is the sum over heads of weight * relu(q . k), in float32; equal scores go to the
        earlier entry.

        Returns:
            Int32 [B, L, min(topk, P)], ``NOTHING`` in unused slots, which come last; no gradient.
        """

    def select_shared(
        self,
        queries: RotatedIndexQueries,
        keys_BPF: torch.Tensor,
        *,
        topk: int,
        blocks: CandidateBlocks | None,
        candidates_BLM: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ``topk`` best of the entries that each query may see, which layers share.

        A score is the sum over heads of weight * relu(q . k). Products, weighted products and
        sums are rounded to the queries' dtype. Equal scores go to the earlier entry.

        With ``blocks`` and no candidates, also choose each query's candidates: the block of its
        last visible entry, and the other blocks with the best scores of a visible entry, equal ones
        by place. With candidates, select only entries of these blocks.

        Args:
            queries: The queries.
            keys_BPF: Index keys of all entries, of the queries' dtype.
            topk: Entries selected for each query.
            blocks: Number and size of candidates; None if all visible entries are candidates.
            candidates_BLM: What another layer with the same queries returned second.

        Returns:
            Int32 [B, L, min(topk, P)], ``NOTHING`` in unused slots, which come last; and the
            candidates if this call chose them, else None. Candidates are block numbers, int32
            [B, L, M], M at most ``blocks.keep``, with ``NOTHING`` last, too. No gradient.
        """

    def attend(
        self, queries: AttentionQueries, keys: AttentionKeys, constants: AttentionConstants
    ) -> torch.Tensor:
        """Attend to the window and to entries, all in range or the selected; differentiable.

        Each head of the queries is first RMS-normalized without weight, unless eps is None, and its
        last r dims are rotated; the output's are rotated back. With eps None, the queries' memory
        may be reused.

        Returns:
            [B, L, G, N / G * D] of the queries' dtype.
        """

    def indexer_loss(
        self,
        index: IndexQueries,
        index_keys_BPF: torch.Tensor,
        queries: AttentionQueries,
        keys: AttentionKeys,
        constants: AttentionConstants,
        *,
        token_weights_BL: torch.Tensor,
        full: bool,
    ) -> IndexerLossTerms:
        """Compare what the indexer would choose with what attention looks at.

        Over the entries of a query: the target is attention's probabilities (among window, entries
        and sink) summed over heads and normalized to 1; the prediction is the softmax of index
        scores, which are those of :meth:`select_entries`. Nothing is differentiable, nothing is
        written over.

        Args:
            index: Index queries.
            index_keys_BPF: Index keys of all entries.
            queries: As for :meth:`attend`, with the selected entries.
            keys: As for :meth:`attend`.
            constants: As for :meth:`attend`.
            token_weights_BL: Float32 weight of each query, 0 for padding.
            full: Over all entries that a query may see, attention's probabilities being those that
                it would have if all were selected; else over the selected ones. ``captured`` is of
                what went to all visible entries the share of the selected, with ``full``; else of
                all probability the share of the selected entries.
        """

    def index_scores(
        self,
        q_BCIF: torch.Tensor,
        keys_BPF: torch.Tensor,
        weights_BCI: torch.Tensor,
        *,
        first_query: int,
        ratio: int,
    ) -> torch.Tensor:
        """Score rotated index queries of a chunk; the core of ``TorchKernels.select_entries``.

        Args:
            q_BCIF: After rotary, neighbors of one another.
            keys_BPF: The keys that any of them may see.
            weights_BCI: Weight of each head.
            first_query: Position of the first query, counted from the first token that the first
                key could pool: a key w that query c may see has
                w < (first_query + c + ratio) // ratio.
            ratio: Compress ratio of the keys.

        Returns:
            Float32 [B, C, P]; what no query may see may hold anything.
        """

    def attend_rotated(
        self, queries: AttentionQueries, keys: AttentionKeys, scale: float
    ) -> torch.Tensor:
        """Attend from queries that are ready for products; differentiable.

        It is the core of ``TorchKernels.attend``, and DeepSeek-V4.1's attention: its queries have
        no norm, and the layer rotates them before and the output after.

        Returns:
            [B, L, N, D] of the queries' dtype, in memory that ``TorchKernels.attend`` may write
            over if the backend leaves :meth:`attend` to it.
        """
