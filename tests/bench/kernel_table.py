# SPDX-License-Identifier: Apache-2.0
"""One table of what the lint found in the binaries, at the end of a run that linted."""

import pytest
from rich.console import Console
from rich.table import Table

from nemo_dsv4_cp.gpus import KIB, SHARED_MEMORY

LINTED = "linted kernels"
"""Property that a test records: triton's version, and kernel, dtype, architecture and figures of
each binary. Triton itself is not imported: this file is read in every run."""


def cell(binaries: list[dict[str, float]]) -> str:
    """Return the worst of the binaries of a kernel, by what each has most of."""
    worst = {name: max(each[name] for each in binaries) for name in binaries[0]}
    ratio, stack = worst["issued_over_needed"], worst["stack"]
    parts = [f"{worst['shared'] / KIB:.0f} KiB"]
    parts += [f"{ratio:.2f}"] if ratio else []
    parts += [f"stack {stack}"] if stack else []
    names = ("conversions", "tmem_copies", "waiting")
    return ", ".join(parts + [f"{name} {worst[name]}" for name in names if worst[name]])


def table(version: str, rows: list[tuple[str, str, int, dict[str, float]]]) -> Table:
    archs = sorted({arch for _, _, arch, _ in rows})
    made = Table(title=f"triton {version}: shared memory, products issued over needed, faults")
    limits = {arch: f"sm_{arch}, {SHARED_MEMORY[arch] // KIB} KiB" for arch in archs}
    for header in ("kernel", "dtype", *limits.values()):
        made.add_column(header)
    for kernel, dtype in dict.fromkeys(row[:2] for row in rows):
        found = [
            [taken for name, kind, n, taken in rows if (name, kind, n) == (kernel, dtype, arch)]
            for arch in archs
        ]
        made.add_row(kernel, dtype, *(cell(each) if each else "-" for each in found))
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.getreports(kind)]
    linted = [dict(each.user_properties).get(LINTED) for each in reports if each.when == "call"]
    rows = [tuple(row) for found in linted if found for row in found[1]]
    if rows:
        console = Console(width=160)
        with console.capture() as captured:
            console.print(table(next(found[0] for found in linted if found), rows))
        terminalreporter.write(captured.get())
