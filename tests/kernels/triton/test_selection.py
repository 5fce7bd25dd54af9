# SPDX-License-Identifier: Apache-2.0
"""Top-k selection against the torch path: the same entries, sizes drawn."""

import pytest
import torch
from hypothesis import given

from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import TritonKernels
from nemo_dsv4_cp.kernels.triton.chunks import chunks_of, score_chunks
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.kernels.cases import select_entries, selections
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("checked_memory")


def selected_by(kernels, tensors, rope, **options):
    tensors = [tensor.to(DEVICE).clone() for tensor in tensors]
    rope = tuple(part.to(DEVICE) for part in rope)
    return select_entries(kernels, *tensors, rope, **options).cpu()


def by_place(selected):
    """Sort selected entries, which may come in any order; unused slots stay last."""
    last = torch.iinfo(selected.dtype).max
    return selected.masked_fill(selected == NOTHING, last).sort(dim=-1).values


@given(selections())
def test_the_same_entries_are_selected_ties_by_place(case):
    tensors, rope, options, workspace = case
    theirs = selected_by(TorchKernels(workspace_bytes=1 << 20), tensors, rope, **options)
    mine = selected_by(TritonKernels(workspace_bytes=workspace), tensors, rope, **options)
    assert mine.shape == theirs.shape
    assert torch.equal(by_place(mine), by_place(theirs))
    used = mine != NOTHING
    assert torch.equal(used, used.sort(dim=-1, descending=True).values)  # unused slots come last


def row(entries, *, topk, scores):
    """Select for the last query of a row that sees ``entries``, of which each has its score."""
    layout = SequenceLayout(2, entries // 2 - 1, entries // 2)
    q = torch.zeros(1, 2, 1, 16)
    q[..., 0] = 1
    keys = torch.zeros(1, entries, 16)
    keys[0, :, 0] = scores
    rope = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    kernels, plan = TritonKernels(workspace_bytes=1 << 20), AttentionPlan(Queries.own(layout), 1, 1)
    tensors = [q, torch.ones(1, 2, 1), keys]
    return selected_by(kernels, tensors, rope, plan=plan, topk=topk)[0, -1].tolist()


@pytest.mark.parametrize("topk", [1, 7, 64, 100])
def test_rows_of_many_groups_have_the_best_whatever_group_they_are_in(topk):
    generator = torch.Generator().manual_seed(topk)
    scores = torch.rand(2000, generator=generator)
    assert row(2000, topk=topk, scores=scores) == sorted(scores.topk(topk).indices.tolist())
    rising = torch.arange(2000.0)  # the best share few groups
    assert row(2000, topk=topk, scores=rising) == list(range(2000 - topk, 2000))


def test_of_equal_scores_the_earlier_entries_are_selected():
    scores = torch.zeros(1000)
    assert row(1000, topk=9, scores=scores) == list(range(9))
    scores[[5, 800, 900]] = 2.0
    scores[[300, 301, 700]] = 1.0
    assert row(1000, topk=5, scores=scores) == [5, 300, 301, 800, 900]


@pytest.mark.parametrize("values", [2, 9, 40, 1000])
def test_rows_of_ties_have_the_earliest_in_order_of_place(values):
    generator = torch.Generator().manual_seed(values)
    for topk in (1, 31, 32, 33, 62, 200):
        scores = torch.randint(values, (2000,), generator=generator).float()
        best = scores.sort(descending=True, stable=True).indices[:topk]
        assert row(2000, topk=topk, scores=scores) == best.sort().values.tolist()


def test_the_best_of_as_many_groups_are_found_without_a_second_of_any_group():
    scores = torch.zeros(2000)
    scores[7::64] = torch.arange(32.0).flip(0) + 1
    assert row(2000, topk=20, scores=scores) == list(range(7, 7 + 20 * 64, 64))


def test_chunks_fit_the_workspace_and_leave_out_queries_that_see_nothing():
    plan = AttentionPlan(Queries.own(SequenceLayout(64, 0, 2)), 1, 4)
    chunks = list(chunks_of(score_chunks(plan, batch=2, workspace_bytes=4096)))
    begins, ends = [chunk.begin for chunk in chunks], [chunk.end for chunk in chunks]
    assert ends[-1] == 64 and all(a == b for a, b in zip(ends, begins[1:], strict=False))
    assert len(begins) > 1
    assert sum(chunk.seen for chunk in chunks) == 2 * sum((i + 1) // 4 for i in range(64))
    none = AttentionPlan(Queries.own(SequenceLayout(3, 0, 2)), 1, 4)
    assert score_chunks(none, batch=1, workspace_bytes=4096) == []
