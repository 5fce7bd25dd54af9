# SPDX-License-Identifier: Apache-2.0
"""``plan``: what each context-parallel size costs a model, and the smallest that fits.

Every table fits a terminal of 80 columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nemo_dsv4_cp.checks import certificate
from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.checks.model_layers import SIZES, SIZES_V41
from nemo_dsv4_cp.cli.output import check_outputs, emit, quiet, two_plots, warn
from nemo_dsv4_cp.gpus import GPUS, LINK_SHARE, Gpu, known_gpu
from nemo_dsv4_cp.options import COMPRESSOR_PRECISIONS
from nemo_dsv4_cp.tools.crossings import AUTOMODEL, BOUNDARY, PATHS, TRANSPORTS
from nemo_dsv4_cp.tools.planning import Plan, Request, Row
from nemo_dsv4_cp.tools.sizes import GIB, ModelSizes, ModelSizesV41, is_v41, read_model_fields
from nemo_dsv4_cp.tools.step_time import Time

_IN_HEADERS = {"boundary": "boun-\ndary", "all_gather": "all_\ngather", "automodel": "auto-\nmodel"}
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
        typer.Argument(
            help="v4_flash, v4_pro, v41_flash, a config.json, a recipe or a model of the hub."
        ),
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens in a row, before padding.", min=1)],
    ranks: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Rows in a rank's batch.", min=1)] = 1,
    transport: Annotated[str, typer.Option(help="boundary or all_gather.")] = BOUNDARY,
    cp_size: Annotated[
        int | None, typer.Option(help="Plan this size alone, not all powers of two.", min=1)
    ] = None,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}, in nodes of 8.")] = "h100",
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
    compressor_precision: Annotated[
        str, typer.Option(help="context_parallel.compressor_precision: float32 or bf16x3.")
    ] = "float32",
    indexer_loss: Annotated[
        str | None, typer.Option(help="context_parallel.indexer_loss.mode: sparse or full.")
    ] = None,
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
    Of a recipe only its model's sizes are read, not its length or its context_parallel block.
    Time is an estimate by rates that are assumed; that of the kernels is measured on a machine
    with the GPU and a certificate of them.

    Example: nemo-dsv4-cp plan v4_flash --seq-len 1048576 --ranks 64

    Exit status: 0 also where nothing fits; 2 for a mistake in the arguments.
    """
    if transport not in TRANSPORTS:
        raise typer.BadParameter(f"--transport {transport} is unknown; use boundary or all_gather")
    if balance not in ("auto", "on", "off"):
        raise typer.BadParameter(f"--balance {balance} is unknown; use auto, on or off")
    if compressor_precision not in COMPRESSOR_PRECISIONS:
        raise typer.BadParameter(
            f"--compressor-precision {compressor_precision} is unknown; use float32 or bf16x3"
        )
    machine = _gpu(
        gpu, memory=gpu_memory, tflops=tflops, nvlink_gbs=nvlink_gbs, network_gbs=network_gbs
    )
    if not 0 <= reserved < machine.memory:
        raise typer.BadParameter(
            f"--reserved {reserved:g} leaves nothing of the {machine.memory:g} GiB of one "
            f"{machine.name}; use GiB from 0 to below {machine.memory:g}, such as "
            f"{machine.memory / 2:g}"
        )
    if cp_size is not None and cp_size > ranks:
        raise typer.BadParameter(
            f"--cp-size {cp_size} needs as many GPUs, --ranks is {ranks}; use {ranks} or fewer, "
            f"or --ranks {cp_size}"
        )
    check_outputs(json_=json_, plot=plot)
    try:
        fields = read_model_fields(model, warn)
    except ValueError as error:  # names the model
        raise typer.BadParameter(str(error)) from error
    try:
        with quiet():
            sizes = ModelSizes.of_fields(fields)
    except ValueError as error:
        raise typer.BadParameter(f"{model}: {error}") from error
    if compressor_precision == "bf16x3":  # nothing else of a layer multiplies in float32
        if is_v41(fields):
            raise typer.BadParameter("--compressor-precision bf16x3 is not for DeepSeek-V4.1")
        machine = replace(machine, float32_tflops=machine.tflops / 3)
    if indexer_loss is not None:
        if indexer_loss not in ("sparse", "full"):
            raise typer.BadParameter(
                f"--indexer-loss {indexer_loss} is unknown; use sparse or full"
            )
        if is_v41(fields):
            raise typer.BadParameter("--indexer-loss is for V4: V4.1's indexer is frozen")
        sizes = replace(sizes, indexer_loss=indexer_loss)
    measured = _certificate_here(gpu, fields)
    if measured is not None:
        machine = certificate.with_measured_rate(machine, measured)

    request = Request(sizes, seq_len, ranks, batch, transport, machine, reserved, balance, overlap)
    made = Plan.of(request, cp_size)
    figures = {
        "request": asdict(request),
        "smallest_cp_size_that_fits": made.smallest,
        "fastest_cp_size_that_fits": made.fastest,
        "rows": [asdict(row) for row in made.rows],
        "warnings": made.warnings,
    }
    emit(figures, json_)
    if str(json_) != "-":
        _print(model, made, measured)
    if plot is not None:
        _plot(model, made, plot)


