# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig, plugins
from nemo_dsv4_cp.checks.kernel_verification import verify_kernels
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.sequence.queries import Queries
from nemo_dsv4_cp.tools.recipes import compose
from tests.checks.backends import SIZES


class LosesSinks(TorchKernels):
    def attend(self, queries, keys, constants):
        no_sinks = replace(keys, sinks_N=keys.sinks_N * 0 - 100)
        return super().attend(queries, no_sinks, constants)


class SelectsTheFirst(TorchKernels):
    def select_entries(self, queries, keys, *, topk):
        selected = super().select_entries(queries, keys, topk=topk)
        return torch.arange(topk, dtype=torch.int32).expand_as(selected)


class TurnsBack(TorchKernels):
    def rotate(self, x, rope):
        return super().rotate(x, (rope[0], -rope[1]))


class TakesOneRun(TorchKernels):
    def attend(self, queries, keys, constants):
        plan = queries.plan
        begin = plan.queries.runs[0].start
        neighbors = Queries(plan.queries.layout, (range(begin, begin + len(plan.queries)),))
        plan = replace(plan, queries=neighbors)
        return super().attend(replace(queries, plan=plan), keys, constants)


class ScalesByTooMuch(TorchKernels):
    def attend(self, queries, keys, constants):
        return 1.012 * super().attend(queries, keys, constants)


def differences(kernels, monkeypatch, dtype=torch.float32):
    monkeypatch.setattr(plugins, "load", lambda *_: kernels)
    fields = compose("tiny_cpu").fields["model"]["config"] | {"index_topk": 32}
    sizes = DeepseekV4ContextParallelConfig(**fields)
    return list(verify_kernels(sizes, "mine", dtype=dtype, workspace_bytes=1 << 26))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_path_passes(monkeypatch, dtype):
    found = differences(TorchKernels, monkeypatch, dtype)
    assert all(difference.passes for difference in found), found
    assert {"ratio 4: top-k selection", "ratio 128: output", "rotary: gradient of keys"} <= {
        difference.name for difference in found
    }


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        (LosesSinks, "ratio 0: output"),
        (LosesSinks, "ratio 0: gradient of sinks"),
        (SelectsTheFirst, "ratio 4: top-k selection"),
        (TurnsBack, "rotary: output"),
        (TakesOneRun, "two runs, ratio 4: output"),
    ],
)
def test_what_a_kernel_gets_wrong_is_named(monkeypatch, kernels, name):
    failed = {each.name for each in differences(kernels, monkeypatch) if not each.passes}
    assert name in failed


def test_an_error_below_the_largest_rounding_is_found_where_all_entries_have_it(monkeypatch):
    found = differences(ScalesByTooMuch, monkeypatch, torch.bfloat16)
    failed = {each.name for each in found if not each.passes}
    assert "ratio 0: output" not in failed
    assert "ratio 0: output, root mean square" in failed


def test_ratio_0_is_verified_for_mtp_layers(monkeypatch):
    monkeypatch.setattr(plugins, "load", lambda *_: TorchKernels)
    sizes = SimpleNamespace(**vars(SIZES) | {"compress_ratios": [4, 128]})
    found = verify_kernels(sizes, "mine", dtype=torch.float32, workspace_bytes=1 << 26)
    assert "packed, ratio 0: output" in {each.name for each in found}
