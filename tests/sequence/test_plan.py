# SPDX-License-Identifier: Apache-2.0
"""Visible ranges against looking at every pair of query and key."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.plan import AttentionPlan, raw_tokens
from tests.kernels.cases import queries_of

CPU = torch.device("cpu")


def documents_of(layout, batch):
    """Return the number of each token's document, [B, S]."""
    bounds = layout.bounds or ((0, layout.seq_len),)
    ends = torch.tensor(bounds)[:, 1:].expand(batch, -1).contiguous()
    return torch.searchsorted(ends, torch.arange(layout.seq_len).repeat(batch, 1), right=True)


@settings(max_examples=150)
@given(st.data())
def test_visible_ranges_and_spans_hold_what_a_query_may_see_and_no_more(data):
    batch = data.draw(st.integers(1, 2))
    queries = queries_of(data.draw, batch)
    window, ratio = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1, 3]))
    plan, layout = AttentionPlan(queries, window, ratio), queries.layout
    documents = documents_of(layout, batch)
    ranges = plan.visible_ranges(CPU).expand(batch, -1, -1)
    assert (ranges.diff(dim=1) >= 0).all()  # kernels search them

    keys = [token for run in raw_tokens(queries.runs, window) for token in run]
    for row in range(batch):
        for query, position in enumerate(queries.positions().tolist()):
            first, last, entry_first, entry_stop = ranges[row, query].tolist()
            seen = [
                token
                for token in range(max(position - window + 1, 0), position + 1)
                if documents[row, token] == documents[row, position]
            ]
            assert keys[first : last + 1] == seen
            begin = documents[row].tolist().index(documents[row, position])
            assert entry_stop - entry_first == (ratio and (position - begin + 1) // ratio)
            own = slice(query, query + 1)
            raw, entries = plan.raw_span(own), plan.entry_span(own)
            assert raw.start <= first and last < raw.stop
            if entry_stop > entry_first:
                assert entries.start <= entry_first and entry_stop <= entries.stop
    whole = slice(0, len(queries))
    assert plan.raw_span(whole) == slice(0, len(keys))


@given(st.data(), st.integers(1, 7))
def test_chunks_cover_all_queries_and_none_crosses_a_gap(data, rows):
    queries = queries_of(data.draw, 1)
    positions, end = queries.positions().tolist(), 0
    for chunk in queries.chunks(rows):
        assert chunk.start == end
        end = chunk.stop
        (span,) = queries.spans(chunk)
        assert positions[chunk] == [*span]
        assert 1 <= len(span) <= rows
    assert end == len(queries) == len(positions)