def _gpu(name: str, **given: float | None) -> Gpu:
    """Return a GPU with the figures that options override."""
    if name not in GPUS:
        raise typer.BadParameter(f"--gpu {name} is unknown; use {', '.join(GPUS)}")
    gpu = GPUS[name]
    own: dict[str, Any] = {name: figure for name, figure in given.items() if figure is not None}
    for field, figure in own.items():
        if not (math.isfinite(figure) and figure > 0):
            option, example = _GPU_OPTIONS[field], getattr(gpu, field)
            raise typer.BadParameter(f"{option} {figure:g} is no GPU's; use such as {example:g}")
    return replace(gpu, **own)


def _certificate_here(gpu: str, fields: Mapping[str, Any]) -> Certificate | None:
    """Return what kernels were certified for the model, if this machine has the planned GPU."""
    of_text, names = fields.get("text_config") or fields, SIZES_V41 if is_v41(fields) else SIZES
    if known_gpu() is not GPUS[gpu] or any(of_text.get(name) is None for name in names):
        return None
    return certificate.fastest_on_disk(SimpleNamespace(**of_text))


def _print(model: str, made: Plan, measured: Certificate | None) -> None:
    """Print the tables, their legends, and what is poor."""
    console, request = Console(), made.request

    def legend(text: str) -> None:
        console.print(text, markup=False)

    rows_of = f"{request.batch} row{'s' if request.batch > 1 else ''}"
    legend(
        f"{model}: {rows_of} of {request.seq_len:,} tokens, {request.ranks} {request.gpu.name} of "
        f"{request.gpu.memory:g} GiB; {request.transport} against AutoModel's own path; "
        "GiB of one rank"
    )
    console.print(_memory(made))
    v41 = isinstance(request.sizes, ModelSizesV41)
    carried = ", and what other layers hand on" if v41 else ""
    legend(
        "recv: received in a step, all layers, forward and backward. attn: peak of the worst "
        f"layer's attention{carried}. need: attn, one checkpointed input per layer, and --reserved "
        f"{request.reserved:g}."
    )
    console.print(_time(made))
    legend(
        "last / first, largest / mean: multiply-adds of the ranks. moved: what balance adds to "
        f"recv. step and tokens: with balance {request.balance} "
        f"{'and overlap' if request.overlap else 'without overlap'}; *: the fastest that fits."
    )
    detailed = next((row for row in made.rows if row.cp_size == made.fastest), made.rows[-1])
    console.print(_layers(detailed))
    if v41:
        legend(_of_v41(detailed))
    legend(_assumed(request.gpu))
    if measured is not None:
        legend(f"The rate of attention and index scores was measured here, of {measured.kernels}.")
    if made.smallest is None:
        console.print(
            "No cp_size up to --ranks fits: use more ranks, shorter or fewer rows, or a smaller "
            "--reserved.",
            style="bold red",
        )
    else:
        console.print(f"Smallest cp_size that fits: {made.smallest}", style="bold green")
        console.print(f"Fastest cp_size that fits: {made.fastest}", style="bold green")
    for warning in made.warnings:
        console.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False)


