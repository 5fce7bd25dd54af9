# SPDX-License-Identifier: Apache-2.0
"""How much scratch the torch path takes at a time, and how many queries of attention fit it."""

# N attention heads   D head_dim   W sliding window   K selected entries   C queries of a chunk

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACE = 512 << 20
"""On a CPU, and for the scratch of backends that keep few intermediate results."""

_SHARE_OF_GPU = 32
_STEP = 512 << 20


def workspace_on(device: torch.device) -> int:
    """Return the bytes of scratch that the torch path takes on a device unless they are set."""
    return workspace_of(device_memory(device))


def workspace_of(memory: int) -> int:
    """Return the same by the device's memory in bytes, 0 for a CPU.

    On a GPU each chunk costs launches, and 1/32 of its memory saves most of them: 2.5 GiB on an
    H100. It depends on the device alone, not on what is free, so that runs repeat bit by bit.
    """
    return max(WORKSPACE, round(memory / _SHARE_OF_GPU / _STEP) * _STEP)


def on_gpu(device: torch.device) -> bool:
    """Return whether chunks cost launches on a device."""
    return device_memory(device) > 0


def device_memory(device: torch.device) -> int:
    """Return a GPU's memory in bytes, 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class AttentionScratch:
    """What attention holds of one query while a chunk is computed.

    Attributes:
        heads: N, of all rows of the batch.
        width: D.
        raw: Raw keys whose scores are computed.
        entries: Entries whose scores are computed.
        copied: K of all rows of the batch where selected entries are copied for each query, else 0.
        itemsize: Bytes of a number of the queries' dtype.
    """

    heads: int
    width: int
    raw: int
    entries: int
    copied: int
    itemsize: int

    @property
    def forward(self) -> int:
        """Bytes in forward: scores twice, or they, their rounded copy and three outputs."""
        sums = self.heads * self.width * 4
        return self._keys + max(2 * self._scores, self._scores + self._rounded + 3 * sums)

    @property
    def backward(self) -> int:
        """Bytes in backward: scores three times, or twice and what is multiplied with them."""
        sums, grads = self.heads * self.width * 4, self.copied * self.width * 4
        if self._rounded:
            grads += self.copied * self.width * self.itemsize
        held = 2 * self._scores + self._rounded
        return self._keys + max(3 * self._scores, held + max(grads, 3 * sums))

    @property
    def _scores(self) -> int:
        return self.heads * (self.raw + self.entries) * 4

    @property
    def _rounded(self) -> int:
        """Float32 weights are multiplied as they are."""
        return 0 if self.itemsize >= 4 else self._scores * self.itemsize // 4

    @property
    def _keys(self) -> int:
        """The copied entries and their int64 numbers, twice."""
        return self.copied * (self.width * self.itemsize + 16)


def chunk_rows(per_query: int, window: int, workspace_bytes: int, *, on_gpu: bool) -> int:
    """Return how many queries go together: one at least; whole windows if more than one.

    On a CPU one window at most: several leave its caches, and backward took up to 1.7 times as
    long.
    """
    rows = max(1, workspace_bytes // per_query)
    if rows <= window:
        return rows
    return rows - rows % window if on_gpu else window
