# SPDX-License-Identifier: Apache-2.0
"""Evidence that a kernel backend computes right on this device, kept on disk.

The examination (:mod:`nemo_dsv4_cp.checks.examination`) runs in a child process: an illegal access,
a hang, a crash of the compiler or a lack of memory ends the child, not the job.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from nemo_dsv4_cp import checks, plugins, sequence
from nemo_dsv4_cp import kernels as kernels_package
from nemo_dsv4_cp.checks.difference import Difference
from nemo_dsv4_cp.checks.model_layers import SIZES, SIZES_V41, is_v41
from nemo_dsv4_cp.gpus import Gpu

_logger = logging.getLogger(__name__)

SECONDS = 300.0
"""How long an examination may take. A first one compiles every kernel: about a minute."""

_GRACE = 10.0
"""How much longer the parent waits for the child, which ends itself with a traceback."""

_OF_KERNELS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Signals by which kernels end a process; others come from a scheduler or a lack of memory."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file raises that is half written, of another version, or another user's."""

_DISTRIBUTIONS = ("nemo-dsv4-cp", "nemo_automodel", "torch", "triton", "tilelang")


@dataclass(frozen=True)
class Subject:
    """What is examined. A certificate holds until any of it changes.

    Attributes:
        kernels: Name in the entry-point group ``nemo_dsv4_cp.kernels``.
        sizes: The fields of the model config on which kernels depend.
        dtypes: Of activations, such as ``"bfloat16"``.
        workspace_bytes: How much scratch an operation may take; None for what suits the device.
        environment: The device, its driver, and all that kernels are compiled from.
    """

    kernels: str
    sizes: dict[str, Any]
    dtypes: tuple[str, ...]
    workspace_bytes: int | None
    environment: dict[str, str]

    @classmethod
    def of(cls, kernels: str, config: Any, *, dtype: str, workspace_bytes: int | None) -> Subject:
        """Return the subject for a model on this process's device.

        ``config`` is the text config of V4.1, or a config of V4. ``dtype`` is that of parameters,
        such as ``"float32"``. Bfloat16 is examined in any case, in which FSDP's mixed precision
        computes whatever the parameters are.
        """
        dtypes = tuple(dict.fromkeys(("bfloat16", dtype)))
        return cls(kernels, _sizes(config), dtypes, workspace_bytes, _environment(kernels))

    @property
    def key(self) -> str:
        """Return the name of its file, without a suffix."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.kernels}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Certificate:
    """What an examination found.

    Attributes:
        kernels: The backend's name.
        worst: The largest error as a share of the allowed.
        milliseconds: Forward and backward of one layer's kernels, averaged over the model's layers,
            of 4,096 queries that end a row of 32,768 tokens; None if it failed before.
        tflops: Floating-point operations per second of these, times 1e12.
        error: The operation that failed, and how; None if all passed.
        report: The file that holds every difference and, where the child failed, its log's path.
    """

    kernels: str
    worst: float
    milliseconds: float | None
    tflops: float | None
    error: str | None
    report: str

    @property
    def passed(self) -> bool:
        """Return whether the backend may be used."""
        return self.error is None


def obtain(subject: Subject, *, seconds: float = SECONDS, renew: bool = False) -> Certificate:
    """Return the certificate on disk, or examine the backend now.

    One process of the machine examines at a time; the others wait, and read what it found. What
    another start may not meet is not kept for it: a lack of memory, or a process that was killed.

    Args:
        subject: What to examine.
        seconds: After which the child is ended.
        renew: Examine it even if there is a certificate.
    """
    folder = _folder()
    file, failed = folder / f"{subject.key}.json", folder / f"{subject.key}.failed.json"
    before = _written_at(failed)
    known = None if renew else _read(file)
    if known is not None:
        return known
    with _locked(folder / f"{subject.key}.lock", seconds + 2 * _GRACE):
        if not renew:
            known = _read(file)
            if known is None and _written_at(failed) != before:  # while this process waited
                known = _read(failed)
            if known is not None:
                return known
        found = _examine(subject, file.with_suffix(".log"), seconds)
        report = file if found.pop("lasting", True) else failed
        found = {"subject": asdict(subject)} | found
        try:
            _write(report, found)
            if report == file:
                failed.unlink(missing_ok=True)
        except OSError as error:  # a full disk: what was found is true all the same
            _logger.warning("The certificate %s could not be written: %s", report, error)
    return _certificate(found, report)


def on_disk(config: Any = None) -> list[Certificate]:
    """Return the certificates that hold on this device, of one model config or of any."""
    found = []
    try:
        files = sorted(_folder().glob("[!.]*.json"))
    except OSError:
        return []
    for file in files:
        with suppress(*_UNREADABLE, ImportError):
            content = json.loads(file.read_text())
            subject = content["subject"]
            if subject["environment"] != _environment(subject["kernels"]):
                continue
            if config is None or subject["sizes"] == _sizes(config):
                found.append(_certificate(content, file))
    return found


def fastest_on_disk(config: Any) -> Certificate | None:
    """Return the certificate of the fastest backend that passed for a model config here."""
    timed = [each for each in on_disk(config) if each.passed and each.milliseconds]
    return min(timed, key=lambda each: each.milliseconds or 0.0, default=None)


def with_measured_rate(gpu: Gpu, certificate: Certificate) -> Gpu:
    """Return a GPU that computes attention and index scores as fast as was measured."""
    if not certificate.tflops:
        return gpu
    return replace(gpu, kernel_share=certificate.tflops / gpu.tflops)


def differences(certificate: Certificate) -> list[dict[str, Any]]:
    """Return every difference that was found: ``name``, ``value`` and ``limit``."""
    found: list[dict[str, Any]] = json.loads(Path(certificate.report).read_text())["differences"]
    return found


def _sizes(config: Any) -> dict[str, Any]:
    """Return the fields as JSON holds them; a config may have numpy's numbers."""
    names = SIZES_V41 if is_v41(config) else SIZES
    sizes = {name: _plain(getattr(config, name)) for name in names if name != "compress_ratios"}
    ratios = config.compress_ratios or [0] * sizes["num_hidden_layers"]  # as AutoModel reads it
    return sizes | {"compress_ratios": [int(ratio) for ratio in ratios]}


