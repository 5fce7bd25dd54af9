# SPDX-License-Identifier: Apache-2.0
"""Devices that the Triton kernels refuse, by what torch and Triton report of them."""

import pytest
import torch

from nemo_dsv4_cp.gpus import SHARED_MEMORY
from nemo_dsv4_cp.kernels.triton import triton_kernels

TOO_LITTLE = r"163 KiB of shared memory .* {}.* has 99; set"


@pytest.mark.parametrize(
    ("name", "capability", "shared", "refusal"),
    [
        ("Tesla V100", (7, 0), 96 << 10, r"capability 8.0 or more, and this one has 7.0"),
        ("NVIDIA A40", (8, 6), SHARED_MEMORY[86], TOO_LITTLE.format("NVIDIA A40")),
        ("NVIDIA L40S", (8, 9), SHARED_MEMORY[89], TOO_LITTLE.format("NVIDIA L40S")),
        ("NVIDIA RTX PRO 6000", (12, 0), SHARED_MEMORY[120], TOO_LITTLE.format("NVIDIA RTX PRO")),
        ("NVIDIA A100", (8, 0), SHARED_MEMORY[80], None),
        ("NVIDIA H100", (9, 0), SHARED_MEMORY[90], None),
        ("NVIDIA B300", (10, 3), SHARED_MEMORY[103], None),
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


def test_a_device_that_an_old_triton_does_not_compile_for_is_refused(monkeypatch):
    monkeypatch.setattr(triton_kernels.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B300")
    monkeypatch.setattr(triton_kernels, "_shared_memory", lambda: 227 << 10)
    triton_kernels._check_device()
    monkeypatch.setattr(triton_kernels.tiles, "TRITON", (3, 5))
    with pytest.raises(ValueError, match=r"NVIDIA B300; install triton 3\.6 .*kernels: torch"):
        triton_kernels._check_device()
