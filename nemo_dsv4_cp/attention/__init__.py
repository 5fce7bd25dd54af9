# SPDX-License-Identifier: Apache-2.0
"""A layer that attends across the cuts."""

from nemo_dsv4_cp.attention.layer import ContextParallelAttention

__all__ = ["ContextParallelAttention"]
