# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import indexer_scores_torch

from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.reference.selection import best_entries
from nemo_dsv4_cp.sequence.plan import NOTHING


def test_scores_are_automodel():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, 3, 16), (2, 5, 16), (2, 7, 3)]
    q, keys, weights = (torch.randn(shape, generator=generator) for shape in shapes)
    expected = indexer_scores_torch(q, keys, weights, 0.25)
    kernels = TorchKernels(workspace_bytes=1 << 20)
    scores = kernels.index_scores(q, keys, weights * 0.25, first_query=0, ratio=4)
    assert torch.equal(scores, expected)


@given(
    st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-30, 3.0]), min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_equal_scores_go_to_the_earlier_entry_whatever_else_is_scored(scores, first, stop):
    seen = range(first, min(stop, len(scores)))
    expected = sorted(seen, key=lambda entry: (-scores[entry], entry))
    expected += [NOTHING] * (len(scores) - len(seen))
    hidden = torch.tensor([[[entry not in seen for entry in range(len(scores))]]])
    best = best_entries(torch.tensor([[scores]]), hidden, len(scores))
    assert best[0, 0].tolist() == expected
