# SPDX-License-Identifier: Apache-2.0
"""Where kernels run here: on a GPU, or interpreted on the CPU."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
