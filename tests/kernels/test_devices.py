# SPDX-License-Identifier: Apache-2.0
"""Devices that the Triton kernels refuse, by what torch and Triton report of them."""

import pytest
import torch

from nemo_dsv4_cp.kernels.triton import triton_kernels


@pytest.mark.parametrize(
    ("name", "capability", "shared", "refusal"),
    [
        ("Tesla V100", (7, 0), 96 << 10, r"capability 8.0 or more, and this one has 7.0"),
        ("NVIDIA L40S", (8, 9), 99 << 10, r"163 KiB of shared memory .* NVIDIA L40S has 99; set"),
        ("NVIDIA A100", (8, 0), 163 << 10, None),
        ("NVIDIA H100", (9, 0), 227 << 10, None),
    ],
)
def test_a_device_is_refused_for_what_it_lacks(monkeypatch, name, capability, shared, refusal):
    monkeypatch.setattr(triton_kernels.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(triton_kernels, "_shared_memory", lambda: shared)
    if refusal is None:
        triton_kernels._check_device()
    else:
        with pytest.raises(ValueError, match=refusal):
            triton_kernels._check_device()
