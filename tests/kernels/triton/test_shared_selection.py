# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4.1's top-k selection against the torch path: the same entries, sizes drawn."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nemo_dsv4_cp.kernels.protocol import CandidateBlocks, RotatedIndexQueries
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import TritonKernels, chunks
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.examples import MANY
from tests.kernels.cases import selections
from tests.kernels.triton.device import DEVICE, INTERPRETED
from tests.kernels.triton.test_selection import by_place

pytestmark = pytest.mark.usefixtures("checked_memory")


def both_layers(kernels, tensors, *, plan, topk, blocks):
    """Select in a layer that chooses candidates, and with other queries in one inside them."""
    q, weights, keys = (tensor.to(DEVICE) for tensor in tensors)

    def select(q, candidates):
        return kernels.select_shared(
            RotatedIndexQueries(q, weights, plan), keys, topk=topk, blocks=blocks,
            candidates_BLM=candidates,
        )  # fmt: skip

    found, candidates = select(q, None)
    if blocks is None:
        assert candidates is None
        return [found.cpu()]
    inside, none = select(q.flip(1), candidates)
    assert none is None
    return [each.cpu() for each in (found, candidates, inside)]


def assert_same(tensors, workspace, **options):
    theirs = both_layers(TorchKernels(workspace_bytes=1 << 20), tensors, **options)
    mine = both_layers(TritonKernels(workspace_bytes=workspace), tensors, **options)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.int32
        most = max(a.shape[-1], b.shape[-1])  # candidates may have unused slots
        a, b = (torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=NOTHING) for x in (a, b))
        assert torch.equal(by_place(a), by_place(b))
        used = a != NOTHING
        assert torch.equal(used, used.sort(dim=-1, descending=True).values)
    assert mine[0].shape == theirs[0].shape


BLOCKS = st.builds(CandidateBlocks, st.integers(1, 6), st.integers(1, 9))


@given(selections(), st.one_of(st.none(), BLOCKS))
def test_the_same_entries_are_selected_ties_by_place(case, blocks):
    tensors, _, options, workspace = case
    assert_same(tensors, workspace, blocks=blocks, **options)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU may round one of the products otherwise")
@settings(
    max_examples=300 if MANY else 4, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(selections(), BLOCKS)
def test_scores_are_rounded_as_the_torch_paths(bfloat16_products, case, blocks):
    # Sums of rounded integers are exact in any order.
    tensors, _, options, workspace = case
    tensors = [tensor.bfloat16() for tensor in tensors]
    assert_same(tensors, workspace, blocks=blocks, **options)


@pytest.mark.parametrize(
    ("blocks", "documents", "most_groups"),
    [(CandidateBlocks(20, 8), True, 1 << 14), (CandidateBlocks(70, 3), False, 3)],
)
def test_rows_of_many_groups_and_blocks(blocks, documents, most_groups, monkeypatch):
    monkeypatch.setattr(chunks, "MOST_GROUPS", most_groups)
    length, ranks = 3, 200
    layout = SequenceLayout(length, ranks - 1, ranks)
    if documents:
        starts = torch.tensor([[0, 21], [0, length * ranks - 290]])
        layout = SequenceLayout.of_documents(starts, length, cp_rank=ranks - 1, cp_size=ranks)
    generator = torch.Generator().manual_seed(blocks.size)
    shapes = [(2, length, 5, 16), (2, length, 5), (2, layout.seq_len, 16)]
    tensors = [torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes]
    plan = AttentionPlan(Queries.own(layout), 1, 1)
    assert_same(tensors, 1 << 20, plan=plan, topk=40, blocks=blocks)


def test_fake_tensors_take_the_shapes_of_real_ones_and_flops_are_of_what_is_scored():
    length, blocks = 24, CandidateBlocks(2, 4)

    def run():
        tensors = [torch.zeros(1, length, 3, 16), torch.zeros(1, length, 3)]
        plan = AttentionPlan(Queries.own(SequenceLayout(length)), 1, 1)
        kernels = TritonKernels(workspace_bytes=1 << 20)
        return both_layers(
            kernels, [*tensors, torch.zeros(1, length, 16)], plan=plan, topk=5, blocks=blocks
        )

    with FlopCounterMode(display=False) as counted:
        real = run()
    with FakeTensorMode():
        fake = run()
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
    inside = min(sum(range(1, length + 1)), length * 8)
    assert counted.get_total_flops() == 2 * 3 * 16 * (sum(range(1, length + 1)) + inside)


def test_a_row_too_short_for_an_entry_selects_nothing():
    tensors = [torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3), torch.zeros(2, 0, 16)]
    plan = AttentionPlan(Queries.own(SequenceLayout(1)), 1, 2)
    assert_same(tensors, 1 << 20, plan=plan, topk=3, blocks=CandidateBlocks(2, 4))
