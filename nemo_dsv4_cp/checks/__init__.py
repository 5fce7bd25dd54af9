# SPDX-License-Identifier: Apache-2.0
"""What is checked before and while training: batches, consistency across ranks, finite values."""
