# SPDX-License-Identifier: Apache-2.0
"""Every kernel at the published sizes, compiled for GPUs that nobody has here, and linted.

``make test-kernels`` runs it with every supported Triton; its report ends with a table.
"""

import os

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dsv4_cp.bench.compiled_kernels import (
    ARCHITECTURES,
    BACKWARD,
    FORWARD,
    FULL_LOSS,
    REFUSED,
    SPARSE_LOSS,
    V41_FLASH,
    kernels_of,
    passes_of,
    passes_of_v41,
)
from nemo_dsv4_cp.kernels.costs import cost_of
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
    "block_maxima_kernel",
    "entries_of_slots_kernel",
}
LOSS = {"target_kernel", "gradients_kernel", "index_keys_kernel"}
SHORT = [("bf16", arch, ["v4_flash", V41_FLASH]) for arch in (90, 100)]
MODELS = ["v4_flash", "v4_pro", V41_FLASH]
ALL = [(dtype, arch, MODELS) for dtype in DTYPES for arch in ARCHITECTURES]


def of_all(specimen):
    """Whether the indexer's loss launches it in mode full, whose kernels differ little."""
    return specimen.name in LOSS and not specimen.constants.get("SELECTED")


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
        specimens = [each for each in specimens if each.name not in OTHERS and not of_all(each)]
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


class Costs(TorchDispatchMode):
    """Counts the launches that are registered of each operation."""

    def __init__(self):
        super().__init__()
        self.launches = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cost = cost_of(func, args, kwargs)
        if cost is not None:
            self.launches.setdefault(func._schema.name, []).append(cost.launches)
        return func(*args, **(kwargs or {}))


def test_costs_of_deepseek_v41_count_what_it_launches():
    with Costs() as counted:
        passes = passes_of_v41(90)
    mine = counted.launches
    # Besides kernels: two sums filled and rounded, the sinks' sum.
    backward = [len(each.launches) + 5 for each in passes if each.direction == BACKWARD]
    assert mine["dsv4_cp::attend_backward"] == backward
    # Besides kernels: queries copied, results filled.
    per_layer = [len(each.launches) for each in passes if each.direction == FORWARD]
    all_entries, chooses, inside = mine["dsv4_cp::select_shared"][:3]
    selections = [0, all_entries - 1, chooses - 2 + inside - 1]
    attention = [count - 1 for count in mine["dsv4_cp::attend"]]
    assert per_layer == [a + b for a, b in zip(attention, selections, strict=True)]


def test_costs_of_the_indexers_loss_count_what_it_launches():
    with Costs() as counted:
        passes = {each.direction: each.launches for each in passes_of("v4_flash", 90)}
    # Besides kernels: sums of keys filled and rounded, losses summed.
    mine = [len(passes[each]) + 3 for each in (SPARSE_LOSS, FULL_LOSS)]
    assert counted.launches["dsv4_cp::indexer_loss"] == mine


def test_every_device_is_linted_or_refused():
    assert tuple(INSTRUCTION) == ARCHITECTURES
    assert REFUSED == (86, 89, 120)
