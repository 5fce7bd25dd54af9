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
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nemo_dsv4_cp.tools import planning
from nemo_dsv4_cp.tools.paths import BOUNDARY, HOST, PATHS, TRANSPORTS
from nemo_dsv4_cp.tools.planning import Request, Row
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes, read_model_fields

_DRAWN_AS = (".png", ".pdf", ".svg")
# The table fits a terminal of 80 columns.
_IN_HEADERS = {"boundary": "boun-\ndary", "all_gather": "all_\ngather", "host": "host"}


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
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU, GiB.")] = 80,
    reserved: Annotated[
        float, typer.Option(help="GiB of it for weights, optimizer state and experts.")
    ] = 40,
    json_: Annotated[
        Path | None, typer.Option("--json", help='Write the plan here, in bytes; "-" prints.')
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and bytes against cp_size here.")
    ] = None,
) -> None:
    """Plan a context-parallel size: padding, traffic, memory, imbalance, and what fits.

    Nothing is run: all figures are computed, for bfloat16 activations and checkpointed layers.

    Example: nemo-dsv4-cp plan v4_flash --seq-len 1048576 --ranks 64

    Exit status: 0 also where nothing fits; 2 for a mistake in the arguments.
    """
    if transport not in TRANSPORTS:
        raise typer.BadParameter(f"--transport {transport} is unknown; use boundary or all_gather")
    if not (math.isfinite(gpu_memory) and gpu_memory > 0):
        raise typer.BadParameter(f"--gpu-memory {gpu_memory:g} is no GPU's; use GiB, such as 80")
    if not 0 <= reserved < gpu_memory:
        raise typer.BadParameter(
            f"--reserved {reserved:g} leaves nothing of --gpu-memory {gpu_memory:g}; use GiB from "
            f"0 to below {gpu_memory:g}, such as {gpu_memory / 2:g}"
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

    request = Request(sizes, seq_len, ranks, batch, transport, gpu_memory, reserved)
    every = [planning.row(request, size) for size in planning.powers_of_two(ranks)]
    rows = every if cp_size is None else [planning.row(request, cp_size)]
    smallest = planning.smallest_that_fits(request)
    warnings = planning.warnings(request, rows, chosen=cp_size)
    printed = json_ is not None and str(json_) == "-"
    if json_ is not None:
        text = json.dumps(_figures(request, rows, smallest, warnings), indent=2)
        if printed:
            typer.echo(text)
        else:
            json_.write_text(text + "\n")
    if not printed:
        _print(model, request, rows, smallest, warnings)
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


def _figures(
    request: Request, rows: Sequence[Row], smallest: int | None, warnings: Sequence[str]
) -> dict[str, Any]:
    return {
        "request": dataclasses.asdict(request),
        "smallest_cp_size_that_fits": smallest,
        "rows": [dataclasses.asdict(row) for row in rows],
        "warnings": list(warnings),
    }


def _gib(size: int) -> str:
    digits = 2 if size < 10 * GIB else 1 if size < 100 * GIB else 0
    return f"{size / GIB:,.{digits}f}"


def _print(
    model: str,
    request: Request,
    rows: Sequence[Row],
    smallest: int | None,
    warnings: Sequence[str],
) -> None:
    console = Console()
    rows_of = f"{request.batch} row{'s' if request.batch > 1 else ''}"
    console.print(
        f"{model}: {rows_of} of {request.seq_len:,} tokens, {request.ranks} GPUs of "
        f"{request.gpu_memory:g} GiB; {request.transport} against AutoModel's own path (host); "
        "GiB of one rank",
        markup=False,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True)
    headers = ["cp\nsize", "shard\ntokens", "pad\n%"]
    headers += [f"recv\n{_IN_HEADERS[path]}" for path in PATHS]
    headers += [f"attn\n{_IN_HEADERS[request.transport]}", f"attn\n{HOST}"]
    headers += ["last /\nfirst", "need", "fits"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.cp_size),
            f"{row.shard_len:,}",
            f"{row.padding * 100:.1f}",
            *(_gib(row.of(path).received_bytes) for path in PATHS),
            _gib(row.of(request.transport).attention_bytes),
            _gib(row.of(HOST).attention_bytes),
            f"{row.imbalance:.2f}",
            _gib(row.needed_bytes),
            "yes" if row.fits else "no",
            style="bold" if row.cp_size == smallest else None,
        )
    console.print(table)
    console.print(
        "recv: received in a step, all layers, forward and backward. attn: peak of the worst "
        "layer's attention. last / first: work of the last rank against the first's. need: attn, "
        f"one checkpointed input a layer, and --reserved {request.reserved:g}.",
        markup=False,
    )
    if smallest is None:
        console.print(
            "No cp_size up to --ranks fits: use more ranks, shorter or fewer rows, or a smaller "
            "--reserved.",
            style="bold red",
        )
    else:
        console.print(f"Smallest cp_size that fits: {smallest}", style="bold green")
    for warning in warnings:
        console.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False)


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
    limit = f"--gpu-memory {request.gpu_memory:g}"
    left.axhline(request.gpu_memory, color="grey", lw=0.8, label=limit)
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
