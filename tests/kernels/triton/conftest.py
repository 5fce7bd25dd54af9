# SPDX-License-Identifier: Apache-2.0
"""These tests launch kernels: on a GPU, or with TRITON_INTERPRET=1 in a process of their own.

Triton reads that variable when it is imported first, which AutoModel does too. HYPOTHESIS_PROFILE
picks how many cases are drawn: "few", the default, or "many".
"""

import os

import torch
from hypothesis import settings

from tests.kernels.triton.device import INTERPRETED

LAUNCHES = INTERPRETED or torch.cuda.is_available()
collect_ignore_glob = [] if LAUNCHES else ["test_*.py"]

if LAUNCHES:
    settings.register_profile("few", deadline=None, max_examples=8)
    settings.register_profile("many", deadline=None, max_examples=300)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))
