# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled without a GPU, and what their binaries need.

Launches are recorded instead of run, so that what is compiled is what a GPU would get. Triton must
not be interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from nemo_dsv4_cp.tools import inner_loops
from nemo_dsv4_cp.tools.inner_loops import Loop

# A product on tensor cores in PTX, newest first.
_TENSOR_CORE = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}

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

    @property
    def key(self) -> tuple[Any, ...]:
        """What Triton keeps a binary by: equal for equal specimens."""
        parts = self.types.items(), self.constants.items()
        return self.name, *(tuple(sorted(each)) for each in parts), self.warps, self.stages


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and the value of each argument that is no tensor."""

    specimen: Specimen
    grid: tuple[int, ...]
    values: Mapping[str, Any]


def record(run: Callable[[], Any], arch: int) -> list[Launch]:
    """Return what ``run`` would launch on devices of capability ``arch`` / 10.

    Nothing is launched: the outputs of kernels hold whatever the memory held.
    """
    _refuse_to_interpret()
    found: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = (kwargs.pop("num_warps", 4), kwargs.pop("num_stages", 3))
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        plain = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
        size = tuple(grid) if isinstance(grid, Sequence) else (int(grid),)
        found.append(Launch(_specimen(kernel, values, options), size, plain))

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
        loops: The innermost loops that multiply on tensor cores.
        needed: Floating-point operations of the products in the source of each of those loops.
        conversions: Shapes of sums of products that a loop carries in changing layouts.
        tmem_copies: Tiles of tensor memory that are copied to another inside a loop.
        tmem_tiles: Tiles of tensor memory that the kernel has.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_core: str | None
    loops: tuple[Loop, ...]
    needed: tuple[int, ...]
    conversions: tuple[str, ...]
    tmem_copies: int
    tmem_tiles: int

    @property
    def issued_over_needed(self) -> float | None:
        """Products that tensor cores compute over those of the source: the worst of the loops.

        More than 1 where warp groups compute the same product. None without tensor cores.

        Raises:
            RuntimeError: If the loops of the binary are not those of the source.
        """
        if not self.loops:
            return None
        if len(self.loops) != len(self.needed):
            raise RuntimeError(
                f"{self.kernel}, sm_{self.arch}: {len(self.needed)} loops of the source multiply, "
                f"and {len(self.loops)} of the binary"
            )
        pairs = zip(self.loops, self.needed, strict=True)
        return max(loop.issued / needed for loop, needed in pairs)


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
    ptx, ttgir = binary.asm["ptx"], binary.asm["ttgir"]
    return Compiled(
        specimen.name,
        arch,
        specimen.warps,
        registers,
        stack,
        binary.metadata.shared,
        next((name for name, instruction in _TENSOR_CORE.items() if instruction in ptx), None),
        inner_loops.read(ptx, ttgir, specimen.warps),
        inner_loops.needed(binary.asm["ttir"]),
        tuple(inner_loops.conversions(ttgir)),
        inner_loops.tmem_copies(ttgir),
        ttgir.count("ttng.tmem_alloc"),
    )


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
