# SPDX-License-Identifier: Apache-2.0
"""The sanitizer finds the faults that it is there for, and nothing in kernels without."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.triton.device import DEVICE, INTERPRETED
from tests.kernels.triton.sanitizer import every_access_checked, poisoned_memory

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="it looks into the interpreter")


@triton.jit
def copy(x, out, n, SHIFT: tl.constexpr, STEP: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, 16)
    row = tl.load(x + at + SHIFT, mask=at < n, other=0.0)
    if ATOMIC:
        tl.atomic_add(out + at, row, mask=at < n)
    else:
        tl.store(out + at, row, mask=at < n)


@pytest.mark.parametrize(
    ("shift", "step", "atomic", "in_place", "fault"),
    [
        (0, 16, False, False, None),
        (0, 16, False, True, None),
        (0, 8, True, False, None),
        (1, 16, False, False, "load outside all tensors"),
        (0, 8, False, False, "store to what another program stores"),
        (1, 16, False, True, "store to what another program loads"),
        (-1, 16, False, True, "load of what another program changes"),
        (0, 16, True, True, "atomic on what a program loads or stores"),
    ],
)
def test_faults_of_a_kernel_are_found(shift, step, atomic, in_place, fault):
    with every_access_checked() as found:
        x = torch.zeros(34, device=DEVICE)[1:33] if in_place else torch.zeros(32, device=DEVICE)
        out = x if in_place else torch.zeros(32, device=DEVICE)
        copy[32 // step,](x, out, 32, shift, step, atomic)
    assert any(fault in each for each in found) if fault else not found, found


def test_fresh_memory_is_poisoned():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(1).new_empty(3, dtype=torch.int32).eq(2**31 - 1).all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
