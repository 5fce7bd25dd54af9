# SPDX-License-Identifier: Apache-2.0
"""Positions and documents: pure arithmetic, no communication, no AutoModel."""
