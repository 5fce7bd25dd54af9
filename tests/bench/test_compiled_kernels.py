# SPDX-License-Identifier: Apache-2.0
"""Every kernel at the published sizes, compiled for GPUs that nobody has here, and linted.

``make test-kernels`` runs it with every supported Triton; its report ends with a table.
"""

import os

import pytest
import torch
import triton

from nemo_dsv4_cp.bench.compiled_kernels import ARCHITECTURES, REFUSED, kernels_of
from nemo_dsv4_cp.tools.ahead import compile_kernel
from tests.bench.kernel_lint import UNKNOWN, VERSION, faults, figures
from tests.bench.kernel_table import LINTED

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is never compiled"
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 103: "tcgen05"}
OTHERS = {
    "norm_rotate_kernel",
    "norm_rotate_backward_kernel",
    "rotate_kernel",
    "ready_kernel",
    "sum_parts_kernel",
    "top_k_kernel",
}
SHORT = [("bf16", 90, ["v4_flash"]), ("bf16", 100, ["v4_flash"])]
ALL = [(dtype, arch, ["v4_flash", "v4_pro"]) for dtype in DTYPES for arch in ARCHITECTURES]


@pytest.mark.parametrize(
    ("dtype", "arch", "models"),
    SHORT + [pytest.param(*each, marks=pytest.mark.slow) for each in ALL],
)
def test_binaries_keep_to_the_limits(dtype, arch, models, record_property):
    if arch in UNKNOWN.get(VERSION, ()):
        pytest.skip(f"triton {VERSION} does not know sm_{arch}")
    kernels = [kernels_of(model, arch, DTYPES[dtype]) for model in models]
    specimens = kernels[0] + [
        each for more in kernels[1:] for each in more if each not in kernels[0]
    ]
    if models == SHORT[0][2]:  # what does not multiply compiles in seconds, and with all
        specimens = [each for each in specimens if each.name not in OTHERS]
    found, rows = [], []
    for specimen in specimens:
        compiled = compile_kernel(specimen, arch)
        multiplies = dtype != "fp32" and specimen.name not in OTHERS
        assert compiled.tensor_core == (INSTRUCTION[arch] if multiplies else None), compiled
        found += faults(compiled, specimen, dtype)
        taken = {"registers": compiled.registers, "shared": compiled.shared}
        rows.append((specimen.name, dtype, arch, taken | figures(compiled, specimen.stages)))
    record_property(LINTED, (triton.__version__, rows))
    assert not found, "\n".join(found)


def test_every_device_is_linted_or_refused():
    assert tuple(INSTRUCTION) == ARCHITECTURES
    assert REFUSED == (86, 89, 120)
