# SPDX-License-Identifier: Apache-2.0
"""What a process holds: to be the same after many steps as after a few."""

import dataclasses
import functools
import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from nemo_dsv4_cp.attention.indexer import KeptIndices
from nemo_dsv4_cp.automodel import patches


@dataclass(frozen=True)
class Held:
    """Counts of a moment.

    Attributes:
        resident_mib: Memory of the process that is in RAM.
        tensors: Tensors that Python objects hold.
        tensor_bytes: Their storages, each once.
        top_k_indices: Tensors of top-k indices kept for a recomputation.
        layouts: What is remembered of layouts.
        groups: Process groups.
        files: Open file handles.
        threads: Of Python's; those of gloo come with its groups.
        patches: Names of AutoModel that are replaced.
    """

    resident_mib: float
    tensors: int
    tensor_bytes: int
    top_k_indices: int
    layouts: int
    groups: int
    files: int
    threads: int
    patches: int

    @classmethod
    def now(cls) -> "Held":
        """Count what is left after a garbage collection."""
        gc.collect()
        # By type: to ask some lazy objects of AutoModel what they are imports what they stand for.
        objects = [(o, type(o)) for o in gc.get_objects()]
        tensors = [o for o, kind in objects if issubclass(kind, torch.Tensor)]
        storages = {}
        for tensor in tensors:
            local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            storage = local.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            resident_mib=round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
            tensors=len(tensors),
            tensor_bytes=sum(storages.values()),
            top_k_indices=sum(len(o._indices) for o, kind in objects if kind is KeptIndices),
            layouts=sum(memory.cache_info().currsize for memory in _memories()),
            groups=len(distributed_c10d._world.pg_map) if dist.is_initialized() else 0,
            files=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            patches=len(patches._replaced),
        )

    def without_memory(self) -> dict[str, int]:
        """Return what is the same to the last one; how much RAM it takes is the allocator's."""
        counts = dataclasses.asdict(self)
        del counts["resident_mib"]
        return counts


def _memories() -> list[Any]:
    """Return what remembers something of the last layouts."""
    return [
        o
        for o in gc.get_objects()
        if type(o) is functools._lru_cache_wrapper
        and (o.__module__ or "").startswith("nemo_dsv4_cp.sequence")
    ]


def forget_layouts() -> None:
    """Drop what is remembered of layouts, which is bounded and takes many steps to fill."""
    for memory in _memories():
        memory.cache_clear()
