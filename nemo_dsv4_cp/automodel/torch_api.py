# SPDX-License-Identifier: Apache-2.0
"""Where releases of torch differ, chosen by what is there, and the private names that we use.

Each is there from torch 2.8, the oldest that AutoModel takes, to 2.15. Nothing is imported but
torch.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.utils import _python_dispatch, checkpoint

TESTED_TORCH = ("2.15.0", "2.13.0", "2.10.0")

# torch 2.13 renamed both; the old names may go one day.
if hasattr(dist, "all_gather_single"):
    all_gather_single = dist.all_gather_single
    reduce_scatter_single = dist.reduce_scatter_single
else:
    all_gather_single = dist.all_gather_into_tensor
    reduce_scatter_single = dist.reduce_scatter_tensor

default_store = dist.distributed_c10d._get_default_store
current_modes = _python_dispatch._get_current_dispatch_mode_stack
without_modes = _python_dispatch._disable_current_modes
# The number of the backward that autograd runs, by which torch.utils.checkpoint, too, recognizes
# its recomputations.
backward_id = torch._C._current_graph_task_id
NO_BACKWARD = -1
# The modes of selective checkpointing, of its forward and of its recomputation.
SELECTIVE_CHECKPOINTING = (
    checkpoint._CachingTorchDispatchMode,
    checkpoint._CachedTorchDispatchMode,
)


def let_fake_tensors_through_collectives() -> None:
    """Have collectives accept fake tensors, as torch 2.13 does by itself."""
    if find_spec("torch.distributed._meta_registrations") is None:
        importlib.import_module("torch.distributed._tools.fake_collectives")
