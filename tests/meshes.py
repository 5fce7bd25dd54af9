# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a one-dimensional CP mesh, for arithmetic that needs no process group."""

from __future__ import annotations

from typing import Any


class FakeMesh:
    def __init__(self, size: int, rank: int = 0, group: Any = "the CP group") -> None:
        self._size, self._rank, self._group = size, rank, group

    def size(self) -> int:
        return self._size

    def get_local_rank(self) -> int:
        return self._rank

    def get_group(self) -> Any:
        return self._group
