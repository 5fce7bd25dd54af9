# SPDX-License-Identifier: Apache-2.0
"""Sizes that the kernels do not take go through torch, and the log reports it once."""

import logging

import pytest
import torch

from nemo_dsv4_cp.kernels.protocol import CandidateBlocks, RotatedIndexQueries
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import TritonKernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.kernels.cases import attend, select_entries
from tests.kernels.triton.device import DEVICE, INTERPRETED

KERNELS = TritonKernels(workspace_bytes=1 << 20)
REFERENCE = TorchKernels(workspace_bytes=1 << 20)
QUERIES = Queries.own(SequenceLayout(4))


def rope():
    return torch.ones(1, 4, 4, device=DEVICE), torch.zeros(1, 4, 4, device=DEVICE)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_attention_of_head_dims_beyond_512(caplog):
    tensors = [random(1, 4, 1, 528), random(1, 5, 528), random(1, 0, 528), random(1)]
    options = {"plan": AttentionPlan(QUERIES, 2, 0), "scale": 0.1, "eps": 1e-6, "groups": 1}
    with caplog.at_level(logging.INFO):
        outs = [attend(KERNELS, *tensors, None, rope(), **options) for _ in range(2)]
    assert torch.equal(outs[0], attend(REFERENCE, *tensors, None, rope(), **options))
    assert [record.message for record in caplog.records if "goes through torch" in record.message]
    assert len(caplog.records) == 1


def test_a_selection_of_more_numbers_than_fit(caplog):
    q, weights, keys = random(1, 4, 65, 128), random(1, 4, 65), random(1, 2, 128)
    options = {"plan": AttentionPlan(QUERIES, 1, 2), "topk": 1}
    with caplog.at_level(logging.INFO):
        mine, theirs = (
            select_entries(kernels, q.clone(), weights, keys, rope(), **options)
            for kernels in (KERNELS, REFERENCE)
        )
    assert torch.equal(mine, theirs)
    assert len(caplog.records) == 1
    assert "65 heads of 128" in caplog.text


def test_a_shared_selection_of_more_numbers_than_fit():
    q, weights, keys = random(1, 4, 65, 128), random(1, 4, 65), random(1, 2, 128)
    queries = RotatedIndexQueries(q, weights, AttentionPlan(QUERIES, 1, 2))
    options = {"topk": 1, "blocks": CandidateBlocks(1, 1), "candidates_BLM": None}
    mine, theirs = (
        kernels.select_shared(queries, keys, **options) for kernels in (KERNELS, REFERENCE)
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies bfloat16")
def test_bfloat16_is_not_interpreted():
    q = random(1, 4, 1, 16).bfloat16()
    with pytest.raises(ValueError, match="torch_dtype: float32"):
        attend(
            KERNELS, q, q[:, :, 0], q[:, :0, 0], q[0, 0, 0, :1], None, rope(),
            plan=AttentionPlan(QUERIES, 2, 0), scale=1.0, eps=1e-6, groups=1,
        )  # fmt: skip
