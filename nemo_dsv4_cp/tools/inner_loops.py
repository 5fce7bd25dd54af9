# SPDX-License-Identifier: Apache-2.0
"""What the inner loops of a compiled kernel do in one step, read in its PTX and TTGIR."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WARP = 32
_PRODUCT = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
_LABEL = re.compile(r"(\$L__BB\w+):")
_BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_INSTRUCTION = re.compile(r"(@\S+\s+)?([a-z][\w.:]+)\s+(.*);|(@\S+\s+)?([a-z][\w.:]+);")
_WGMMA = re.compile(r"wgmma\.\S+\.m(\d+)n(\d+)k(\d+)\.\w+\.(\w+)\.\w+ \{[^}]*\}, (\{)?")
_TCGEN05 = re.compile(r"tcgen05\.mma\S*kind::(\w+) \[[^]]*\], (\[)?[^,]*, [^,]+, ([%\w]+)")
_MMA_SYNC = re.compile(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
_NUMBER = re.compile(r"mov\.b32\s+(%r\d+), (\d+);")
_BARRIER = re.compile(r"(bar|barrier)(\.cta)?\.(sync|red)\b")
_BYTES = {"bf16": 2, "f16": 2, "tf32": 4}


@dataclass(frozen=True)
class Product:
    """A tensor-core instruction as the whole program issues it.

    Attributes:
        flop: Floating-point operations, of all warps that issue it.
        occupied: Those that its time is for: half of them go unused with 64 rows of tensor memory's
            128.
        shared: Bytes of its factors that are read in shared memory.
    """

    flop: int
    occupied: int
    shared: int


@dataclass(frozen=True)
class Loop:
    """One step of an innermost loop that multiplies, of a whole program.

    Attributes:
        products: Its tensor-core instructions.
        barriers: Of all warps.
        shared_read: Bytes, those of the products too.
        shared_written: Bytes.
        global_bytes: Bytes of the tensors that it loads, stores or adds to in global memory.
        waits: Groups of copies that may be in flight after each wait for copies.
        ahead: Whether loads are in flight while it multiplies; None where it loads nothing.
        instructions: Other PTX instructions, of all warps.
    """

    products: tuple[Product, ...]
    barriers: int
    shared_read: int
    shared_written: int
    global_bytes: int
    waits: tuple[int, ...]
    ahead: bool | None
    instructions: int

    @property
    def issued(self) -> int:
        """Floating-point operations that tensor cores execute."""
        return sum(product.flop for product in self.products)


@dataclass
class _Block:
    lines: list[str]
    after: list[int]


def read(ptx: str, ttgir: str, warps: int) -> tuple[Loop, ...]:
    """Return the innermost loops that multiply; a kernel that has none but multiplies is one.

    Raises:
        RuntimeError: If the two texts have other loops.
    """
    blocks, numbers = _blocks(ptx), dict(_NUMBER.findall(ptx))
    found = _multiplying(blocks, set(range(len(blocks))))
    if not found and _PRODUCT.search(ptx):
        found = [set(range(len(blocks)))]
    bodies = [[line for n in sorted(each) for line in blocks[n].lines] for each in found]
    moved = _global_bytes(ttgir)
    if found and len(moved) != len(found):
        raise RuntimeError(f"{len(moved)} loops multiply in TTGIR, and {len(found)} in PTX")
    pairs = zip(bodies, moved, strict=False)
    return tuple(_step(body, size, warps, numbers) for body, size in pairs)


def _blocks(ptx: str) -> list[_Block]:
    """Cut PTX at labels and branches, and link the parts."""
    blocks, labels, jumps = [_Block([], [])], {}, []
    for line in map(str.strip, ptx.splitlines()):
        if found := _LABEL.match(line):
            blocks.append(_Block([], []))
            labels[found[1]] = len(blocks) - 1
        branch = _BRANCH.match(line)
        blocks[-1].lines.append(line)
        if branch:
            jumps.append((len(blocks) - 1, branch[2], branch[1] is not None))
            blocks.append(_Block([], []))
    leaving = {place for place, _, conditional in jumps if not conditional}
    for place, block in enumerate(blocks[:-1]):
        if place not in leaving and "ret;" not in block.lines:
            block.after.append(place + 1)
    for place, label, _ in jumps:
        blocks[place].after.append(labels[label])
    return blocks


def _multiplying(blocks: Sequence[_Block], nodes: set[int]) -> list[set[int]]:
    """Return the loops among ``nodes`` that multiply and hold no such loop."""
    reached = {node: _reached(blocks, nodes, node) for node in nodes}
    found, left = [], set(nodes)
    while left:
        first = min(left)
        loop = {node for node in reached[first] if first in reached[node]}
        left -= loop | {first}
        if not any(_PRODUCT.search(line) for node in loop for line in blocks[node].lines):
            continue
        entered = {n for m in nodes - loop for n in blocks[m].after if n in loop} or {min(loop)}
        found += _multiplying(blocks, loop - entered) or [loop]
    return found


def _reached(blocks: Sequence[_Block], nodes: set[int], start: int) -> set[int]:
    """Return the nodes that a path of one branch or more leads to."""
    found: set[int] = set()
    ahead = [start]
    while ahead:
        new = [n for n in blocks[ahead.pop()].after if n in nodes and n not in found]
        found.update(new)
        ahead += new
    return found


def _step(lines: Sequence[str], moved: int, warps: int, numbers: dict[str, str]) -> Loop:
    products: list[Product] = []
    waits: list[int] = []
    loaded: set[str] = set()  # registers, and those made of them in the same step
    needs_loads = False
    barriers = copied = read = written = others = 0
    for line in lines:
        if _PRODUCT.search(line):
            products.append(_product(line, warps, numbers))
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        others += warps
        name = instruction[2] or instruction[5]
        operands = instruction[3] or ""
        to, _, of = operands.partition("}," if operands.startswith("{") else ",")
        if not loaded.isdisjoint(_REGISTER.findall(of)):
            loaded.update(_REGISTER.findall(to))
            needs_loads |= name.startswith("st.shared")
        barriers += bool(_BARRIER.match(name))
        if name == "cp.async.wait_group":
            waits.append(int(operands))
        elif name.startswith(("cp.async.ca", "cp.async.cg")):
            size = int(operands.split(",")[2], 0) * WARP * warps
            copied, written = copied + size, written + size
        elif name.startswith(("ldmatrix", "stmatrix")):
            size = int(re.search(r"\.x(\d)", name)[1]) * 128 * warps  # type: ignore[index]
            read, written = (read + size, written) if name[0] == "l" else (read, written + size)
        elif ".shared" in name and name.startswith(("ld.", "st.")):
            size = _width(name) * WARP * warps
            read, written = (read + size, written) if name[0] == "l" else (read, written + size)
        elif name.startswith("ld.global"):
            loaded.update(_REGISTER.findall(operands.partition("[")[0]))
    ahead = min(waits, default=0) > 0 if copied else not needs_loads if loaded else None
    read += sum(product.shared for product in products)
    return Loop(tuple(products), barriers, read, written, moved, tuple(waits), ahead, others)


def _product(line: str, warps: int, numbers: dict[str, str]) -> Product:
    """Read a tensor-core instruction; those of warp groups are issued by each group."""
    if found := _WGMMA.search(line):
        rows, columns, depth = map(int, found.groups()[:3])
        factors = depth * (columns + (0 if found[5] else rows)) * _BYTES[found[4]]
        flop = 2 * rows * columns * depth * warps // 4
        return Product(flop, flop, factors * warps // 4)
    if found := _TCGEN05.search(line):
        size = _BYTES[found[1]]
        # The instruction descriptor: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28.
        descriptor = int(numbers.get(found[3], found[3]))
        rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        depth = 32 // size
        factors = depth * (columns + (0 if found[2] else rows)) * size
        return Product(2 * rows * columns * depth, 2 * 128 * columns * depth, factors)
    found = _MMA_SYNC.search(line)
    if found is None:
        raise RuntimeError(f"a product that is not known: {line}")
    rows, columns, depth = map(int, found.groups())
    flop = 2 * rows * columns * depth * warps
    return Product(flop, flop, 0)


def _width(name: str) -> int:
    """Return the bytes that a thread moves, by the vector and type of an instruction's name."""
    several = re.search(r"\.v(\d)\b", name)
    bits = re.findall(r"\.(?:b|f|u|s|bf)(\d+)(x2)?\b", name)
    size = sum(int(each) * (2 if twice else 1) for each, twice in bits[-1:]) // 8
    return size * (int(several[1]) if several else 1)


