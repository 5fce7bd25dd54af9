# SPDX-License-Identifier: Apache-2.0
"""Recipes for AutoModel's CLI, shipped inside the wheel as ``nemo_dsv4_cp.configs``."""
