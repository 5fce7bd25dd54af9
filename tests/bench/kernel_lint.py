# SPDX-License-Identifier: Apache-2.0
"""What the binary of a kernel must keep to, and where one falls short today."""

from collections.abc import Iterator
from dataclasses import dataclass

import triton

from nemo_dsv4_cp.gpus import SHARED_MEMORY
from nemo_dsv4_cp.tools.ahead import Compiled, Specimen

ISSUED_OVER_NEEDED = 1.1
LOADS_AHEAD = 3
"""Stages from which on loads are in flight during products."""


@dataclass(frozen=True)
class Allowed:
    """At most so much for some binaries of a kernel.

    Attributes:
        archs: Capabilities times 10; empty for all.
        dtypes: Empty for all.
        versions: Of triton, as ``"3.9"``; empty for all.
        stack: Bytes per thread.
        issued_over_needed: Products that tensor cores compute over those needed.
        conversions: Sums of products that change their layout inside a loop.
        tmem_copies: Tiles of tensor memory that are copied inside a loop.
        waiting: Loops that wait for their loads though they have stages to load ahead.
    """

    kernel: str
    archs: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    stack: int = 0
    issued_over_needed: float = ISSUED_OVER_NEEDED
    conversions: int = 0
    tmem_copies: int = 0
    waiting: int = 0


HALF = ("bf16", "fp16")

# Where kernels fall short: tighten these, and delete what none needs any more.
AT_MOST = [
    Allowed("forward_kernel", (80,), HALF, issued_over_needed=1.5),
    Allowed("queries_kernel", (90,), HALF, waiting=1),
    Allowed("index_scores_kernel", (100, 103), HALF, waiting=1),
    Allowed("gradients_kernel", (90,), ("fp32",), stack=8),
    # Float32 with 3.9: the indexer is trained in bfloat16 on GPUs.
    Allowed("gradients_kernel", (), ("fp32",), ("3.9",), stack=600),
    Allowed("index_keys_kernel", (), ("fp32",), ("3.9",), stack=1200),
    Allowed("gradients_kernel", (100, 103), ("fp32",), ("3.6",), stack=8),
    Allowed("gradients_kernel", (80,), HALF, ("3.4",), stack=40),
    Allowed("index_keys_kernel", (100, 103), ("fp32",), stack=24),
]

UNKNOWN = {"3.4": (103,)}
"""Architectures that the assembler of a version of triton does not know."""

VERSION = ".".join(triton.__version__.split(".")[:2])


def _allowed(figure: str, compiled: Compiled, dtype: str) -> float:
    of_it = [
        each
        for each in AT_MOST
        if each.kernel == compiled.kernel
        and compiled.arch in (each.archs or [compiled.arch])
        and dtype in (each.dtypes or [dtype])
        and VERSION in (each.versions or [VERSION])
    ]
    return max(getattr(each, figure) for each in [Allowed(compiled.kernel), *of_it])


def figures(compiled: Compiled, stages: int) -> dict[str, float]:
    """Return what the lint looks at, by its name in :class:`Allowed`."""
    waiting = sum(loop.ahead is False for loop in compiled.loops) if stages >= LOADS_AHEAD else 0
    return {
        "stack": compiled.stack,
        "issued_over_needed": compiled.issued_over_needed or 0,
        "conversions": len(compiled.conversions),
        "tmem_copies": compiled.tmem_copies,
        "waiting": waiting,
    }


def faults(compiled: Compiled, specimen: Specimen, dtype: str) -> Iterator[str]:
    """Yield what a binary takes beyond the limits."""
    where = f"{compiled.kernel}, sm_{compiled.arch}, {dtype}, triton {triton.__version__}"
    limit = SHARED_MEMORY[compiled.arch]
    if compiled.shared > limit:
        yield f"{where}: {compiled.shared} bytes of shared memory, a block has {limit}"
    for name, found in figures(compiled, specimen.stages).items():
        allowed = _allowed(name, compiled, dtype)
        if found > allowed:
            yield f"{where}: {name} {found:g}, at most {allowed:g}"