def _plain(value: Any) -> Any:
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _environment(kernels: str) -> dict[str, str]:
    points = entry_points(group=plugins.KERNELS, name=kernels)
    owner = next((point.dist for point in points if point.dist), None)
    modules = [find_spec(point.module) for point in points]
    return {
        **_machine(),
        "backend": ", ".join(point.value for point in points),
        "backend_source": _digest(Path(each.origin) for each in modules if each and each.origin),
        "distribution": f"{owner.name} {owner.version}" if owner else "",
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),  # other kernels
    }


@cache
def _machine() -> dict[str, str]:
    found = {"device": "cpu", "capability": "", "driver": ""}
    if torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version")
        found = {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": driver.read_text().splitlines()[0] if driver.exists() else "",
        }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    found["cuda"] = str(torch.version.cuda)
    folders = (Path(package.__path__[0]) for package in (kernels_package, sequence, checks))
    sources = (source for folder in folders for source in sorted(folder.rglob("*.py")))
    return found | {"sources": _digest(sources)}


def _digest(sources: Iterable[Path]) -> str:
    """Return what tells sources apart: a working copy changes without its version."""
    whole = b"".join(source.read_bytes() for source in sources if source.is_file())
    return hashlib.sha256(whole).hexdigest()[:16]


def _examine(subject: Subject, log: Path, seconds: float) -> dict[str, Any]:
    """Run the child; return what it found, or how it ended."""
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch, "request.json"), Path(scratch, "result.json")
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        request.write_text(json.dumps(asdict(subject)))
        arguments = [str(request), str(result), json.dumps(device), str(seconds)]
        command = [sys.executable, "-m", "nemo_dsv4_cp.checks.examination", *arguments]
        begun = time.monotonic()
        with _opened(log) as output:
            child = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.PIPE, env=_environ(),
                start_new_session=True,
            )  # fmt: skip
            status: int | None = None
            try:
                with suppress(subprocess.TimeoutExpired):
                    status = child.wait(seconds + _GRACE)
            finally:
                if status is None:  # not waited for any longer: a driver may hold it
                    os.killpg(child.pid, signal.SIGKILL)
                assert child.stdin is not None  # the child reads to its end, and ends with it
                child.stdin.close()
        found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if status == 0 and (found.get("error") is not None or "milliseconds" in found):
        return found
    operation = found.get("operation")
    lasting = operation is not None and status != os.EX_TEMPFAIL
    if status is None or time.monotonic() - begun >= seconds:
        how = f"took more than {seconds:g} s"
    elif status < 0:
        how = f"ended its process with signal {_name_of(-status)}"
        lasting = lasting and -status in _OF_KERNELS
    else:
        how = f"ended its process with status {status}"
    error = f"{operation or 'its start'}: {how} (log: {output.name})"
    return {"differences": [], "error": error, "lasting": lasting}


