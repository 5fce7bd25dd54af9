# SPDX-License-Identifier: Apache-2.0
"""Boundary transport: only rows that are wanted move, only finished entries are all-gathered."""

from __future__ import annotations

from nemo_dsv4_cp.exchange.transport import Transport


class BoundaryTransport(Transport):
    """Sends each rank the rows that it lacks and nothing else."""
