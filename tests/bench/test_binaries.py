# SPDX-License-Identifier: Apache-2.0
"""Packs of other lengths ask for few binaries more: compiling takes seconds, and all ranks wait."""

import os
import random
from types import SimpleNamespace

import pytest
import torch

from nemo_dsv4_cp.bench.compiled_kernels import (
    record_layer,
    record_losses,
    record_v41_layer,
)
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from nemo_dsv4_cp.tools.sizes import read_model_fields

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is never compiled"
)
SIZES = SimpleNamespace(**read_model_fields("v4_flash"))
MOST = 30
MOST_OF_LOSS = 11  # of both modes


def drawn_pack(draw, longest):
    """Draw a shard's length, a rank, and where up to 40 documents of the row begin."""
    ranks = draw.choice([2, 8])
    length = draw.randint(longest // 2, longest)
    starts = [0, *sorted(draw.sample(range(1, length * ranks), draw.randint(0, 39)))]
    rank = draw.randrange(ranks)
    return SequenceLayout.of_documents(torch.tensor([starts]), length, cp_rank=rank, cp_size=ranks)


@pytest.mark.parametrize(
    ("steps", "longest"), [(20, 1024), pytest.param(300, 16_384, marks=pytest.mark.slow)]
)
def test_packs_of_varying_length_share_their_binaries(steps, longest):
    draw, seen, of_loss, of_v41 = random.Random(0), set(), set(), set()
    for _ in range(steps):
        queries = Queries.own(drawn_pack(draw, longest))
        for ratio in (0, 4, 128):
            plan = AttentionPlan(queries, SIZES.sliding_window, ratio)
            for each in record_layer(SIZES, plan, 90, torch.bfloat16):
                seen |= {launch.specimen.key for launch in each.launches}
            if ratio == 4:
                for each in record_losses(SIZES, plan, 90, torch.bfloat16):
                    of_loss |= {launch.specimen.key for launch in each.launches}
    for _ in range(steps // 7):  # recording a layer of V4.1 copies its queries
        queries = Queries.own(drawn_pack(draw, min(longest, 4096)))
        for ratio in (0, 2, 1):
            plan = AttentionPlan(queries, SIZES.sliding_window, ratio)
            for each in record_v41_layer(plan, 90, torch.bfloat16):
                of_v41 |= {launch.specimen.key for launch in each.launches}
    print(f"{len(seen)}, {len(of_loss)} and {len(of_v41)} binaries after {steps} steps")
    assert len(seen) <= MOST, sorted(name for name, *_ in seen)
    assert len(of_loss) <= MOST_OF_LOSS, sorted(name for name, *_ in of_loss)
    assert len(of_v41) <= MOST, sorted(name for name, *_ in of_v41)
