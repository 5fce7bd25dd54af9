# SPDX-License-Identifier: Apache-2.0
"""Every kernel at the published sizes, compiled for GPUs that nobody has here."""

import os

import pytest

from nemo_dsv4_cp.bench.compiled_kernels import kernels_of
from nemo_dsv4_cp.tools.ahead import compile_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is never compiled"
)

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
MULTIPLYING = {
    "forward_kernel",
    "scores_kernel",
    "queries_kernel",
    "keys_kernel",
    "selected_kernel",
    "index_scores_kernel",
}
OTHERS = {
    "norm_rotate_kernel",
    "norm_rotate_backward_kernel",
    "rotate_kernel",
    "ready_kernel",
    "sum_parts_kernel",
    "top_k_kernel",
}


@pytest.mark.parametrize("arch", INSTRUCTION)
@pytest.mark.parametrize("model", ["v4_flash", "v4_pro"])
def test_every_kernel_fits_a_multiprocessor_and_multiplies_on_tensor_cores(model, arch):
    specimens = kernels_of(model, arch)
    assert {specimen.name for specimen in specimens} == MULTIPLYING | OTHERS
    for compiled in (compile_kernel(specimen, arch) for specimen in specimens):
        assert compiled.stack <= 64, compiled
        assert compiled.shared <= SHARED[arch], compiled
        multiplies = compiled.kernel in MULTIPLYING
        assert compiled.tensor_core == (INSTRUCTION[arch] if multiplies else None), compiled
        assert compiled.products >= compiled.needed, compiled
        assert (compiled.needed > 0) == multiplies, compiled
        if compiled.kernel == "keys_kernel":  # two in one loop were miscompiled: triton #10821
            assert compiled.accumulators == (arch == 100), compiled