def _table(headers: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    return table


def _memory(made: Plan) -> Table:
    transport = made.request.transport
    headers = ["cp\nsize", "shard\ntokens", "pad\n%"]
    headers += [f"recv\n{_IN_HEADERS.get(path, path)}" for path in PATHS]
    headers += [f"attn\n{_IN_HEADERS.get(path, path)}" for path in (transport, AUTOMODEL)]
    table = _table([*headers, "need", "fits"])
    for row in made.rows:
        table.add_row(
            str(row.cp_size),
            f"{row.shard_len:,}",
            f"{row.padding * 100:.1f}",
            *(_gib(row.of(path).received_bytes) for path in PATHS),
            *(_gib(row.of(path).attention_bytes) for path in (transport, AUTOMODEL)),
            _gib(row.needed_bytes),
            "yes" if row.fits else "no",
            style="bold" if row.cp_size == made.smallest else None,
        )
    return table


def _time(made: Plan) -> Table:
    moving = made.rows[0].moving.balance
    headers = ["cp\nsize", "last /\nfirst\noff", moving, "largest\n/ mean\noff", moving]
    headers += ["moved\nGiB", "at\nratios", "step\ns\noff", moving, "tokens\nper second "]
    table = _table(headers)
    for row in made.rows:
        sharings = (row.staying, row.moving)
        seconds = (each.step.seconds(overlap=made.request.overlap) for each in sharings)
        table.add_row(
            str(row.cp_size),
            *(f"{each.last_over_first:.2f}" for each in sharings),
            *(f"{each.largest_over_mean:.2f}" for each in sharings),
            _gib(row.moving.moved_bytes),
            ", ".join(map(str, row.moving.moved_ratios)) or "-",
            *map(_figure, seconds),
            f"{row.tokens_a_second:,.0f}{'*' if row.cp_size == made.fastest else ' '}",
            style="bold" if row.cp_size in (made.smallest, made.fastest) else None,
        )
    return table


def _layers(row: Row) -> Table:
    named = any(each.name != str(each.ratio) for each in row.staying.step.layers)
    headers = [f"cp_size {row.cp_size}\n{'kind' if named else 'ratio'}", "layers"]
    for sharing in (row.staying, row.moving):
        headers += [f"balance {sharing.balance}\ncomputes", "waits", "without\noverlap"]
    table = _table(headers)
    steps = (row.staying.step, row.moving.step)
    for each in zip(*(step.layers for step in steps), strict=True):
        table.add_row(each[0].name, str(each[0].layers), *_milliseconds(each, digits=1))
    table.add_row("step", "", *_milliseconds(steps, digits=0))
    return table


_KINDS = {
    "source": "makes entries and selects",
    "select": "selects",
    "inside": "selects inside candidates",
    "reuse": "attends to what another selected",
}
"""What kinds of V4.1's layers do."""


def _of_v41(row: Row) -> str:
    """Return what the kinds of layers are, and what balancing does."""
    moved = ", ".join(map(str, row.moving.moved_layers))
    does = "moves nothing"
    if moved:
        does = (
            f"lets other ranks select the entries for half of each rank's queries in layers {moved}"
        )
    kinds = {each.name.split()[-1] for each in row.moving.step.layers}
    named = "".join(f"; {kind}: {what}" for kind, what in _KINDS.items() if kind in kinds)
    return (
        f"kind: the compress ratio{named}. step: with the head and the Engram layers. balance "
        f"{row.moving.balance} {does}; attention stays."
    )


def _milliseconds(times: Sequence[Time], *, digits: int) -> list[str]:
    return [
        f"{seconds * 1e3:,.{digits}f}"
        for time in times
        for seconds in (time.computing, time.exposed, time.communicating)
    ]


def _assumed(gpu: Gpu) -> str:
    links = (
        f"{gpu.nvlink_gbs * LINK_SHARE:.0f} GB/s over NVLink, {gpu.network_gbs * LINK_SHARE:.0f}"
    )
    return (
        "ms of a layer in a step (forward, recomputation, backward): what its busiest rank "
        "computes, and what collectives add. An estimate, by "
        f"{gpu.products_per_second / 1e12:.0f} TFLOP/s of matrix products, "
        f"{gpu.kernels_per_second / 1e12:.0f} of attention and index scores, "
        f"{gpu.float32_per_second / 1e12:.0f} in float32; {links} between nodes. Left out: traffic "
        "of FSDP and of expert parallelism, the optimizer, and memory-bound operations."
    )


def _figure(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _gib(size: int) -> str:
    return _figure(size / GIB)


def _plot(model: str, made: Plan, destination: Path) -> None:
    """Draw memory and bytes of all powers of two against cp_size, log-log."""
    request, rows = made.request, made.every
    sizes = [row.cp_size for row in rows]
    with two_plots(
        destination,
        "peak of the worst layer's attention, GiB",
        "received by one rank in a step, GiB",
        "cp_size",
    ) as (left, right):
        for path in PATHS:
            peaks = [row.of(path).attention_bytes / GIB for row in rows]
            left.plot(sizes, peaks, marker="o", label=path)
            # A single rank receives nothing, which a logarithm cannot show.
            received = [row.of(path).received_bytes / GIB for row in rows if row.cp_size > 1]
            right.plot(sizes[1:], received, marker="o", label=path)
        needed = [row.needed_bytes / GIB for row in rows]
        left.plot(sizes, needed, color="black", ls="--", label=f"{request.transport}, all needed")
        limit = f"{request.gpu.memory:g} GiB of one {request.gpu.name}"
        left.axhline(request.gpu.memory, color="grey", lw=0.8, label=limit)
        for axes in (left, right):
            axes.set_xticks(sizes, [str(size) for size in sizes])
        left.legend(fontsize=7)
        left.figure.suptitle(f"{model}, {request.batch} x {request.seq_len:,} tokens")
