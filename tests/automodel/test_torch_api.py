# SPDX-License-Identifier: Apache-2.0
"""What differs between releases of torch, by the names that this one has."""

import subprocess
import sys

import torch
from torch.utils.checkpoint import checkpoint

from nemo_dsv4_cp.automodel import torch_api

OLDER = """
import torch.distributed as dist
for name in ("all_gather_single", "reduce_scatter_single"):
    if hasattr(dist, name):
        delattr(dist, name)
from nemo_dsv4_cp.automodel import torch_api
assert torch_api.all_gather_single is dist.all_gather_into_tensor
assert torch_api.reduce_scatter_single is dist.reduce_scatter_tensor
"""


def test_a_torch_without_the_new_names_of_collectives_is_served_by_the_old_ones():
    done = subprocess.run(
        [sys.executable, "-c", OLDER], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_recomputation_is_distinguished_from_a_forward():
    seen = []

    def square(x):
        seen.append(torch_api.backward_id() != torch_api.NO_BACKWARD)
        return x * x

    checkpoint(square, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]
