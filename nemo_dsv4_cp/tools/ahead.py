# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled without a GPU, and what their binaries need.

Launches are recorded instead of run, so that what is compiled is what a GPU would get. Triton must
not be interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from nemo_dsv4_cp.kernels.triton import tiles

# A product on tensor cores in PTX, newest first.
_TENSOR_CORE = {
    "tcgen05": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
}
# Multiplications of the largest of those instructions, and the warps that issue one together; one
# thread issues tcgen05 for its whole program.
_LARGEST = {
    "tcgen05": (128 * 256 * 16, None),
    "wgmma": (64 * 256 * 16, 4),
    "mma.sync": (16 * 8 * 16, 1),
}
_DOT = re.compile(r"tt\.dot\b.*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Specimen:
    """A kernel as one launch would have it compiled.

    Attributes:
        kernel: The function under ``triton.jit``.
        types: Type of each argument that is no constant, by name: ``"*bf16"``, ``"fp32"``,
            ``"i32"``; ``"i32:16"`` for an integer that 16 divides. Pointers count as aligned to
            16 bytes, as torch's allocations are.
        constants: Value of each ``tl.constexpr``, and of what else Triton takes for one.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.kernel.fn.__name__
        return name


def record(run: Callable[[], Any], arch: int) -> list[Specimen]:
    """Return what ``run`` would launch on devices of capability ``arch`` / 10, each kind once.

    Nothing is launched: the outputs of kernels hold whatever the memory held.
    """
    _refuse_to_interpret()
    found: list[Specimen] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = (kwargs.pop("num_warps", 4), kwargs.pop("num_stages", 3))
        specimen = _specimen(
            kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options
        )
        if specimen not in found:
            found.append(specimen)

    with tiles.compiled_for(arch), mock.patch.object(JITFunction, "run", note):
        run()
    return found


def _refuse_to_interpret() -> None:
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")


def _specimen(kernel: Any, values: Mapping[str, Any], options: tuple[int, int]) -> Specimen:
    """Specialise on what Triton specialises on: constants, ones, None and multiples of 16."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        value = values[parameter.name]
        specialised = not parameter.do_not_specialize
        one = specialised and isinstance(value, int) and value == 1
        if parameter.is_constexpr or value is None or one:
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            types[parameter.name] = f"{kind}:16" if specialised and value % 16 == 0 else kind
    return Specimen(kernel, types, constants, *options)


@dataclass(frozen=True)
class Compiled:
    """What the binary of a kernel takes.

    Attributes:
        registers: Per thread.
        stack: Bytes per thread; more than a few are spilled registers.
        shared: Bytes per program.
        tensor_core: ``"mma.sync"``, ``"wgmma"`` or ``"tcgen05"``; None where nothing multiplies.
        products: How many of that instruction.
        needed: How many the products in the kernel's source take at least.
        accumulators: How many tiles of tensor memory hold sums of products, on sm_100 and later.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_core: str | None
    products: int
    needed: int
    accumulators: int


def compile_kernel(specimen: Specimen, arch: int) -> Compiled:
    """Compile for CUDA devices of capability ``arch`` / 10 and read the binary."""
    _refuse_to_interpret()
    names = specimen.kernel.arg_names
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
        _needed(binary.asm["ttir"], arch, specimen.warps),
        len(re.findall(r"ttng\.tmem_alloc\b", binary.asm["ttgir"])),
    )


def _needed(ttir: str, arch: int, warps: int) -> int:
    """Return how many of the largest instructions hold the products of a kernel, each once."""
    instruction = "tcgen05" if arch >= 100 else "wgmma" if arch >= 90 else "mma.sync"
    largest, together = _LARGEST[instruction]
    programs = warps // together if together else 1
    products = sum(int(m) * int(k) * int(n) for m, k, n in _DOT.findall(ttir))
    return -(-products // (largest * programs))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes, as triton's cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers:\n{printed}")
    return int(found[1]), int(found[2])
