# SPDX-License-Identifier: Apache-2.0
"""Profiling and timing of one layer; nothing here is part of training."""
