# SPDX-License-Identifier: Apache-2.0
"""Transports, kernels and batch functions by name, out of installed distributions' entry points."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

TRANSPORTS = "nemo_dsv4_cp.transports"
BATCH_FNS = "nemo_dsv4_cp.batch_fns"
KERNELS = "nemo_dsv4_cp.kernels"
ARCHITECTURES = "nemo_automodel.architectures"


def names(group: str) -> list[str]:
    """Return the names that installed distributions offer in ``group``, sorted."""
    return sorted(entry_points(group=group).names)


@functools.cache  # a step loads its transport: metadata is files
def load(group: str, name: str) -> Any:
    """Import and return what ``name`` stands for in ``group``.

    Raises:
        ValueError: If no installed distribution offers it.
    """
    found = entry_points(group=group, name=name)
    if not found:
        raise ValueError(f"{name!r} is not installed in the entry-point group {group!r}")
    return next(iter(found)).load()
