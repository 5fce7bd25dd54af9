# SPDX-License-Identifier: Apache-2.0
"""``plan``: what each context-parallel size costs a model, and the smallest that fits."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nemo_dsv4_cp.cli.plan_tables import print_plan
from nemo_dsv4_cp.gpus import GPUS, Gpu
from nemo_dsv4_cp.tools import planning
from nemo_dsv4_cp.tools.inventory import BOUNDARY, PATHS, TRANSPORTS
from nemo_dsv4_cp.tools.planning import Request, Row
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes, read_model_fields

_DRAWN_AS = (".png", ".pdf", ".svg")
_BALANCES = ("auto", "on", "off")
_GPU_OPTIONS = {
    "memory": "--gpu-memory",
    "tflops": "--tflops",
    "nvlink_gbs": "--nvlink-gbs",
    "network_gbs": "--network-gbs",
}
"""Which option gives which figure of a GPU."""


def plan(
    model: Annotated[
        str,
        typer.Argument(help="v4_flash, v4_pro, a config.json or recipe, or a model of the hub."),
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens in a row, before padding.", min=1)],
    ranks: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Rows in a rank's batch.", min=1)] = 1,
    transport: Annotated[str, typer.Option(help="boundary or all_gather.")] = BOUNDARY,
    cp_size: Annotated[
        int | None, typer.Option(help="Plan this size alone, not all powers of two.", min=1)
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200 or b200, in nodes of 8.")] = "h100",
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of a GPU, GiB; else that of --gpu.")
    ] = None,
    reserved: Annotated[
        float, typer.Option(help="GiB of it for weights, optimizer state and experts.")
    ] = 40,
    balance: Annotated[
        str, typer.Option(help="context_parallel.balance: auto, on or off.")
    ] = "auto",
    overlap: Annotated[bool, typer.Option(help="context_parallel.overlap.")] = True,
    tflops: Annotated[
        float | None, typer.Option(help="Dense bfloat16 peak of a GPU; else that of --gpu.")
    ] = None,
    nvlink_gbs: Annotated[
        float | None, typer.Option(help="GB/s to a GPU within a node; else those of --gpu.")
    ] = None,
    network_gbs: Annotated[
        float | None, typer.Option(help="GB/s to a GPU from other nodes; else 50.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help='Write the plan here, in bytes; "-" prints.')
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and bytes against cp_size here.")
    ] = None,
) -> None:
    """Plan a context-parallel size: padding, traffic, memory, balance, time, and what fits.

    Nothing is run: all figures are computed, for bfloat16 activations and checkpointed layers.
    Time is an estimate by rates that are assumed.

    Example: nemo-dsv4-cp plan v4_flash --seq-len 1048576 --ranks 64

    Exit status: 0 also where nothing fits; 2 for a mistake in the arguments.
    """
    if transport not in TRANSPORTS:
        raise typer.BadParameter(f"--transport {transport} is unknown; use boundary or all_gather")
    if balance not in _BALANCES:
        raise typer.BadParameter(f"--balance {balance} is unknown; use auto, on or off")
    machine = _gpu(
        gpu, memory=gpu_memory, tflops=tflops, nvlink_gbs=nvlink_gbs, network_gbs=network_gbs
    )
    if not 0 <= reserved < machine.memory:
        raise typer.BadParameter(
            f"--reserved {reserved:g} leaves nothing of --gpu-memory {machine.memory:g}; use GiB "
            f"from 0 to below {machine.memory:g}, such as {machine.memory / 2:g}"
        )
    if cp_size is not None and cp_size > ranks:
        raise typer.BadParameter(
            f"--cp-size {cp_size} needs as many GPUs, --ranks says {ranks}; use {ranks} or fewer, "
            f"or --ranks {cp_size}"
        )
    _check_output("--json", json_)
    _check_output("--plot", plot)
    if plot is not None:
        if plot.suffix.lower() not in _DRAWN_AS:
            raise typer.BadParameter(f"--plot {plot} is no picture's name; end it with .png")
        if find_spec("matplotlib") is None:
            raise typer.BadParameter("--plot needs matplotlib: pip install 'nemo-dsv4-cp[plot]'")
    tell = partial(Console(stderr=True).print, style="yellow", markup=False, soft_wrap=True)
    try:
        sizes = ModelSizes.of_fields(read_model_fields(model, tell))
    except ValueError as error:
        raise typer.BadParameter(f"MODEL: {error}") from error

    request = Request(sizes, seq_len, ranks, batch, transport, machine, reserved, balance, overlap)
    every = [planning.row(request, size) for size in planning.powers_of_two(ranks)]
    rows = every if cp_size is None else [planning.row(request, cp_size)]
    smallest = planning.smallest_that_fits(request, every)
    fastest = planning.fastest_that_fits(request, every)
    warnings = planning.warnings(request, rows, every, chosen=cp_size)
    printed = json_ is not None and str(json_) == "-"
    if json_ is not None:
        text = json.dumps(_figures(request, rows, smallest, fastest, warnings), indent=2)
        if printed:
            typer.echo(text)
        else:
            json_.write_text(text + "\n")
    if not printed:
        print_plan(model, request, rows, smallest=smallest, fastest=fastest, warnings=warnings)
    if plot is not None:
        _plot(model, request, every, plot)
        Console(stderr=True).print(f"Drawn: {plot}", markup=False, soft_wrap=True)


def _check_output(option: str, output: Path | None) -> None:
    if output is None or (option == "--json" and str(output) == "-"):
        return
    if not output.parent.is_dir() or output.is_dir() or not os.access(output.parent, os.W_OK):
        raise typer.BadParameter(
            f"{option} {output} cannot be written; name a file in a directory you may write to"
        )
    if output.exists() and not os.access(output, os.W_OK):
        raise typer.BadParameter(f"{option} {output} is read-only; name another file")


def _gpu(name: str, **given: float | None) -> Gpu:
    """Return a GPU with what the options say instead of its own figures."""
    if name not in GPUS:
        raise typer.BadParameter(f"--gpu {name} is unknown; use {', '.join(GPUS)}")
    gpu = GPUS[name]
    own: dict[str, Any] = {name: figure for name, figure in given.items() if figure is not None}
    for field, figure in own.items():
        if not (math.isfinite(figure) and figure > 0):
            option, example = _GPU_OPTIONS[field], getattr(gpu, field)
            raise typer.BadParameter(f"{option} {figure:g} is no GPU's; use such as {example:g}")
    return dataclasses.replace(gpu, **own)


def _figures(
    request: Request,
    rows: Sequence[Row],
    smallest: int | None,
    fastest: int | None,
    warnings: Sequence[str],
) -> dict[str, Any]:
    return {
        "request": dataclasses.asdict(request),
        "smallest_cp_size_that_fits": smallest,
        "fastest_cp_size_that_fits": fastest,
        "rows": [dataclasses.asdict(row) for row in rows],
        "warnings": list(warnings),
    }


def _plot(model: str, request: Request, rows: Sequence[Row], destination: Path) -> None:
    """Draw memory and bytes against cp_size, log-log."""
    import matplotlib  # an extra that only plots need

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    sizes = [row.cp_size for row in rows]
    for path in PATHS:
        left.plot(
            sizes, [row.of(path).attention_bytes / GIB for row in rows], marker="o", label=path
        )
        # A single rank receives nothing, which a logarithm cannot show.
        received = [(r.cp_size, r.of(path).received_bytes / GIB) for r in rows if r.cp_size > 1]
        right.plot([r[0] for r in received], [r[1] for r in received], marker="o", label=path)
    needed = [row.needed_bytes / GIB for row in rows]
    left.plot(sizes, needed, color="black", ls="--", label=f"{request.transport}, all needed")
    limit = f"--gpu-memory {request.gpu.memory:g}"
    left.axhline(request.gpu.memory, color="grey", lw=0.8, label=limit)
    left.set_ylabel("peak of the worst layer's attention, GiB")
    right.set_ylabel("received by one rank in a step, GiB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        if axes is left or len(rows) > 1:
            axes.set_yscale("log")
        axes.set_xlabel("cp_size")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"{model}, {request.batch} x {request.seq_len:,} tokens")
    figure.tight_layout()
    figure.savefig(destination, dpi=150)
    plt.close(figure)
