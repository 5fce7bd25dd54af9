"""Closed-form arithmetic of packed rows against counting by hand."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.packed_layout import PackedLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from tests.packed_parity import starts_of

ROWS = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=5), min_size=1, max_size=3)


def layouts_of(documents, cp_size, spare):
    local_len = -(-max(map(sum, documents)) // cp_size) + spare
    starts = starts_of(documents, local_len * cp_size)
    return [
        PackedLayout.of_documents(starts, local_len, cp_rank=rank, cp_size=cp_size)
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
    pooled = [layout.windows(ratio) for layout in layouts]
    for layout, windows in zip(layouts, pooled, strict=True):
        assert len(windows) == (layout.local_len - 1) // ratio + 1
        assert (windows.starts >= layout.start - layout.straddling(ratio)).all()
        assert (windows.starts + ratio <= layout.end).all()
    gathered = torch.cat([windows.starts for windows in pooled], dim=1)
    for layout in layouts:
        entries = layout.entries_in_order(gathered[..., None], ratio)[..., 0]
        whole = slice(0, layout.local_len)
        first, stop = layout.visible_entries(whole, ratio)
        firsts = layout.first_keys(whole)
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
        for begin in range(0, layout.local_len, rows):
            chunk = slice(begin, min(begin + rows, layout.local_len))
            first, stop = layout.visible_entries(chunk, ratio)
            span = layout.entry_span(chunk, ratio)
            assert (span.start, span.stop) == (int(first.min()), int(stop.max()))
            assert len(span) <= layout.most_entries(rows, ratio)


@settings(max_examples=60)
@given(st.data())
def test_sight_names_the_keys_that_the_masks_leave(data):
    local_len, ranks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    rank = data.draw(st.integers(0, ranks - 1))
    layout = SequenceLayout(local_len, rank, ranks)
    if data.draw(st.booleans()):
        starts = sorted(data.draw(st.sets(st.integers(1, ranks * local_len), max_size=3)) | {0})
        layout = PackedLayout.of_documents(
            torch.tensor([starts]), local_len, cp_rank=rank, cp_size=ranks
        )
    window, ratio = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1, 3]))
    first = data.draw(st.sampled_from([0, layout.start - window + 1]))
    plan = AttentionPlan(layout, first, window, ratio)
    whole = slice(0, local_len)
    raw_first, raw_last, entry_first, entry_stop = plan.sight(torch.device("cpu")).unbind(-1)

    keys = torch.arange(layout.end - first)
    seen = (keys >= raw_first[..., None]) & (keys <= raw_last[..., None])
    span = plan.raw_span(whole)
    assert torch.equal(seen[..., span], ~plan.raw_hidden(whole, torch.device("cpu")))
    assert not seen[..., : span.start].any() and not seen[..., span.stop :].any()
    entries = torch.tensor([*plan.entry_span(whole)], dtype=torch.long)
    seen = (entries >= entry_first[..., None]) & (entries < entry_stop[..., None])
    hidden = plan.entries_hidden(whole, torch.device("cpu"))
    assert torch.equal(seen, ~hidden.expand_as(seen))
    assert (entry_stop - entry_first).sum() == seen.sum()
