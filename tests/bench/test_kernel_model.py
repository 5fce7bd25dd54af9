# SPDX-License-Identifier: Apache-2.0
"""The model of a kernel's time, on loops whose cycles are counted by hand."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nemo_dsv4_cp.bench.compiled_kernels import passes_of
from nemo_dsv4_cp.bench.kernel_model import BARRIER, LATENCY, estimate
from nemo_dsv4_cp.gpus import MULTIPROCESSORS
from nemo_dsv4_cp.tools.ahead import Compiled
from nemo_dsv4_cp.tools.inner_loops import Loop, Product
from nemo_dsv4_cp.tools.sizes import read_model_fields

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="launches that are interpreted are none"
)
SIZES = SimpleNamespace(**read_model_fields("v4_flash"))
CLOCK = MULTIPROCESSORS[90].cycles_per_second
FLOP = 4096 * 1000  # a thousand cycles of an H100's SM


@pytest.fixture(scope="module")
def layer():
    passes = {(each.ratio, each.direction): each for each in passes_of("v4_flash", 90)}
    return lambda ratio, direction, kernel: (
        [x for x in passes[ratio, direction].launches if x.specimen.name == kernel],
        passes[ratio, direction].plan,
    )


def compiled(kernel, shared=200 << 10, **loop):
    figures = {
        "products": (Product(FLOP, FLOP, 0),), "barriers": 0, "shared_read": 0,
        "shared_written": 0, "global_bytes": 0, "waits": (1,), "ahead": True, "instructions": 0,
    }  # fmt: skip
    loops = (Loop(**figures | loop),)
    return Compiled(kernel, 90, 8, 120, 0, shared, "wgmma", loops, (FLOP,), (), 0, 0)


def ms(layer, kernel, ratio=0, direction="forward", **figures):
    return estimate(compiled(kernel, **figures), *layer(ratio, direction, kernel), SIZES)


def test_products_at_the_peak_take_their_flop(layer):
    found = ms(layer, "forward_kernel")
    flop = 2 * 2 * 64 * 512 * 16_384 * 128  # two products of 64 heads with 128 keys a query
    assert found.ms == pytest.approx(flop / (132 * 4096 * CLOCK) * 1e3)
    assert (found.bound, found.programs) == ("tensor cores", 16_384)


@pytest.mark.parametrize(
    ("figures", "cycles", "bound"),
    [
        ({"products": (Product(FLOP, FLOP, 128 * 3000),), "shared_read": 128 * 3000}, 3000,
         "shared memory"),
        ({"products": (Product(FLOP, 2 * FLOP, 0),)}, 2000, "tensor cores"),
        ({"shared_read": 128 * 500, "shared_written": 128 * 100}, 1600, "tensor cores"),
        ({"instructions": 4 * 1500}, 2500, "issue"),
        ({"barriers": 50}, 1000 + 50 * BARRIER, "waits"),
        ({"global_bytes": 23.7 * 5000}, 5000, "L2"),
        ({"global_bytes": 23.7 * 500}, 1000, "tensor cores"),
        ({"global_bytes": 23.7 * 500, "ahead": False}, 1500 + LATENCY, "tensor cores"),
        # Two programs: one multiplies while the other waits.
        ({"global_bytes": 23.7 * 500, "ahead": False, "shared": 100 << 10},
         (1500 + LATENCY) / 2, "tensor cores"),
    ],
)  # fmt: skip
def test_a_step_takes_what_its_parts_take(layer, figures, cycles, bound):
    alone = ms(layer, "forward_kernel").ms
    found = ms(layer, "forward_kernel", **figures)
    assert found.ms / alone == pytest.approx(cycles / 1000)
    assert found.bound == bound


def _undivided(launch):
    """As if one program walked all queries of a block of entries."""
    span, parts = launch.values["raw_blocks"], launch.values["parts"]
    blocks, *rest = launch.grid
    return replace(launch, grid=(span + (blocks - span) // parts, *rest))


def test_few_long_programs_leave_sms_idle(layer):
    launches, plan = layer(128, "backward", "keys_kernel")
    found = estimate(compiled("keys_kernel"), [_undivided(each) for each in launches], plan, SIZES)
    assert found.bound == "longest program"
    # A program takes half the columns of 64 entries' gradient over all queries: two products.
    steps = 2 * 2 * 64 * 256 * 64 * 16_384 / FLOP
    assert found.ms == pytest.approx(steps * 1000 / CLOCK * 1e3, rel=0.1)


def test_what_does_not_multiply_takes_its_bytes(layer):
    launches, plan = layer(0, "forward", "norm_rotate_kernel")
    none = Compiled("norm_rotate_kernel", 90, 4, 60, 0, 0, None, (), (), (), 0, 0)
    found = estimate(none, launches, plan, SIZES)
    assert found.bound == "memory"
    assert found.ms == pytest.approx(2 * 16_384 * 64 * 512 * 2 / 3350e9 * 1e3)
