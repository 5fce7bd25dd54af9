# SPDX-License-Identifier: Apache-2.0
"""Packs of other lengths ask for few binaries more: compiling takes seconds, and all ranks wait."""

import os
import random

import pytest
import torch

from nemo_dsv4_cp.bench import compiled_kernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is never compiled"
)


def test_packs_of_varying_length_share_their_binaries(monkeypatch):
    draw, ranks, seen = random.Random(0), 16, []

    def plan(sizes, ratio, _):
        return AttentionPlan(Queries.own(layout), sizes.sliding_window, ratio)

    monkeypatch.setattr(compiled_kernels, "_plan", plan)
    for _ in range(6):
        length = draw.choice([64, 71, 80, 96, 104])
        starts = [0, *sorted(draw.sample(range(1, length * ranks), 5))]
        layout = SequenceLayout.of_documents(
            torch.tensor([starts]), length, cp_rank=ranks - 1, cp_size=ranks
        )
        monkeypatch.setattr(compiled_kernels, "_SHARD", length)
        seen += [s for s in compiled_kernels.kernels_of("v4_flash", 90) if s not in seen]
    # Top-k has a binary for each power of two of the entries that a chunk sees.
    others = [specimen.name for specimen in seen if specimen.name != "top_k_kernel"]
    assert len(others) <= 16, sorted(others)
    assert len(seen) <= 24
