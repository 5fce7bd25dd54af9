# SPDX-License-Identifier: Apache-2.0
"""These tests launch kernels: on a GPU, or with TRITON_INTERPRET=1 in a process of their own.

Triton reads that variable when it is imported first, which AutoModel does too. HYPOTHESIS_PROFILE
picks how many cases are drawn, see tests/examples.py.
"""

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
