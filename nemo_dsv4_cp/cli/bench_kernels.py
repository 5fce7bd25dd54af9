# SPDX-License-Identifier: Apache-2.0
"""``bench kernels``: what the binaries of the Triton kernels take, read without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from nemo_dsv4_cp.cli.bench import Json
from nemo_dsv4_cp.cli.output import check_outputs, emit, progress, running, table
from nemo_dsv4_cp.gpus import KIB, MULTIPROCESSORS, SHARED_MEMORY
from nemo_dsv4_cp.tools.sizes import MODELS

if TYPE_CHECKING:  # triton, which not every environment has
    from nemo_dsv4_cp.bench.compiled_kernels import Modelled


def kernels(
    model: Annotated[
        list[str], typer.Option("--model", help="v4_flash or v4_pro; may be repeated.")
    ] = list(MODELS),  # noqa: B006
    arch: Annotated[
        list[int],
        typer.Option("--arch", help="Capability times 10: 80, 90, 100, 103; may be repeated."),
    ] = [80, 90, 100],  # noqa: B006
    json_: Json = None,
) -> None:
    """Compile the Triton kernels for GPUs, without one, read their binaries and model their time.

    Registers and stack are per thread, shared memory per program; stack is spilled registers. One
    step is one of the inner loop, the worst of a kernel's loops. Times are a model, for the last
    rank of 128K tokens on 8; docs/benchmarks.md states it.

    Example: nemo-dsv4-cp bench kernels --arch 90
    """
    check_outputs(json_=json_)
    for name in model:
        if name not in MODELS:
            raise typer.BadParameter(f"--model {name} is none of {', '.join(MODELS)}")
    with running(mistakes=RuntimeError):
        from nemo_dsv4_cp.bench import compiled_kernels

        for number in arch:
            _check(number, compiled_kernels.ARCHITECTURES, compiled_kernels.REFUSED)
        compiled = list(progress(compiled_kernels.compile_all(model, arch), "Compiling"))
        figures = [compiled_kernels.figures(each) for each in compiled]
        layers = compiled_kernels.layer_times(compiled)
    columns: dict[str, Callable[[tuple[Any, ...]], object]] = {
        "model": lambda row: row[0],
        "arch": lambda row: row[1],
        "ratio": lambda row: row[2],
        "pass": lambda row: row[3],
        "ms": lambda row: f"{row[4]:,.2f}",
    }
    sums = table(
        "Modelled time of one layer's kernels",
        [(*layer, ms) for layer, ms in layers.items()],
        columns,
    )
    shown = []
    for name, number in product(model, arch):
        of_both = [row for row in compiled if (row.model, row.compiled.arch) == (name, number)]
        shown.append(_kernels(name, number, of_both))
    emit(figures, json_, *shown, sums)


def _check(number: int, taken: Sequence[int], refused: Sequence[int]) -> None:
    known = ", ".join(map(str, taken))
    if number in refused:
        raise typer.BadParameter(
            f"--arch {number} has {SHARED_MEMORY[number] // KIB} KiB of shared memory per block, "
            f"too little for the kernels; use one of {known}"
        )
    if number not in taken:
        raise typer.BadParameter(f"--arch {number} is none of {known}")


def _kernels(model: str, arch: int, compiled: Sequence[Modelled]) -> Table:
    """Return a table of one model and architecture, which fits a terminal of 80 columns."""

    def worst(row: Modelled, figure: Callable[[Any], float], unit: int = 1) -> str:
        loops = row.compiled.loops
        return f"{max(map(figure, loops)) / unit:,.0f}" if loops else "-"

    def ratio(row: Modelled) -> str:
        found = row.compiled.issued_over_needed
        return "-" if found is None else f"{found:.2f}"

    columns: dict[str, Callable[[Modelled], object]] = {
        "kernel": lambda row: row.compiled.kernel.removesuffix("_kernel"),
        "regs": lambda row: row.compiled.registers,
        "stack": lambda row: row.compiled.stack,
        "KiB": lambda row: f"{row.compiled.shared / KIB:.0f}",
        "issued/\nneeded": ratio,
        "bars/\nstep": lambda row: worst(row, lambda loop: loop.barriers),
        "KiB/\nstep": lambda row: worst(row, lambda loop: loop.shared_read, KIB),
        "progs/\nSM": lambda row: (
            f"{row.longest.programs / MULTIPROCESSORS[row.compiled.arch].count:,.1f}"
        ),
        "ms": lambda row: f"{row.longest.ms:,.2f}",
        "bound": lambda row: row.longest.bound,
    }
    limit = SHARED_MEMORY[arch] // KIB
    title = f"{model}, bfloat16, sm_{arch}: {limit} KiB of shared memory per block"
    made = table(title, compiled, columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in made.columns[:-1]:
        column.no_wrap = True  # what bounds a kernel is the one cell that wraps
    return made
