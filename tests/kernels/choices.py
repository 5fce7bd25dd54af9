"""Ranks of rows, and index choices that they make, drawn."""

import torch
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.packed_layout import PackedLayout

WORKSPACES = [1, 3_000, 1 << 20]


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
    return PackedLayout.of_documents(starts, local_len, cp_rank=rank, cp_size=ranks)


@st.composite
def choices(draw):
    """Draw whole numbers, whose scores are exact in any order, and of few values: many tie."""
    batch = draw(st.integers(1, 3))
    layout, ratio = layouts(draw, batch), draw(st.sampled_from([1, 2, 4]))
    heads, width = draw(st.integers(1, 20)), draw(st.sampled_from([8, 16, 40]))
    entries = -(-layout.seq_len // ratio)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    largest = draw(st.sampled_from([0, 1, 30]))

    def whole(*shape):
        return torch.randint(-largest, largest + 1, shape, generator=generator).float()

    # Quarter turns keep whole numbers whole.
    turns = torch.randint(0, 4, (batch, layout.local_len, 4), generator=generator).repeat(1, 1, 2)
    cos, sin = (torch.tensor(values)[turns] for values in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    tensors = [
        whole(batch, layout.local_len, heads, width),
        whole(batch, layout.local_len, heads),
        whole(batch, entries, width),
    ]
    options = {"layout": layout, "ratio": ratio, "topk": draw(st.integers(1, 50))}
    return tensors, (cos, sin), options, draw(st.sampled_from(WORKSPACES))