def _opened(log: Path) -> BinaryIO:
    """Open a log, where it can be written: it may be another user's, or the disk full."""
    try:
        return log.open("wb")
    except OSError:
        return Path(os.devnull).open("wb")


def _environ() -> dict[str, str]:
    """Return an environment in which a child finds the modules that this process finds.

    ``python -m`` alone would find those of the working directory first, and none of a script's.
    """
    path = os.pathsep.join(str(entry) or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one for real time
        return str(number)


def _read(file: Path) -> Certificate | None:
    """Return what a file holds, None if it is not there or is no certificate of this version."""
    with suppress(*_UNREADABLE):
        return _certificate(json.loads(file.read_text()), file)
    return None


def _certificate(found: Mapping[str, Any], report: Path) -> Certificate:
    worst = max((Difference(**each).share for each in found["differences"]), default=0.0)
    passed = found["error"] is None
    milliseconds, tflops = (
        float(found[name]) if passed else None for name in ("milliseconds", "tflops")
    )
    kernels, error = found["subject"]["kernels"], found["error"]
    return Certificate(kernels, worst, milliseconds, tflops, error, str(report))


def _written_at(file: Path) -> int | None:
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return None


def _write(file: Path, found: Mapping[str, Any]) -> None:
    """Write a file that is whole whenever it is there."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".json")
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(found, stream, indent=1)
        os.replace(name, file)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(file: Path, seconds: float) -> Iterator[None]:
    """Hold a lock that ends with its process, where the file system has locks.

    Without, as on Lustre by default, several processes may examine at a time; each finds the same.
    So they may after ``seconds``: what holds the lock then is stopped, as by Ctrl-Z.
    """
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        with suppress(OSError):
            stream = stack.enter_context(file.open("a"))
            while not _lock(stream) and time.monotonic() < deadline:
                time.sleep(0.1)
        yield


def _lock(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _folder() -> Path:
    """Return where certificates are kept: the user's cache, or a folder of the machine's own."""
    beside = Path(tempfile.gettempdir(), f"nemo_dsv4_cp-{os.getuid()}")
    folders = [beside]
    with suppress(RuntimeError):  # a user without a home, as in containers
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folders.insert(0, Path(home, "nemo_dsv4_cp"))
    for folder in folders:
        certificates = folder / "certificates"
        try:
            certificates.mkdir(parents=True, exist_ok=True)
            foreign = folder is beside and folder.stat().st_uid != os.getuid()
        except OSError:
            continue
        if os.access(certificates, os.W_OK) and not foreign:
            return certificates
    raise OSError(
        f"none of {', '.join(map(str, folders))} can be written; set XDG_CACHE_HOME to a folder "
        "that can"
    )
