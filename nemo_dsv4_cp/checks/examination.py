# SPDX-License-Identifier: Apache-2.0
"""The child process in which kernels are verified and timed, for a certificate.

``python -m nemo_dsv4_cp.checks.examination REQUEST RESULT DEVICE SECONDS``; RESULT always names the
operation that runs, for a parent that finds the child dead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.checks.kernel_verification import verify_kernels
from nemo_dsv4_cp.checks.model_layers import layers_of
from nemo_dsv4_cp.checks.operation_timing import time_operations
from nemo_dsv4_cp.kernels.protocol import Kernels

_ROW, _RANKS, _REPEATS = 32768, 8, 3
_ROW_ON_CPU = 1024
"""Where the tests run."""

_OF_THE_MACHINE = (
    "out of memory",
    "OUT_OF_MEMORY",
    "can't allocate memory",
    "ALLOC_FAILED",
    "busy or unavailable",
    "Failed to find C compiler",
    "libcuda.so cannot found",
)
"""Parts of messages of CUDA, torch and Triton whose cause is another process or an installation."""


def main(request: Path, result: Path, device: int | None, seconds: float) -> None:
    """Examine what ``request`` describes, and write ``result``."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    if device is not None:
        torch.cuda.set_device(device)
    subject = json.loads(request.read_text())
    deterministic = subject["environment"]["deterministic"] == "True"
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    found: dict[str, Any] = {"operation": "its start", "differences": [], "error": None}

    def begin(operation: str) -> None:
        found["operation"] = operation
        _write(result, found)

    try:
        _verify(subject, found, begin)
        if found["error"] is None:
            begin("timing")
            found |= _time(subject)
    except Exception as error:
        traceback.print_exc()
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        found["error"] = f"{found['operation']}: {line}"
        found["lasting"] = not _is_of_the_machine(error)
    try:
        _write(result, found)
    except OSError:  # a full disk, which kernels are not to blame for
        traceback.print_exc()
        os._exit(os.EX_TEMPFAIL)


def _is_of_the_machine(error: Exception) -> bool:
    """Return whether the next start may not meet the error."""
    message = str(error)
    # A C compiler that lacks Python's headers ends as CalledProcessError.
    kinds = (torch.OutOfMemoryError, MemoryError, OSError, ImportError, CalledProcessError)
    return isinstance(error, kinds) or any(part in message for part in _OF_THE_MACHINE)


def _end_with_parent() -> None:
    """Exit once standard input ends, which is when a parent that was killed closes it."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _verify(
    subject: Mapping[str, Any], found: dict[str, Any], begin: Callable[[str], None]
) -> None:
    sizes, workspace = SimpleNamespace(**subject["sizes"]), subject["workspace_bytes"]
    for dtype in subject["dtypes"]:
        for difference in verify_kernels(
            sizes,
            subject["kernels"],
            dtype=getattr(torch, dtype),
            workspace_bytes=workspace,
            begin=lambda operation: begin(f"{dtype}, {operation}"),  # noqa: B023  called at once
        ):
            name = f"{dtype}, {difference.name}"
            found["differences"].append(asdict(difference) | {"name": name})
            if not difference.passes and found["error"] is None:
                off, allowed = f"{difference.value:.1e}", f"{difference.limit:.1e}"
                found["error"] = f"{name} is off by {off}, and {allowed} is allowed"


def _time(subject: Mapping[str, Any]) -> dict[str, float]:
    """Time the kernels of one layer of each kind, and average over the model's layers."""
    sizes = SimpleNamespace(**subject["sizes"])
    kernels: Kernels = plugins.load(plugins.KERNELS, subject["kernels"])(
        workspace_bytes=subject["workspace_bytes"]
    )
    seconds = flops = 0.0
    row = _ROW if torch.cuda.is_available() else _ROW_ON_CPU
    of_kind = layers_of(sizes)
    for (ratio, selects), layers in of_kind.items():
        times = time_operations(
            kernels, sizes, ratio, row, _RANKS,
            dtype=getattr(torch, subject["dtypes"][0]), repeats=_REPEATS, selects=selects,
        )  # fmt: skip
        seconds += layers * sum(each.seconds for each in times)
        flops += layers * sum(each.flops for each in times)
    return {"milliseconds": seconds / of_kind.total() * 1e3, "tflops": flops / seconds / 1e12}


def _write(file: Path, found: Mapping[str, Any]) -> None:
    whole = file.with_suffix(".new")
    whole.write_text(json.dumps(found))
    os.replace(whole, file)


if __name__ == "__main__":
    _end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4]))
