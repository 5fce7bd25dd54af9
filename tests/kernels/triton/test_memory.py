# SPDX-License-Identifier: Apache-2.0
"""What kernels read and write, of every tile row, with several blocks of heads and of keys.

Fresh memory holds NaN, and every access is compared with the tensors of its launch.
"""

import pytest
import torch

from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import TritonKernels, tiles
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.kernels.triton.device import INTERPRETED
from tests.kernels.triton.test_attention import assert_same, with_gradients
from tests.kernels.triton.test_indexer_loss import assert_same as assert_same_terms
from tests.kernels.triton.test_indexer_loss import terms
from tests.kernels.triton.test_selection import by_place, selected_by

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU picks its own tiles")
ROWS = [90] + [pytest.param(row, marks=pytest.mark.slow) for row in (tiles.FLOAT32, 80, 100)]
LENGTH, RANKS = 3, 48  # the last rank's queries see up to 144 entries


@pytest.fixture
def tile_row(request, monkeypatch):
    """Take every kernel's tile from one row of the tables."""

    def of(table, _):
        return table[max([known for known in table if known <= request.param], default=min(table))]

    monkeypatch.setattr(tiles, "of", of)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layouts(documents):
    if not documents:
        return SequenceLayout(LENGTH, RANKS - 1, RANKS)
    starts = torch.tensor([[0, 20], [0, LENGTH * RANKS - 2]])
    return SequenceLayout.of_documents(starts, LENGTH, cp_rank=RANKS - 1, cp_size=RANKS)


def selection(plan, batch, n_selected):
    """Select some of the entries that each query sees."""
    layout = plan.queries.layout
    first, stop = plan.queries.visible_entries(plan.ratio, torch.device("cpu"))
    place = torch.arange(layout.seq_len)
    seen = (place >= first[..., None]) & (place < stop[..., None])
    best = random(batch, LENGTH, layout.seq_len).masked_fill(~seen, -torch.inf)
    best = best.topk(n_selected, dim=-1)
    return best.indices.masked_fill(best.values.isinf(), NOTHING).to(torch.int32)


@pytest.mark.parametrize("tile_row", ROWS, indirect=True)
@pytest.mark.parametrize(
    ("heads", "window", "n_selected", "documents", "workspace"),
    [
        (66, 70, 70, True, 1 << 19),  # a query a chunk
        pytest.param(66, 70, None, True, 1 << 22, marks=pytest.mark.slow),
        pytest.param(130, 150, None, False, 1 << 20, marks=pytest.mark.slow),
        pytest.param(100, 1, 144, False, 1 << 22, marks=pytest.mark.slow),
        pytest.param(1, 129, None, True, 1 << 22, marks=pytest.mark.slow),
    ],
)
def test_attention(heads, window, n_selected, documents, workspace, tile_row, checked_memory):
    layout = layouts(documents)
    queries, batch, width, ratio = Queries.own(layout), 1 + documents, 24, 1
    plan = AttentionPlan(queries, window, ratio)
    selected = None if n_selected is None else selection(plan, batch, n_selected)
    angles = random(batch, LENGTH, 4).repeat(1, 1, 2)
    tensors = [
        random(batch, LENGTH, heads, width), random(batch, LENGTH + window - 1, width),
        random(batch, layout.seq_len, width), random(heads),
    ]  # fmt: skip
    rope = angles.cos(), angles.sin()
    options = {"plan": plan, "scale": width**-0.5, "eps": 1e-6, "groups": 1}
    mine, theirs = (
        with_gradients(kernels(workspace_bytes=workspace), tensors, selected, rope, **options)
        for kernels in (TritonKernels, TorchKernels)
    )
    assert_same(mine, theirs)
    assert not any(each.isnan().any() for each in mine)


@pytest.mark.parametrize("tile_row", ROWS, indirect=True)
@pytest.mark.parametrize(("full", "workspace"), [(False, 1 << 20), (True, 1)])
def test_indexer_loss(full, workspace, tile_row, checked_memory):
    layout = layouts(True)
    plan, batch, heads, width = AttentionPlan(Queries.own(layout), 70, 1), 2, 66, 24
    tensors = [
        random(batch, LENGTH, 20, 40), random(batch, LENGTH, 20), random(batch, layout.seq_len, 40),
        random(batch, LENGTH, heads, width), random(batch, LENGTH + 69, width),
        random(batch, layout.seq_len, width), random(heads), torch.ones(batch, LENGTH),
    ]  # fmt: skip
    angles = random(batch, LENGTH, 4).repeat(1, 1, 2)
    given = tensors, selection(plan, batch, 70), (angles.cos(), angles.sin()), plan
    mine, theirs = (
        terms(kernels(workspace_bytes=workspace), *given, full=full)
        for kernels in (TritonKernels, TorchKernels)
    )
    assert_same_terms(mine, theirs)


@pytest.mark.parametrize("tile_row", ROWS, indirect=True)
@pytest.mark.parametrize("topk", [130, pytest.param(7, marks=pytest.mark.slow)])
def test_selection(topk, tile_row, checked_memory):
    layout = SequenceLayout(LENGTH, 200, 201)
    plan = AttentionPlan(Queries.own(layout), 1, 1)
    tensors = [
        random(1, LENGTH, 20, 40).round(), random(1, LENGTH, 20).round(),
        random(1, layout.seq_len, 40).round(),
    ]  # fmt: skip
    rope = torch.ones(1, LENGTH, 4), torch.zeros(1, LENGTH, 4)
    mine, theirs = (
        by_place(selected_by(kernels(workspace_bytes=1 << 20), tensors, rope, plan=plan, topk=topk))
        for kernels in (TritonKernels, TorchKernels)
    )
    assert torch.equal(mine, theirs)
