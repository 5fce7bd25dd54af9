# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch

from nemo_dsv4_cp.checks.operation_timing import time_operations
from nemo_dsv4_cp.kernels.triton import TritonKernels

SIZES = {
    "sliding_window": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "qk_rope_head_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 2,
    "rms_norm_eps": 1e-6,
    "o_groups": 1,
}


# The last 16 of 256 tokens see the window's 3 keys and 2 selected entries; at ratio 128 one entry,
# the last token two.
@pytest.mark.parametrize(
    ("ratio", "keys"), [(0, 16 * 3), (4, 16 * (3 + 2)), (128, 16 * (3 + 1) + 1)]
)
def test_operations_are_timed_with_their_products(ratio, keys):
    kernels = TritonKernels(workspace_bytes=1 << 20)
    times = time_operations(
        kernels, SimpleNamespace(**SIZES), ratio, 256, 16, dtype=torch.float32, repeats=1
    )
    flops = {each.operation: each.flops for each in times}
    product = 2 * 2 * 16 * keys
    assert flops["attention forward"] == 2 * product
    assert flops["attention backward"] == 5 * product
    assert ("top-k selection" in flops) == (ratio == 4)
    assert all(each.seconds > 0 for each in times)
