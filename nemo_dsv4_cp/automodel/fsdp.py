# SPDX-License-Identifier: Apache-2.0
"""Skips AutoModel's patch of FSDP2 where torch no longer has the patched method (2.15).

AutoModel patches ``FSDPParam.to_accumulated_grad_if_needed``, so that it does not fail for a
parameter that was never unsharded. Torch 2.15 does not have this method, since autograd accumulates
gradients itself, and does not need the patch.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from nemo_dsv4_cp.automodel import patches

_METHOD = "to_accumulated_grad_if_needed"
_GUARD = "patch_fsdp_accumulated_grad_guard"


def install() -> None:
    """Keep AutoModel from patching a method that is gone; elsewhere, or again, do nothing."""
    if hasattr(FSDPParam, _METHOD):
        return
    try:
        from nemo_automodel.components.distributed import fsdp_patches
    except ImportError:  # releases before 0.7 patch nothing
        return
    original: Any = getattr(fsdp_patches, _GUARD, None)
    if original is None or patches.is_replaced(fsdp_patches, _GUARD):
        return
    for name in (_GUARD, f"_{_GUARD}"):  # its users import it under a private name
        patches.replace_everywhere(name, original, _nothing_to_guard)


def _nothing_to_guard() -> None:
    """Stand in for AutoModel's function."""
