# SPDX-License-Identifier: Apache-2.0
"""What the lint reads in binaries, on small kernels with one fault each."""

import os

import pytest
import triton
import triton.language as tl

from nemo_dsv4_cp.tools.ahead import Specimen, compile_kernel
from tests.bench.kernel_lint import faults

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is never compiled"
)
ROWS, DEPTH = 64, 128


@triton.jit
def one_product(
    a, b, out, steps, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    row, key, col = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for i in range(steps):
        x = tl.load(a + (i * ROWS + row[:, None]) * KEYS + key[None, :])
        y = tl.load(b + (i * KEYS + key[:, None]) * DEPTH + col[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(out + row[:, None] * DEPTH + col[None, :], acc)


@triton.jit
def chained_products(
    a, b, out, steps, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    row, key, col = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DEPTH)
    x = tl.load(a + row[:, None] * DEPTH + col[None, :])
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for i in range(steps):
        y = tl.load(b + (i * KEYS + key[:, None]) * DEPTH + col[None, :])
        s = tl.dot(x, tl.trans(y))
        acc = tl.dot(s.to(y.dtype), y, acc)
    tl.store(out + row[:, None] * DEPTH + col[None, :], acc)


@triton.jit
def two_products_in_one_sum(
    a, b, out, steps, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    row, key, col = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for i in range(steps):
        for half in tl.static_range(2):
            n = i * 2 + half
            x = tl.load(a + (n * KEYS + key[:, None]) * ROWS + row[None, :])
            y = tl.load(b + (n * KEYS + key[:, None]) * DEPTH + col[None, :])
            acc = tl.dot(tl.trans(x), y, acc)
    tl.store(out + row[:, None] * DEPTH + col[None, :], acc)


def compiled(kernel, arch, *, keys=64, depth=DEPTH, warps=8, stages=3):
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "steps": "i32"}
    sizes = {"ROWS": ROWS, "KEYS": keys, "DEPTH": depth}
    specimen = Specimen(kernel, types, sizes, warps, stages)
    return compile_kernel(specimen, arch), specimen


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_product_is_counted_once_in_every_kind_of_tensor_core(arch):
    found, specimen = compiled(one_product, arch)
    (loop,) = found.loops
    assert loop.issued == found.needed[0] == 2 * ROWS * 64 * DEPTH
    assert loop.global_bytes == 2 * (ROWS * 64 + 64 * DEPTH)
    assert loop.barriers > 0 and loop.shared_read >= loop.global_bytes
    assert found.issued_over_needed == 1
    assert not list(faults(found, specimen, "bf16"))


def test_a_product_of_both_warp_groups_is_a_fault():
    found, specimen = compiled(chained_products, 90, keys=32)
    assert found.issued_over_needed == 1.5
    assert any("issued_over_needed 1.5" in fault for fault in faults(found, specimen, "bf16"))


def test_sums_that_cross_shared_memory_or_copy_their_tile_are_faults():
    found, specimen = compiled(two_products_in_one_sum, 90, depth=256, stages=2)
    assert found.conversions == ("64x256xf32",) * 2
    assert any("conversions 2" in fault for fault in faults(found, specimen, "bf16"))
    found, specimen = compiled(two_products_in_one_sum, 100, depth=256, stages=2)
    assert found.tmem_copies > 0
    assert any("tmem_copies" in fault for fault in faults(found, specimen, "bf16"))


def test_loads_that_wait_though_there_are_stages_are_a_fault():
    ahead, _ = compiled(one_product, 90, stages=3)
    waiting, specimen = compiled(one_product, 90, stages=2)
    assert [loop.ahead for loop in ahead.loops + waiting.loops] == [True, False]
    assert not list(faults(waiting, specimen, "bf16"))
    as_if = Specimen(specimen.kernel, specimen.types, specimen.constants, 8, 3)
    assert any("waiting 1" in fault for fault in faults(waiting, as_if, "bf16"))


def test_spilled_registers_are_a_fault():
    found, specimen = compiled(one_product, 80, depth=512, warps=4, stages=2)
    assert found.stack > 0
    assert any("stack" in fault for fault in faults(found, specimen, "bf16"))


def test_more_shared_memory_than_a_block_has_is_a_fault():
    found, specimen = compiled(one_product, 80, keys=128, depth=256, stages=4)
    assert any("bytes of shared memory" in fault for fault in faults(found, specimen, "bf16"))
