# SPDX-License-Identifier: Apache-2.0
"""``doctor`` through its installed entry point, and on environments that cannot train."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.cli.app import app
from nemo_dsv4_cp.tools import diagnosis

COMMAND = str(Path(sys.executable).with_name("nemo-dsv4-cp"))


def findings(output):
    return {finding["subject"]: finding for finding in json.loads(output)}


def test_this_environment_can_train():
    done = subprocess.run(
        [COMMAND, "doctor", "--json"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(done.stdout)
    assert found["nemo_automodel"]["found"] == "0.7.0"
    assert found["nemo_dsv4_cp.transports: boundary"]["found"].endswith(".transport:Transport")
    assert found["AutoModel's registry"]["found"].endswith("-> nemo_dsv4_cp.model")
    assert found["contract for batches"]["found"] == "ContextParallelSharder"
    if not torch.cuda.is_available():
        assert "CpuFinetuneRecipe" in found["GPUs"]["remedy"]


@pytest.mark.parametrize(
    ("missing", "subject", "remedy"),
    [
        ("nemo_automodel", "nemo_automodel", "pip install nemo_automodel==0.7.0"),
        ("entry point", "nemo_automodel.architectures", "reinstall the package"),
    ],
)
def test_what_would_make_training_fail_is_named_with_its_remedy(
    missing, subject, remedy, monkeypatch
):
    if missing == "entry point":
        declared = diagnosis.entry_points

        def none_of_ours(**wanted):
            return () if "name" in wanted else declared(**wanted)

        monkeypatch.setattr(diagnosis, "entry_points", none_of_ours)
    else:
        installed = diagnosis.version

        def version(name):
            if name == missing:
                raise PackageNotFoundError(name)
            return installed(name)

        monkeypatch.setattr(diagnosis, "version", version)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    printed = " ".join(done.output.split())
    assert f"Training would fail: {subject}" in printed
    whole = CliRunner().invoke(app, ["doctor", "--json"]).stdout
    found = [f for f in json.loads(whole[whole.index("[") : whole.rindex("]") + 1]) if f["fatal"]]
    assert found[0]["remedy"].count(remedy) == 1


def test_a_trap_of_the_environment_is_reported(monkeypatch):
    monkeypatch.setattr(diagnosis, "version", lambda name: "3.9.0")
    (triton,) = [f for f in diagnosis._versions() if f.subject == "triton"]
    assert "pip install triton==3.7.1" in triton.remedy


def test_an_automodel_without_v41_still_trains_v4(monkeypatch):
    def missing():
        raise ImportError("there is no deepseek_v41")

    monkeypatch.setattr(diagnosis.contracts, "check_v41", missing)
    found = {finding.subject: finding for finding in diagnosis._automodel_contracts()}
    of_v41 = found["AutoModel's V4.1 model"]
    assert of_v41.found == "cannot be used: there is no deepseek_v41"
    assert "need nemo_automodel 0.7.0" in of_v41.note
    assert not any(finding.fatal for finding in found.values())


def test_what_needs_kernels_that_are_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", lambda name: None)
    for gpu, where in ((False, "on GPUs "), (True, "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        tilelang, _, deep_ep = diagnosis._kernels()
        assert tilelang.note == f"needed {where}by context_parallel.kernels: tilelang"
        assert not tilelang.remedy
        assert bool(deep_ep.remedy) == gpu


def test_certificates_are_shown(monkeypatch):
    passed = Certificate("triton", 0.5, 12.0, 321.0, None, "triton.json")
    failed = Certificate("tilelang", 9.0, None, None, "ratio 4: output is off", "tilelang.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diagnosis.certificate, "on_disk", lambda: [passed, failed])
    good, bad = diagnosis._certificates()
    assert good.found == "12.0 ms per layer, largest error 50% of the allowed"
    assert (good.note, good.remedy) == ("triton.json", None)
    assert bad.found == "ratio 4: output is off"
    assert "verify recipe.yaml --kernels" in bad.remedy
    monkeypatch.setattr(diagnosis.certificate, "on_disk", list)
    (none,) = diagnosis._certificates()
    assert none.found == "none for this GPU"
