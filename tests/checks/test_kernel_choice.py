# SPDX-License-Identifier: Apache-2.0
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from nemo_dsv4_cp.checks import certificate, kernel_choice
from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.exchange.collectives import answers_of_all_ranks
from nemo_dsv4_cp.tools import local_ranks
from tests.checks.backends import installed, subject, write_distribution

LONG = 900.0
GOOD = Certificate("", 0.25, 10.0, 400.0, None, "/report.json")
CANDIDATES = dict.fromkeys(("triton", "tilelang", "torch"), "json")


def _choices(group, rank, folder):
    found = []
    with installed(Path(folder)):
        candidates = dict.fromkeys(("exits", "right"), "json")
        for named, strict in ((None, True), ("exits", False), ("exits", True)):
            try:
                chosen = kernel_choice.choose_kernels(
                    named, subject, strict=strict, seconds=LONG, candidates=candidates
                )
                found.append(chosen.kernels)
            except ValueError as error:
                found.append(str(error))
    return answers_of_all_ranks(json.dumps(found), LONG)


def test_all_ranks_of_a_job_choose_alike(tmp_path, forked_local_ranks):
    write_distribution(tmp_path)
    first, second = local_ranks.run(_choices, 2, str(tmp_path))
    assert first == second
    automatic, warned, refused = json.loads(first)
    assert (automatic, warned) == ("right", "exits")
    assert "context_parallel.kernels='exits' failed on this job's GPUs: on rank 0, " in refused
    assert "ended its process with status 3" in refused
    assert "kernels_check: warn" in refused


@pytest.fixture
def certified(monkeypatch):
    """Certificates by name, of every rank; what is not there raises."""

    def of(**ranks):
        certificates = {
            name: [replace(each, kernels=name) for each in found] for name, found in ranks.items()
        }
        monkeypatch.setattr(certificate, "obtain", lambda name, seconds: certificates[name][0])
        others = [
            json.dumps([vars(found[rank]) for found in certificates.values() if len(found) > rank])
            for rank in range(max(map(len, certificates.values())))
        ]
        monkeypatch.setattr(
            kernel_choice, "answers_of_all_ranks", lambda mine, _: [mine, *others[1:]]
        )

    return of


def choose(named=None, *, strict=True, candidates=CANDIDATES):
    return kernel_choice.choose_kernels(
        named, lambda name: name, strict=strict, candidates=candidates
    )


def test_the_fastest_by_its_slowest_rank_is_chosen(certified, caplog):
    fast, slow = replace(GOOD, milliseconds=5.0), replace(GOOD, milliseconds=50.0)
    certified(triton=[fast, slow], tilelang=[GOOD, replace(GOOD, worst=0.5)], torch=[slow, slow])
    with caplog.at_level(logging.INFO):
        chosen = choose()
    assert (chosen.kernels, chosen.milliseconds, chosen.worst) == ("tilelang", 10.0, 0.5)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "Kernels: tilelang, 10.0 ms per layer" in caplog.text
    assert "triton 50.0 ms, torch 50.0 ms; largest error 50% of the allowed" in caplog.text


def test_a_backend_that_failed_on_a_rank_is_named_once_and_not_used(certified, caplog):
    failed = replace(GOOD, error="ratio 4: output is off", milliseconds=None)
    certified(triton=[GOOD, failed], torch=[replace(GOOD, milliseconds=90.0)] * 2)
    with caplog.at_level(logging.WARNING):
        assert choose(candidates={"triton": "json", "torch": "json"}).kernels == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "Kernels triton are not used: on rank 1, ratio 4: output is off (report: /report.json)"
    ]


def test_a_backend_that_a_rank_lacks_is_not_used(certified, caplog):
    certified(triton=[GOOD], torch=[GOOD, GOOD])
    assert choose(candidates={"triton": "json", "torch": "json"}).kernels == "torch"
    assert "not installed on rank 1" in caplog.text


def test_torch_is_used_where_nothing_passes(certified):
    failed = replace(GOOD, error="raised", milliseconds=None)
    certified(triton=[failed], torch=[failed])
    assert choose(candidates={"triton": "json", "torch": "json"}).kernels == "torch"


def test_candidates_that_are_not_installed_are_left_out(certified, caplog):
    certified(torch=[GOOD])
    assert choose(candidates={"torch": "json", "tilelang": "not_installed"}).kernels == "torch"
    assert "tilelang" not in caplog.text


def test_a_stand_in_for_a_module_is_no_candidate(certified, monkeypatch):
    certified(torch=[GOOD])
    monkeypatch.setitem(sys.modules, "stands_in", ModuleType("stands_in"))
    assert choose(candidates={"torch": "json", "triton": "stands_in"}).kernels == "torch"


def test_a_rank_that_cannot_examine_answers_all_the_same(monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(certificate, "obtain", full)
    with pytest.raises(ValueError, match="no certificate: OSError: No space left on device"):
        kernel_choice.choose_kernels("right", subject, strict=True)
