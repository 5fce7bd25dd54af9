# SPDX-License-Identifier: Apache-2.0
"""AutoModel's patch of FSDP2, on a torch that has not what it patches."""

import pytest
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from nemo_dsv4_cp.automodel import fsdp, patches

fsdp_patches = pytest.importorskip(
    "nemo_automodel.components.distributed.fsdp_patches", reason="this release patches nothing"
)


def test_automodel_patches_no_method_that_torch_no_longer_has(monkeypatch):
    original = fsdp_patches.patch_fsdp_accumulated_grad_guard
    monkeypatch.delattr(FSDPParam, "to_accumulated_grad_if_needed", raising=False)
    with pytest.raises(AttributeError):
        original()
    fsdp.install()
    try:
        fsdp_patches.patch_fsdp_accumulated_grad_guard()
    finally:
        patches.undo()
    assert fsdp_patches.patch_fsdp_accumulated_grad_guard is original
