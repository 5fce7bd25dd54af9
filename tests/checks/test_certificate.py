# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_dsv4_cp.checks import certificate
from tests.checks.backends import examinations, installed, subject, write_distribution

LONG = 900.0


@pytest.fixture
def folder(tmp_path):
    write_distribution(tmp_path)
    with installed(tmp_path):
        yield tmp_path


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("wrong_gradient", "ratio 0: gradient of queries is off by"),
        ("raises", "forward and backward: RuntimeError: no kernel image is available"),
        ("crashes", "forward and backward: ended its process with signal SIGSEGV"),
    ],
)
def test_a_backend_that_fails_is_named_with_its_operation(folder, name, error):
    found = certificate.obtain(subject(name), seconds=LONG)
    assert not found.passed
    assert error in found.error
    assert Path(found.report).exists()


def test_a_backend_that_hangs_is_ended(folder):
    found = certificate.obtain(subject("hangs"), seconds=1.0)
    assert "took more than 1 s" in found.error


def test_what_was_found_is_read_the_second_time(folder, monkeypatch):
    first = certificate.obtain(subject("right"), seconds=LONG)
    assert first.passed, first.error
    assert 0 < first.worst <= 1
    assert first.milliseconds > 0
    assert {each["name"] for each in certificate.differences(first)} >= {
        "bfloat16, ratio 4: top-k selection",
        "float32, packed, ratio 4: gradient of entries",
    }
    monkeypatch.setattr(subprocess, "Popen", None)
    assert certificate.obtain(subject("right")) == first
    assert certificate.on_disk() == [first]


def test_a_lack_of_memory_is_not_kept(folder, monkeypatch):
    found = certificate.obtain(subject("out_of_memory"), seconds=LONG)
    assert "OutOfMemoryError: tried to allocate 1 TiB" in found.error
    assert Path(found.report).exists()
    monkeypatch.setattr(certificate, "_examine", lambda *_: {"differences": [], "error": "again"})
    assert certificate.obtain(subject("out_of_memory")).error == "again"


def test_another_version_of_anything_takes_another_certificate(folder, monkeypatch):
    before = subject("right").key
    assert subject("right").key == before
    for changed in ("device", "driver", "triton", "sources"):
        machine = certificate._machine() | {changed: "another"}
        with monkeypatch.context() as patched:
            patched.setattr(certificate, "_machine", lambda machine=machine: machine)
            assert subject("right").key != before


def test_another_source_of_the_backend_takes_another_certificate(folder):
    before = subject("right").key
    with (folder / "backends_on_trial.py").open("a") as source:
        source.write("# another\n")
    assert subject("right").key != before


def test_processes_that_start_at_once_examine_once(folder):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: certificate.obtain(subject("right"), seconds=LONG), "ab"))
    assert found[0] == found[1]
    assert examinations(folder) == 1


def test_a_cache_that_cannot_be_written_is_replaced(folder, monkeypatch, tmp_path):
    occupied = tmp_path / "a file"
    occupied.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    monkeypatch.setattr(certificate.tempfile, "gettempdir", lambda: str(tmp_path))
    assert certificate._folder() == tmp_path / f"nemo_dsv4_cp-{os.getuid()}" / "certificates"
