# SPDX-License-Identifier: Apache-2.0
"""The torch path: any device, and what every other kernel is compared with."""

from nemo_dsv4_cp.kernels.reference.torch_kernels import TorchKernels

__all__ = ["TorchKernels"]
