# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4.1's kernels prove themselves as V4's do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from nemo_automodel._transformers import capabilities

from nemo_dsv4_cp import model as model_module
from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel import job, patches
from nemo_dsv4_cp.checks import certificate, kernel_choice
from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.checks.consistency import settings_of
from nemo_dsv4_cp.checks.kernel_verification import verify_kernels
from nemo_dsv4_cp.checks.model_layers import layers_of
from nemo_dsv4_cp.checks.operation_timing import time_operations
from nemo_dsv4_cp.kernels.operations import ALL_ENTRIES, CANDIDATES, INSIDE
from nemo_dsv4_cp.kernels.reference import TorchKernels
from tests.checks.backends import SIZES, SIZES_V41, installed, subject, write_distribution
from tests.parity import cpu_backend

LONG = 900.0


class NormsQueries(TorchKernels):
    def attend(self, queries, keys, constants):
        return super().attend(queries, keys, replace(constants, eps=1e-6))


class SelectsTheNext(TorchKernels):
    """Wrong in one of the ways of ``select_shared``."""

    wrong_in = ""

    def select_shared(self, queries, keys, *, topk, blocks, candidates_BLM):
        selected, made = super().select_shared(
            queries, keys, topk=topk, blocks=blocks, candidates_BLM=candidates_BLM
        )
        kind = INSIDE if candidates_BLM is not None else CANDIDATES if blocks else ALL_ENTRIES
        return selected + (kind == self.wrong_in), made


class KeepsTheFirst(TorchKernels):
    def select_shared(self, queries, keys, *, topk, blocks, candidates_BLM):
        selected, made = super().select_shared(
            queries, keys, topk=topk, blocks=blocks, candidates_BLM=candidates_BLM
        )
        if made is not None:
            made = torch.arange(made.shape[-1], dtype=torch.int32).expand_as(made)
        return selected, made


def wrong_in(kind):
    return type("Wrong", (SelectsTheNext,), {"wrong_in": kind})


def differences(kernels, monkeypatch, dtype=torch.float32):
    monkeypatch.setattr(plugins, "load", lambda *_: kernels)
    return list(verify_kernels(SIZES_V41, "mine", dtype=dtype, workspace_bytes=1 << 26))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_path_passes_in_all_that_the_layers_compute(monkeypatch, dtype):
    found = differences(TorchKernels, monkeypatch, dtype)
    assert all(difference.passes for difference in found), found
    names = {difference.name.removeprefix("packed, ") for difference in found}
    assert names >= {
        "ratio 0: output",
        "ratio 2: top-k selection, all entries",
        "ratio 1: top-k selection, candidates",
        "ratio 1: candidates",
        "ratio 1: top-k selection, inside candidates",
        "ratio 1: gradient of entries",
        "two runs, ratio 2: top-k selection, all entries",
        "two runs, ratio 1: candidates",
    }
    assert not any("rotary" in name for name in names)
    assert not any("two runs" in name and "output" in name for name in names)


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        (NormsQueries, "ratio 2: output"),
        (wrong_in(ALL_ENTRIES), "ratio 2: top-k selection, all entries"),
        (wrong_in(CANDIDATES), "ratio 1: top-k selection, candidates"),
        (wrong_in(INSIDE), "packed, ratio 1: top-k selection, inside candidates"),
        (KeepsTheFirst, "ratio 1: candidates"),
    ],
)
def test_what_a_kernel_gets_wrong_is_named(monkeypatch, kernels, name):
    failed = {each.name for each in differences(kernels, monkeypatch) if not each.passes}
    assert name in failed


def test_layers_are_timed_by_ratio_and_by_how_they_select():
    assert layers_of(SIZES_V41) == {
        (0, None): 1, (2, ALL_ENTRIES): 1, (2, None): 1, (1, CANDIDATES): 1, (1, INSIDE): 1,
    }  # fmt: skip
    assert layers_of(SIZES) == {(0, None): 1, (4, None): 1}
    measure = partial(time_operations, TorchKernels(workspace_bytes=1 << 26), SIZES_V41)
    for ratio, selects in layers_of(SIZES_V41):
        times = measure(ratio, 256, 16, dtype=torch.float32, repeats=1, selects=selects)
        attention = ["attention forward", "attention backward"]
        assert [each.operation for each in times] == ["top-k selection"] * bool(selects) + attention


def test_a_backend_that_selects_wrong_is_not_taken(tmp_path):
    write_distribution(tmp_path)
    sizes = SIZES_V41
    with installed(tmp_path):
        candidates = dict.fromkeys(("leaves_candidates", "right"), "json")
        chosen = kernel_choice.choose_kernels(
            None, partial(subject, sizes=sizes), strict=True, seconds=LONG, candidates=candidates
        )
        failed = certificate.obtain(subject("leaves_candidates", sizes))
        assert subject("right", sizes).key != subject("right").key
        assert certificate.on_disk(SIZES) == []
    assert (chosen.kernels, chosen.passed) == ("right", True)
    assert chosen.milliseconds > 0
    assert "ratio 1: top-k selection, inside candidates is off by" in failed.error


def test_on_gpus_every_layer_takes_the_kernels_that_the_job_chose(monkeypatch):
    pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
    from nemo_dsv4_cp.attention.layer_v41 import ContextParallelAttentionV41
    from nemo_dsv4_cp.model_v41 import DeepseekV41ContextParallelForCausalLM
    from tests.parity_v41 import tiny_config

    examined = []

    def choose(name, subject_of, *, strict):
        examined.append((name, subject_of("torch").sizes, strict))
        return Certificate("another", 0.5, 12.0, 321.0, None, "report.json")

    load = plugins.load
    monkeypatch.setattr(
        plugins, "load", lambda group, name: load(group, "torch" if name == "another" else name)
    )
    monkeypatch.setattr(model_module, "choose_kernels", choose)
    monkeypatch.setattr(model_module, "trains_on_gpus", lambda: True)
    monkeypatch.setattr(capabilities, job.FUNCTION, lambda model, mesh: model)
    config = tiny_config({}, engram_layer_ids=[], engram_num_embeddings=[])
    model = DeepseekV41ContextParallelForCausalLM(config, backend=cpu_backend())
    job.install()
    capabilities.attach_capabilities_and_validate(model, None)
    patches.undo()
    ((name, sizes, strict),) = examined
    assert (name, strict) == (None, True)
    assert sizes["index_source_layer_ids"] == config.text_config.index_source_layer_ids
    assert sizes["head_dim"] == config.text_config.head_dim
    layers = [m for m in model.modules() if isinstance(m, ContextParallelAttentionV41)]
    assert layers and {layer.kernels_name for layer in layers} == {"another"}
    assert "321 TFLOP/s" in settings_of(model)["context_parallel.balance"]
