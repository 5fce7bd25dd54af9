# SPDX-License-Identifier: Apache-2.0
import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from nemo_dsv4_cp.automodel.contracts import has_v41
from nemo_dsv4_cp.bench import gpu_report
from nemo_dsv4_cp.bench.timing import Timing
from nemo_dsv4_cp.checks import certificate
from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.checks.operation_timing import OperationTime
from nemo_dsv4_cp.cli.app import app

JUNIT = """<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>"""
HAS_V41 = has_v41()
GOOD = Certificate("", 0.25, 10.0, 400.0, None, "report.json")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU on which TileLang is not installed and ratio 128 runs out of memory."""
    errors = {}

    def layer(cases, repeats):
        (case,) = cases
        if case.ratio == 128:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return [Timing(case, (0.012,) * repeats, 3 << 30)]

    def operations(kernels, sizes, ratio, seq_len, cp_size, *, dtype, repeats, selects):
        return [OperationTime("attention | forward", ratio, 0.004, 8 * 10**11)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["nemo_dsv4_cp.cli.gpu_report"], "require_gpu", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_report, "installed", lambda: ["torch", "triton"])
    monkeypatch.setattr(gpu_report.plugins, "load", lambda group, name: lambda **_: name)
    monkeypatch.setattr(gpu_report, "describe_machine", lambda: "NVIDIA H100, torch 2.13.0")
    monkeypatch.setattr(gpu_report, "peak_tflops", lambda: 1000.0)
    monkeypatch.setattr(gpu_report, "diagnose", list)
    monkeypatch.setattr(gpu_report, "time_one_gpu_rank", layer)
    monkeypatch.setattr(gpu_report, "time_operations", operations)
    monkeypatch.setattr(gpu_report.Subject, "of", lambda name, *_, **__: name)
    monkeypatch.setattr(
        certificate,
        "obtain",
        lambda name, renew: replace(GOOD, kernels=name, error=errors.get(name)),
    )
    monkeypatch.setattr(certificate, "differences", lambda _: [{"name": "ratio 4: output"}])
    return errors


def report(*arguments):
    done = CliRunner().invoke(app, ["gpu-report", "--out", "found", *arguments])
    return done


def test_the_report_holds_tests_certificates_times_and_what_was_left_out(gpu, tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    done = report("--tests", "tests.xml")
    assert done.exit_code == 1, done.output  # tests failed
    page, figures = (
        (tmp_path / "found.md").read_text(),
        json.loads((tmp_path / "found.json").read_text()),
    )
    assert figures["tests"] == {"passed": 5, "failed": 2, "skipped": 2}
    assert "| triton | passed | 10.0 | 0.25 |" in page
    assert "| 131,072 | 8 | ratio 4 | boundary | triton | 12.0 | 3.00 |" in page
    assert "| 1,048,576 | 64 | ratio 0 | automodel | " in page
    assert "| ratio 4 | triton | attention \\| forward | 4.000 | 200.0 | 20% |" in page
    assert figures["certificates"][0]["differences"] == [{"name": "ratio 4: output"}]
    assert len(figures["left_out"]) == 9
    assert "boundary, triton, layer, ratio 128, 131,072 tokens on 8 ranks: OutOfMemoryError" in page


@pytest.mark.skipif(not HAS_V41, reason="this AutoModel has no V4.1")
def test_the_report_of_v41_has_every_kind_of_layer(gpu, tmp_path):
    done = report("--model", "v41_flash")
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "found.json").read_text())
    kinds = {each["layer"]: each["name"] for each in figures["layers"]}
    assert kinds == {
        0: "layer 0 (ratio 0, window only)",
        2: "layer 2 (ratio 2, all entries)",
        3: "layer 3 (ratio 2, reuses)",
        20: "layer 20 (ratio 1, candidates)",
        24: "layer 24 (ratio 1, inside candidates)",
        21: "layer 21 (ratio 1, reuses)",
    }
    assert {each["selects"] for each in figures["operations"]} == {
        None, "all entries", "candidates", "inside candidates",
    }  # fmt: skip


def test_a_backend_that_failed_is_not_timed_and_the_exit_status_says_so(gpu, tmp_path):
    gpu["triton"] = "ratio 4: output is off"
    assert report().exit_code == 1
    figures = json.loads((tmp_path / "found.json").read_text())
    assert {each["kernels"] for each in figures["operations"]} == {"torch"}


def test_what_no_runtime_error_is_leaves_the_other_measurements_too(gpu, tmp_path, monkeypatch):
    class OutOfResources(Exception):  # as Triton's
        pass

    def fails(*_, **__):
        raise OutOfResources("shared memory")

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_report, "time_operations", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    assert report().exit_code == 0
    assert (
        "131,072 tokens on 8 ranks: OutOfResources: shared memory"
        in (tmp_path / "found.md").read_text()
    )


def test_time_that_is_up_is_reported(gpu, tmp_path):
    assert report("--minutes", "0").exit_code == 0
    assert (
        "torch, operations, ratio 0, 131,072 tokens on 8 ranks: no time left"
        in (tmp_path / "found.md").read_text()
    )


def test_a_report_for_a_directory_that_does_not_exist_is_refused():
    done = CliRunner().invoke(app, ["gpu-report", "--out", "nowhere/x"])
    assert done.exit_code == 2
    assert "--out nowhere/x: there is no directory nowhere" in " ".join(done.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["gpu-report", "bench operations"])
def test_without_a_gpu_there_is_nothing_to_measure(command, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 2
    assert f"{command} needs a GPU, and torch sees none" in done.stderr
    assert "without one: nemo-dsv4-cp bench kernels" in done.stderr
