# SPDX-License-Identifier: Apache-2.0
"""Closed-form arithmetic of packed rows against counting by hand."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.windows import Windows, straddling
from tests.packed_parity import starts_of

ROWS = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=5), min_size=1, max_size=3)


def layouts_of(documents, cp_size, spare):
    local_len = -(-max(map(sum, documents)) // cp_size) + spare
    starts = starts_of(documents, local_len * cp_size)
    return [
        SequenceLayout.of_documents(starts, local_len, cp_rank=rank, cp_size=cp_size)
        for rank in range(cp_size)
    ]


def spans_of(lengths, seq_len):
    """Return start and end of each document, and of the padding after the last."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    bounds += [seq_len] if bounds[-1] < seq_len else []
    return list(pairwise(bounds))


@given(ROWS, st.integers(1, 5), st.integers(0, 4), st.sampled_from([1, 2, 4, 16]))
def test_every_complete_window_is_pooled_once_and_found_by_those_who_may_see_it(
    documents, cp_size, spare, ratio
):
    layouts = layouts_of(documents, cp_size, spare)
    seq_len = layouts[0].seq_len
    # An entry carries the start of its window; slots without one carry something else.
    pooled = [Windows.of(layout, ratio) for layout in layouts]
    for layout, windows in zip(layouts, pooled, strict=True):
        assert windows.count == (layout.local_len - 1) // ratio + 1
        assert (windows.starts >= layout.start - straddling(layout, ratio)).all()
        assert (windows.starts + ratio <= layout.end).all()
    gathered = torch.cat([windows.starts for windows in pooled], dim=1)
    for layout in layouts:
        order = layout.entry_order(ratio, pooled[0].count, gathered.device)
        entries = gathered if order is None else gathered.gather(1, order)
        first, stop = layout.visible_entries(layout.positions(), ratio)
        firsts, _ = layout.documents_at(layout.positions())
        assert layout.entries_seen(layout.own, ratio) == (stop - first).sum()
        positions = layout.document_positions()
        for row, lengths in enumerate(documents):
            for begin, end in spans_of(lengths, seq_len):
                for token in range(max(begin, layout.start), min(end, layout.end)):
                    local = token - layout.start
                    seen = entries[row, first[row, local] : stop[row, local]].tolist()
                    count = (token - begin + 1) // ratio
                    assert seen == [begin + w * ratio for w in range(count)]
                    assert firsts[row, local] == begin
                    assert positions[row, local] == token - begin


@given(ROWS, st.integers(1, 3), st.sampled_from([1, 4, 16]), st.integers(1, 30))
def test_the_span_of_neighbouring_queries_holds_all_their_entries(documents, cp_size, ratio, rows):
    for layout in layouts_of(documents, cp_size, 0):
        for begin in range(layout.start, layout.end, rows):
            chunk = range(begin, min(begin + rows, layout.end))
            first, stop = layout.visible_entries(torch.tensor([*chunk]), ratio)
            span = layout.entry_span(chunk, ratio)
            assert (span.start, span.stop) == (int(first.min()), int(stop.max()))
            assert len(span) <= layout.most_entries(rows, ratio)
