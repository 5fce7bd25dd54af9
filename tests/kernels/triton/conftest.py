# SPDX-License-Identifier: Apache-2.0
"""These tests launch kernels: on a GPU, or with TRITON_INTERPRET=1 in a process of their own.

Triton reads that variable when it is imported first, which AutoModel does too. HYPOTHESIS_PROFILE
picks how many cases are drawn, see tests/examples.py.
"""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings

from tests.examples import MANY, PROFILE
from tests.kernels.triton.device import INTERPRETED

LAUNCHES = INTERPRETED or torch.cuda.is_available()
collect_ignore_glob = [] if LAUNCHES else ["test_*.py"]

if LAUNCHES:
    drawn = settings.get_profile(PROFILE)
    settings.register_profile("kernels", drawn, max_examples=300 if MANY else 8)
    settings.load_profile("kernels")


@pytest.fixture(scope="module")
def checked_memory():
    """Fill fresh memory with NaN; where kernels are interpreted, check their every access."""
    from tests.kernels.triton.sanitizer import every_access_checked, poisoned_memory

    with poisoned_memory(), every_access_checked() if INTERPRETED else nullcontext([]) as found:
        yield found
    assert not found, "\n".join(dict.fromkeys(found))


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Fix the interpreter, which multiplies the bits of bfloat16 as integers."""
    import numpy as np
    import triton
    from triton.runtime import interpreter

    from nemo_dsv4_cp.kernels.triton import tiles

    def floats(x):
        if x.dtype.scalar != triton.language.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *_):
        product = np.matmul(floats(a), floats(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(tiles, "refuse_interpreted_bfloat16", lambda _: None)
