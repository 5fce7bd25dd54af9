# SPDX-License-Identifier: Apache-2.0
"""One report of what the kernels do on this machine's GPU: right or not, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.bench.timing import automodel_kernels, describe_machine, time_one_gpu_rank
from nemo_dsv4_cp.checks import certificate
from nemo_dsv4_cp.checks.certificate import Subject
from nemo_dsv4_cp.checks.kernel_choice import installed
from nemo_dsv4_cp.checks.model_layers import is_v41, kind_of
from nemo_dsv4_cp.checks.operation_timing import peak_tflops, time_operations
from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.tools.crossings import AUTOMODEL, BOUNDARY
from nemo_dsv4_cp.tools.diagnosis import diagnose

SHAPES = ((131072, 8), (262144, 16), (1048576, 64))
"""Tokens of a row, and the CP ranks that share it; the last rank is measured."""

_RATIOS = (0, 4, 128)
"""Of V4; V4.1 has more than one kind of layer of a ratio."""
_REPEATS = 3


@dataclass
class Report:
    """What was found; every list is empty where time ran out before.

    Attributes:
        machine: The GPU, and torch.
        peak_tflops: Its dense bfloat16 peak, None if it is unknown.
        environment: The findings of ``doctor``.
        tests: Counts of the kernel tests that ran on this GPU: passed, failed, skipped.
        certificates: Of each installed backend, with every difference.
        operations: Milliseconds and TFLOP/s of each operation, by shape and ratio.
        layers: Milliseconds and GiB of forward and backward of a whole layer, by path and kernels.
        left_out: What was not measured for lack of time, or failed, and why.
        seconds: How long all of it took.
    """

    machine: str
    peak_tflops: float | None
    environment: list[dict[str, Any]] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    operations: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0


def collect(fields: Mapping[str, Any], *, seconds: float, tests: Path | None = None) -> Report:
    """Examine and time every installed backend at a model's sizes, in bfloat16.

    Args:
        fields: Those of a complete config of V4, or of a text config of V4.1.
        seconds: After which no other measurement begins.
        tests: JUnit file of the kernel tests, if they ran.
    """
    begun = time.monotonic()
    report, sizes = Report(describe_machine(), peak_tflops()), SimpleNamespace(**fields)
    report.environment = [asdict(finding) for finding in diagnose()]
    if tests is not None:
        report.tests = counts_of(tests)
    workspace = ContextParallelOptions().workspace_bytes
    found = []
    for name in installed():
        subject = Subject.of(name, sizes, dtype="bfloat16", workspace_bytes=workspace)
        found.append(certificate.obtain(subject, renew=True))
        report.certificates.append(
            asdict(found[-1]) | {"differences": certificate.differences(found[-1])}
        )
    passed = [each.kernels for each in found if each.passed]
    for what, measure in _measurements(sizes, passed, workspace, report):
        if time.monotonic() - begun > seconds:
            report.left_out.append(f"{what}: no time left")
            continue
        try:
            measure()
        except Exception as error:  # one that fails leaves the others; Triton's are no RuntimeError
            line = " ".join(str(error).split())
            report.left_out.append(f"{what}: {type(error).__name__}: {line}")
            with suppress(RuntimeError):  # after an illegal access every call fails
                torch.cuda.empty_cache()
    report.seconds = time.monotonic() - begun
    return report


def _measurements(
    sizes: Any, passed: Sequence[str], workspace_bytes: int | None, report: Report
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the measurements by name, those of shorter rows first."""
    backends = {
        name: plugins.load(plugins.KERNELS, name)(workspace_bytes=workspace_bytes)
        for name in passed
    }
    for (seq_len, cp_size), kind in product(SHAPES, kinds_of(sizes)):
        at = f"{kind.name}, {seq_len:,} tokens on {cp_size} ranks"
        shape = {"seq_len": seq_len, "cp_size": cp_size, **asdict(kind), "name": kind.name}
        for name, kernels in backends.items():
            yield (
                f"{name}, operations, {at}",
                partial(_operations, report, sizes, kernels, name, shape),
            )
        for path, name in [*((BOUNDARY, name) for name in passed), (AUTOMODEL, AUTO)]:
            yield f"{path}, {name}, layer, {at}", partial(_layer, report, path, name, shape)


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        ratio: Compress ratio.
        selects: How a layer of V4.1 does, as :func:`layers_of` names it.
        layer: The first of the kind in V4.1; None in V4.
    """

    ratio: int
    selects: str | None = None
    layer: int | None = None

    @property
    def name(self) -> str:
        """The kind in words."""
        if self.layer is None:
            return f"ratio {self.ratio}"
        how = self.selects or ("reuses" if self.ratio else "window only")
        return f"layer {self.layer} (ratio {self.ratio}, {how})"


def kinds_of(sizes: Any) -> list[Kind]:
    """Return the kinds of a model's layers; V4's are its ratios."""
    if not is_v41(sizes):
        return [Kind(ratio) for ratio in _RATIOS]
    first: dict[tuple[int, str | None], int] = {}
    for layer in range(sizes.num_hidden_layers):
        first.setdefault(kind_of(sizes, layer), layer)
    return [Kind(*kind, layer) for kind, layer in first.items()]


def _operations(
    report: Report, sizes: Any, kernels: Kernels, name: str, shape: Mapping[str, Any]
) -> None:
    ratio, seq_len, cp_size = shape["ratio"], shape["seq_len"], shape["cp_size"]
    for each in time_operations(
        kernels, sizes, ratio, seq_len, cp_size,
        dtype=torch.bfloat16, repeats=_REPEATS, selects=shape["selects"],
    ):  # fmt: skip
        found = asdict(each) | {"tflops": each.tflops}
        report.operations.append({**shape, "kernels": name, **found})


def _layer(report: Report, path: str, kernels: str, shape: Mapping[str, Any]) -> None:
    ratio, seq_len, cp_size = shape["ratio"], shape["seq_len"], shape["cp_size"]
    case = Case(path, ratio, seq_len, cp_size, cp_size - 1, kernels=kernels, layer=shape["layer"])
    (found,) = time_one_gpu_rank([case], _REPEATS)
    figures = {"seconds": found.median, "peak_bytes": found.peak_bytes}
    own = automodel_kernels() if path == AUTOMODEL else kernels
    report.layers.append({**shape, "path": path, "kernels": own, **figures})


def counts_of(junit: Path) -> dict[str, int]:
    """Return how many tests of a JUnit file passed, failed and were skipped."""
    suite = next(ElementTree.parse(junit).iter("testsuite"))
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
    }


def markdown(report: Report) -> str:
    """Return the report as a page."""
    parts = [
        f"# Kernels on {report.machine}",
        f"Measured in {report.seconds:,.0f} s. ms are medians of {_REPEATS}.",
    ]
    if report.tests:
        counts = ", ".join(f"{count} {what}" for what, count in report.tests.items())
        parts.append(f"Kernel tests on this GPU: {counts}.")
    parts += [
        "## Certificates",
        _table(
            ("kernels", "result", "ms per layer", "largest error / allowed"),
            (
                (
                    each["kernels"],
                    each["error"] or "passed",
                    _number(each["milliseconds"], 1),
                    _number(each["worst"], 2),
                )
                for each in report.certificates
            ),
        ),
        "## Layers, forward and backward, the last rank alone",
        _table(
            ("tokens", "ranks", "layer", "path", "kernels", "ms", "peak GiB"),
            (
                (
                    f"{each['seq_len']:,}",
                    each["cp_size"],
                    each["name"],
                    each["path"],
                    each["kernels"],
                    _number(each["seconds"] * 1e3, 1),
                    _number((each["peak_bytes"] or 0) / 2**30, 2),
                )
                for each in report.layers
            ),
        ),
        "## Operations",
        _table(
            ("tokens", "ranks", "layer", "kernels", "operation", "ms", "TFLOP/s", "of peak"),
            (
                (
                    f"{each['seq_len']:,}",
                    each["cp_size"],
                    each["name"],
                    each["kernels"],
                    each["operation"],
                    _number(each["seconds"] * 1e3, 3),
                    _number(each["tflops"] or None, 1),
                    f"{each['tflops'] / report.peak_tflops:.0%}" if report.peak_tflops else "-",
                )
                for each in report.operations
            ),
        ),
        "## Environment",
        _table(
            ("subject", "found", "what to do"),
            ((each["subject"], each["found"], each["remedy"] or "") for each in report.environment),
        ),
    ]
    if report.left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in report.left_out)]
    return "\n\n".join(parts) + "\n"


def _table(headers: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [headers, ["---"] * len(headers), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
