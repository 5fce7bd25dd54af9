# SPDX-License-Identifier: Apache-2.0
"""The Triton path: fused kernels for GPUs, registered as operations of torch."""

from nemo_dsv4_cp.kernels.triton.triton_kernels import TritonKernels

__all__ = ["TritonKernels"]