# TTIR and TTGIR: loops are regions in braces.
_DOT = re.compile(r"tt\.dot\b.*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")
_FOR = re.compile(r"scf\.(for|while)\b")
_CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
_VALUE = re.compile(r"%[\w#]+")
_CONVERSION = re.compile(r"(%\w+) = ttg\.convert_layout (%[\w#]+) : .*-> tensor<([\dx]+xf32),")
_MOVES = re.compile(r"\btt\.(load|store|atomic_rmw)\b|ttg\.async_copy_global_to_local\b")
_POINTERS = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)")
_SHAPE = re.compile(r"tensor<([\dx]+xf32)")
_SUM = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot)\b.*-> tensor<([\dx]+xf32),"
    r"|ttng\.tc_gen5_mma\b.*memdesc<([\dx]+xf32),"
)


def needed(ttir: str) -> tuple[int, ...]:
    """Return the floating-point operations of each loop's products, or of those outside loops."""
    loops = [sum(map(_flop, _DOT.findall("\n".join(body)))) for body in _loops(ttir)]
    of_loops = tuple(flop for flop in loops if flop)
    return of_loops or tuple(filter(None, [sum(map(_flop, _DOT.findall(ttir)))]))


def _global_bytes(ttgir: str) -> list[int]:
    """Return the bytes of the tensors in global memory that each loop with products touches.

    What several threads load of one address counts once: their cache gives it to them.
    """
    bodies = [body for body in _loops(ttgir) if _SUM.search("\n".join(body))]
    found = []
    for body in bodies or [ttgir.splitlines()]:
        moved = [_POINTERS.search(line) for line in body if _MOVES.search(line)]
        shapes = [(each[1].split("x")[:-1], int(each[2])) for each in moved if each]
        found.append(sum(math.prod(map(int, shape)) * bits // 8 for shape, bits in shapes))
    return found


def _flop(dot: tuple[str, str, str]) -> int:
    rows, depth, columns = map(int, dot)
    return 2 * rows * depth * columns


def _loops(text: str) -> Iterator[list[str]]:
    """Yield the lines of each loop, without those of loops inside it."""
    opened: list[tuple[int, list[str]]] = []
    depth = 0
    for line in text.splitlines():
        if _FOR.search(line):
            opened.append((depth, []))
        if opened:
            opened[-1][1].append(line)
        depth += line.count("{") - line.count("}")
        while opened and depth <= opened[-1][0]:
            yield opened.pop()[1]


def conversions(ttgir: str) -> list[str]:
    """Return the shapes of sums that a loop carries from step to step in changing layouts."""
    found = []
    for body in _loops(ttgir):
        carried = set(_SHAPE.findall(body[0].partition(" -> ")[2]))
        sums = {shape for line in body for each in _SUM.findall(line) for shape in each if shape}
        new = [_CONVERSION.search(line) for line in body]
        found += [each[3] for each in new if each and each[3] in sums & carried]
    return found


def tmem_copies(ttgir: str) -> int:
    """Return how many tiles of tensor memory are stored in a loop as they were loaded."""
    copies = 0
    for body in _loops(ttgir):
        names = [line.split(" = ")[0].strip() for line in body if "ttng.tmem_load" in line]
        loaded = set(names)
        # Carried over to the next step, in the order of the loop's values.
        carried = [new for new, _ in _CARRIED.findall(body[0].partition("iter_args(")[2])]
        yielded = [_VALUE.findall(each.partition(" : ")[0]) for each in body if "scf.yield" in each]
        for _ in range(2):
            for line in body:
                if (new := _CONVERSION.search(line)) and new[2] in loaded:
                    loaded.add(new[1])
            for new, old in zip(carried, yielded[-1] if yielded else [], strict=False):
                loaded |= {new} if old in loaded else set()
        stored = [line.split("ttng.tmem_store ")[1] for line in body if "ttng.tmem_store" in line]
        copies += sum(_VALUE.findall(each)[0] in loaded for each in stored)
    return copies
