# SPDX-License-Identifier: Apache-2.0
"""Ranks of rows, queries, and what they select among, drawn; and calls of kernels by tensors."""

import torch
from hypothesis import strategies as st

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexQueries,
)
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries

WORKSPACES = [1, 3_000, 1 << 20]


def attend(kernels, q, raw, entries, sinks, selected, rope, *, plan, scale, eps, groups):
    return kernels.attend(
        AttentionQueries(q, rope, plan, selected),
        AttentionKeys(raw, entries, sinks),
        AttentionConstants(scale, eps, groups),
    )


def select_entries(kernels, q, weights, keys, rope, *, plan, topk):
    return kernels.select_entries(IndexQueries(q, weights, rope, plan), keys, topk=topk)


def layouts(draw, batch):
    """Draw a rank of a row of one document, or of rows of several."""
    local_len, ranks = draw(st.sampled_from([1, 2, 5, 9, 16])), draw(st.integers(1, 3))
    rank = draw(st.integers(0, ranks - 1))
    if not draw(st.booleans()):
        return SequenceLayout(local_len, rank, ranks)
    total = local_len * ranks
    rows = [sorted(draw(st.sets(st.integers(1, total), max_size=3)) | {0}) for _ in range(batch)]
    longest = max(map(len, rows))
    starts = torch.tensor([row + [total] * (longest - len(row)) for row in rows])
    return SequenceLayout.of_documents(starts, local_len, cp_rank=rank, cp_size=ranks)


def queries_of(draw, batch):
    """Draw a rank's own queries, or runs of a row's that it computes for others."""
    layout = layouts(draw, batch)
    if draw(st.booleans()):
        return Queries.own(layout)
    ends = st.sets(st.integers(0, layout.seq_len), min_size=2, max_size=6)
    bounds = sorted(draw(ends))
    runs = zip(bounds[0::2], bounds[1::2], strict=False)
    return Queries(layout, tuple(range(begin, end) for begin, end in runs))


@st.composite
def selections(draw):
    """Draw integers, whose scores are exact in any order, and of few values: many tie."""
    batch = draw(st.integers(1, 3))
    queries, ratio = queries_of(draw, batch), draw(st.sampled_from([1, 2, 4]))
    layout, length = queries.layout, len(queries)
    heads, width = draw(st.integers(1, 20)), draw(st.sampled_from([8, 16, 40]))
    entries = -(-layout.seq_len // ratio)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    largest = draw(st.sampled_from([0, 1, 30]))

    def integers(*shape):
        return torch.randint(-largest, largest + 1, shape, generator=generator).float()

    # Quarter turns keep integers integers.
    turns = torch.randint(0, 4, (batch, length, 4), generator=generator).repeat(1, 1, 2)
    cos, sin = (torch.tensor(values)[turns] for values in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    tensors = [
        integers(batch, length, heads, width),
        integers(batch, length, heads),
        integers(batch, entries, width),
    ]
    options = {"plan": AttentionPlan(queries, 1, ratio), "topk": draw(st.integers(1, 50))}
    return tensors, (cos, sin), options, draw(st.sampled_from(WORKSPACES))
