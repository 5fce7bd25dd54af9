# SPDX-License-Identifier: Apache-2.0
"""``bench kernels``: the Triton kernels compiled for GPUs, without one."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_dsv4_cp.cli.bench_options import Json, check_outputs, console, emit
from nemo_dsv4_cp.cli.quiet import quiet
from nemo_dsv4_cp.tools.sizes import MODELS

Models = Annotated[list[str], typer.Option("--model", help="v4_flash or v4_pro; may be repeated.")]
Archs = Annotated[
    list[int], typer.Option("--arch", help="Capability times 10: 80, 90, 100; may be repeated.")
]


def kernels(
    model: Models = list(MODELS),  # noqa: B006
    arch: Archs = [80, 90, 100],  # noqa: B006
    json_: Json = None,
) -> None:
    """Compile the Triton kernels for GPUs, without one, and read their binaries.

    Registers and stack are a thread's, shared memory a program's, in bytes; stack beyond a few
    bytes is spilled registers.

    Example: python -m nemo_dsv4_cp bench kernels --arch 90
    """
    check_outputs(json_)
    for name in model:
        if name not in MODELS:
            raise typer.BadParameter(f"--model {name} is none of {', '.join(MODELS)}")
    with quiet():
        from nemo_dsv4_cp.bench.compiled_kernels import ARCHITECTURES, compile_all
    for number in arch:
        if number not in ARCHITECTURES:
            known = ", ".join(map(str, ARCHITECTURES))
            raise typer.BadParameter(f"--arch {number} is none of {known}")
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    every = track(compile_all(model, arch), "Compiling", console=shown, transient=True)
    try:
        rows = [report.row() for report in every]
    except RuntimeError as error:
        raise typer.BadParameter(f"{error}") from error
    table = Table(title=f"Triton kernels of {', '.join(model)}, bfloat16, compiled for sm_*")
    for header in rows[0]:
        table.add_column(header, justify="left" if header in ("model", "kernel") else "right")
    for row in rows:
        table.add_row(*("-" if value is None else f"{value}" for value in row.values()))
    emit(table, rows, json_)
