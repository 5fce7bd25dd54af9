"""Kernels compiled without a GPU, and what the binary says of them.

A kernel file offers ``ahead_of_time(...)``: its kernels at given sizes, as its launches would have
them compiled, each a :class:`Specimen`. Triton must not be interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What PTX calls a product on tensor cores, newest first.
_TENSOR_CORE = {
    "tcgen05": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
}


@dataclass(frozen=True)
class Specimen:
    """A kernel at one size.

    Attributes:
        kernel: The function under ``triton.jit``.
        types: Type of each argument that is no constant, by name: ``"*bf16"``, ``"fp32"``,
            ``"i32"``; ``"i32:16"`` for a whole number that 16 divides. Pointers count as aligned to
            16 bytes, as torch's allocations are.
        constants: Value of each ``tl.constexpr``.
        warps: Warps a program.
        stages: Steps whose loads are in flight.
        label: Tells apart specimens of one kernel.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    label: str = ""

    @property
    def name(self) -> str:
        """The kernel's name, and the label."""
        name: str = self.kernel.fn.__name__
        return f"{name} {self.label}" if self.label else name


@dataclass(frozen=True)
class Compiled:
    """What the binary of a kernel takes.

    Attributes:
        kernel: Name of the specimen.
        arch: 80, 90, 100.
        registers: A thread.
        stack: Bytes a thread; more than a few are spilled registers.
        shared: Bytes a program.
        tensor_core: ``"mma.sync"``, ``"wgmma"`` or ``"tcgen05"``; None where nothing multiplies.
        products: How many of that instruction.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_core: str | None
    products: int


def compile_kernel(specimen: Specimen, arch: int) -> Compiled:
    """Compile for CUDA devices of capability ``arch`` / 10 and read the binary.

    Raises:
        RuntimeError: If triton is interpreting.
        ValueError: If the specimen leaves out an argument.
    """
    if not hasattr(specimen.kernel, "arg_names") or knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    names = specimen.kernel.arg_names
    missing = [n for n in names if n not in specimen.types and n not in specimen.constants]
    if missing:
        raise ValueError(f"{specimen.name} says nothing of the arguments {missing}")
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        kind, _, divisor = specimen.types.get(name, "constexpr").partition(":")
        signature[name] = kind
        if divisor or kind.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", int(divisor or 16)]]
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    binary = triton.compile(
        ASTSource(fn=specimen.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": specimen.warps, "num_stages": specimen.stages},
    )
    registers, stack = _usage(binary.asm["cubin"])
    ptx = binary.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in _TENSOR_CORE.items()}
    found = next((name for name, count in counts.items() if count), None)
    return Compiled(
        specimen.name,
        arch,
        registers,
        stack,
        binary.metadata.shared,
        found,
        counts[found] if found else 0,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes, as the tool that comes with triton reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage told no registers:\n{told}")
    return int(found[1]), int(found[2])
