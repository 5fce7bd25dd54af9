# SPDX-License-Identifier: Apache-2.0
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_dsv4_cp.checks import certificate, examination
from nemo_dsv4_cp.checks.certificate import Subject
from tests.checks.backends import (
    SIZES,
    children,
    examinations,
    installed,
    subject,
    write_distribution,
)

LONG = 900.0
PASSED = {"differences": [], "error": None, "milliseconds": 1.0, "tflops": 1.0}


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
        ("ends", "forward and backward: ended its process with status 0"),
    ],
)
def test_a_backend_that_fails_is_named_with_its_operation(folder, name, error):
    found = certificate.obtain(subject(name), seconds=LONG)
    assert not found.passed
    assert error in found.error
    assert Path(found.report).exists()


def test_a_backend_that_hangs_is_ended_and_not_tried_again(folder, monkeypatch):
    seconds, found = 3.0, None
    while found is None or "its start" in found.error:  # on a loaded machine
        seconds *= 2
        found = certificate.obtain(subject("hangs"), seconds=seconds, renew=True)
    assert f"forward and backward: took more than {seconds:g} s" in found.error
    monkeypatch.setattr(subprocess, "Popen", None)
    assert certificate.obtain(subject("hangs")) == found


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


@pytest.mark.parametrize("name", ["no_headers", "no_space"])
def test_a_failure_that_an_installation_or_a_full_disk_explains_is_not_kept(
    folder, monkeypatch, name
):
    assert not certificate.obtain(subject(name), seconds=LONG).passed
    monkeypatch.setattr(certificate, "_examine", lambda *_: dict(PASSED))
    assert certificate.obtain(subject(name)).passed


@pytest.mark.parametrize(
    ("error", "theirs"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("cuModuleLoadData failed with error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), True),
        (AssertionError("libcuda.so cannot found!"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_the_machine_is_to_blame_for_is_told_from_what_kernels_are(error, theirs):
    assert examination._is_of_the_machine(error) is theirs


@pytest.fixture
def examined(monkeypatch):
    """Count examinations that pass at once."""
    counted = []

    def examine(*_):
        counted.append(1)
        return dict(PASSED)

    monkeypatch.setattr(certificate, "_examine", examine)
    return counted


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"subject": {"kern',
        "[]",
        "null",
        '{"error": null}',
        '{"subject": {"kernels": "right"}, "differences": [], "error": null}',
        '{"subject": {"kernels": "right"}, "differences": [{"name": "a"}], "error": "b"}',
    ],
)
def test_a_file_that_is_no_certificate_of_this_version_is_replaced(folder, examined, text):
    file = certificate._folder() / f"{subject('right').key}.json"
    file.write_text(text)
    file.with_name(".left.json").write_text(text)
    assert certificate.on_disk() == []
    assert certificate.obtain(subject("right")).passed
    assert examined == [1]
    assert [each.report for each in certificate.on_disk()] == [str(file)]


def test_what_was_found_counts_on_a_full_disk(folder, examined, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(certificate, "_write", full)
    assert certificate.obtain(subject("right")).passed


def test_a_file_system_without_locks_is_no_reason_to_fail(folder, examined, monkeypatch):
    def absent(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(certificate.fcntl, "flock", absent)
    assert certificate.obtain(subject("right")).passed


def test_a_log_that_cannot_be_written_is_no_reason_to_fail(folder):
    (certificate._folder() / f"{subject('right').key}.log").mkdir()
    found = certificate.obtain(subject("right"), seconds=LONG)
    assert found.passed, found.error


def test_a_process_that_is_stopped_with_the_lock_does_not_stop_others(
    folder, examined, monkeypatch
):
    monkeypatch.setattr(certificate, "_GRACE", 0.1)
    with (certificate._folder() / f"{subject('right').key}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert certificate.obtain(subject("right"), seconds=0.1).passed


def test_a_user_without_a_home_has_a_folder(folder, monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(certificate.Path, "home", homeless)
    monkeypatch.setattr(certificate.tempfile, "gettempdir", lambda: str(tmp_path))
    assert certificate._folder() == tmp_path / f"nemo_dsv4_cp-{os.getuid()}" / "certificates"
    monkeypatch.setattr(certificate.os, "getuid", lambda: 12345)
    (tmp_path / "nemo_dsv4_cp-12345").mkdir()  # another user's
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        certificate._folder()


def test_numbers_of_numpy_and_a_model_without_ratios_are_a_subject():
    fields = vars(SIZES) | {"head_dim": np.int64(16), "compress_ratios": []}
    made = Subject.of("torch", SimpleNamespace(**fields), dtype="bfloat16", workspace_bytes=1 << 26)
    assert made.sizes["compress_ratios"] == [0, 0]
    assert made.key


def test_a_child_that_was_killed_is_examined_again_by_the_next_start(folder, monkeypatch):
    found = certificate.obtain(subject("killed"), seconds=LONG)
    assert "ended its process with signal SIGKILL" in found.error
    monkeypatch.setattr(certificate, "_examine", lambda *_: dict(PASSED))
    assert certificate.obtain(subject("killed")).passed
    assert [each.passed for each in certificate.on_disk()] == [True]


def test_those_who_wait_share_a_failure_that_is_not_kept(folder, monkeypatch):
    begun, arrived, written_at = [], threading.Semaphore(0), certificate._written_at

    def arrives(file):
        found = written_at(file)
        arrived.release()
        return found

    def fails(*_):
        begun.append(1)
        for _ in range(4 + 1):  # all four, and this one a second time, under the lock
            arrived.acquire()
        return {"differences": [], "error": "no memory", "lasting": False}

    monkeypatch.setattr(certificate, "_written_at", arrives)
    monkeypatch.setattr(certificate, "_examine", fails)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: certificate.obtain(subject("right")).error, range(4)))
    assert (found, begun) == (["no memory"] * 4, [1])
    for _ in range(3 + 1):
        arrived.release()
    certificate.obtain(subject("right"))
    assert begun == [1, 1]


def test_a_child_ends_with_a_parent_that_is_killed(folder):
    code = (
        "from nemo_dsv4_cp.checks import certificate; from tests.checks.backends import subject; "
        "certificate.obtain(subject('hangs'), seconds=900)"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    while not children(folder):
        assert parent.poll() is None
        time.sleep(0.1)
    (child,) = children(folder)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + LONG
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(process):
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_child_finds_the_modules_of_its_parent_and_none_of_its_folder(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "torch.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(folder / "elsewhere")
    monkeypatch.delenv("PYTHONPATH")
    found = certificate.obtain(subject("raises"), seconds=LONG)
    assert "no kernel image is available" in found.error


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
