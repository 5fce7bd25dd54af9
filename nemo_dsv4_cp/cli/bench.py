"""``bench``: what a layer takes, by the host's path and every transport, side by side."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.cli.quiet import quiet
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.tools.paths import HOST
from nemo_dsv4_cp.tools.sizes import GIB, MODELS

if TYPE_CHECKING:  # the host takes seconds to import, and every command would wait for it
    from nemo_dsv4_cp.tools.weighing import Weight

app = typer.Typer(no_args_is_help=True, help="Measure one attention layer of one rank.")
console = Console()

GPU_GB = (80, 141)
"""Memory of an H100 and an H200, in GB, drawn into plots."""

SeqLen = Annotated[int, typer.Option(help="Tokens in the whole row.")]
CpSize = Annotated[int, typer.Option(help="Number of CP ranks.", min=1)]
Ratios = Annotated[list[int], typer.Option("--ratio", help="Compress ratio; may be repeated.")]
Workspace = Annotated[int, typer.Option(help="context_parallel.workspace_mib.", min=1)]
KernelsName = Annotated[str, typer.Option("--kernels", help="context_parallel.kernels.")]
Json = Annotated[Path | None, typer.Option("--json", help='Write the figures here; "-" prints.')]
Plot = Annotated[Path | None, typer.Option(help="Draw memory and bytes against length here.")]


def _paths() -> list[str]:
    """The host's path, where the installed release has one (since 0.6), and every transport."""
    with quiet():
        hosted = find_spec("nemo_automodel.components.models.deepseek_v4.cp") is not None
    return [*([HOST] if hosted else []), *plugins.names(plugins.TRANSPORTS)]


def _check(seq_len: int, cp_size: int, ratios: Sequence[int]) -> None:
    for ratio in ratios:
        if ratio not in (0, 4, 128):
            raise typer.BadParameter(f"--ratio {ratio} is none of V4's: use 0, 4 or 128")
    multiple = local_seq_multiple(ratios)
    if seq_len < 1 or seq_len % (cp_size * multiple):
        working = padded_seq_len(max(seq_len, 1), cp_size=cp_size, pad_multiple=multiple)
        raise typer.BadParameter(
            f"--seq-len {seq_len} does not cut into {cp_size} shards of a multiple of {multiple} "
            f"tokens; use {working}"
        )


def _check_outputs(*outputs: Path | None, plot: Path | None = None) -> None:
    """Refuse outputs that could not be written, before minutes of measuring."""
    for output in (*outputs, plot):
        if output is None or str(output) == "-":
            continue
        if not output.parent.is_dir() or output.is_dir():
            raise typer.BadParameter(f"{output} cannot be written; name a file in a directory")
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'nemo-dsv4-cp[plot]'")


def _weigh_all(
    seq_len: int, cp_size: int, ratios: Sequence[int], rank: int, **options: Any
) -> list[Weight]:
    with quiet():
        from nemo_dsv4_cp.tools.layer import Case
        from nemo_dsv4_cp.tools.weighing import weigh

    cases = [
        Case(path, ratio, seq_len, cp_size, rank, **options)
        for ratio in ratios
        for path in _paths()
    ]
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    try:
        with quiet():
            return [weigh(case) for case in track(cases, "Weighing", console=shown, transient=True)]
    except ValueError as error:  # an option that the package refuses
        raise typer.BadParameter(f"{error}") from error


def _emit(table: Table, figures: Any, destination: Path | None) -> None:
    text = json.dumps(figures, indent=2)
    if destination is None or str(destination) != "-":
        console.print(table)
    if destination is not None and str(destination) == "-":
        typer.echo(text)
    elif destination is not None:
        destination.write_text(text)


def _figures(weights: Sequence[Weight]) -> list[dict[str, Any]]:
    return [
        dataclasses.asdict(weight)
        | {
            "forward_bytes_per_token_and_remote_rank": weight.per_token(weight.received_forward),
            "backward_bytes_per_token_and_remote_rank": weight.per_token(weight.received_backward),
        }
        for weight in weights
    ]


def _weight_table(title: str, weights: Sequence[Weight]) -> Table:
    table = Table(title=title)
    for header in ("ratio", "path"):
        table.add_column(header)
    for header in ("received fwd", "received bwd", "peak GiB", "saved GiB"):
        table.add_column(header, justify="right")
    for weight in weights:
        table.add_row(
            str(weight.case.ratio),
            weight.case.path,
            f"{weight.per_token(weight.received_forward):,.1f}",
            f"{weight.per_token(weight.received_backward):,.1f}",
            f"{weight.peak_bytes / GIB:.2f}",
            f"{weight.saved_bytes / GIB:.2f}",
        )
    return table


_WEIGHED = (
    "V4-Flash, bfloat16, {rows} row of {seq_len:,} tokens on {cp_size} ranks, rank {rank}; "
    "received: bytes per local token and remote rank"
)


@app.command("bytes")
def bytes_(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    json_: Json = None,
    plot: Plot = None,
) -> None:
    """Weigh what one layer receives from other ranks, on fake tensors.

    Example: python -m nemo_dsv4_cp bench bytes --seq-len 131072 --cp-size 8
    """
    _check(seq_len, cp_size, ratio)
    _check_outputs(json_, plot=plot)
    # A middle rank has neighbours on both sides: halos arrive, and their gradients return.
    weights = _weigh_all(seq_len, cp_size, ratio, cp_size // 2)
    title = _WEIGHED.format(rows=1, seq_len=seq_len, cp_size=cp_size, rank=cp_size // 2)
    _emit(_weight_table(title, weights), _figures(weights), json_)
    if plot is not None:
        _plot(seq_len // cp_size, ratio, plot)


@app.command()
def memory(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    kernels: KernelsName = AUTO,
    workspace_mib: Workspace = ContextParallelOptions.workspace_mib,
    json_: Json = None,
    plot: Plot = None,
) -> None:
    """Weigh the memory of one layer's forward and backward, and its largest tensors.

    Example: python -m nemo_dsv4_cp bench memory --seq-len 1048576 --cp-size 64 --ratio 4
    """
    _check(seq_len, cp_size, ratio)
    _check_outputs(json_, plot=plot)
    # The last rank sees the most entries.
    options = {"workspace_mib": workspace_mib, "kernels": kernels}
    weights = _weigh_all(seq_len, cp_size, ratio, cp_size - 1, **options)
    title = _WEIGHED.format(rows=1, seq_len=seq_len, cp_size=cp_size, rank=cp_size - 1)
    _emit(_weight_table(title, weights), _figures(weights), json_)
    if json_ is None or str(json_) != "-":
        console.print(_largest_table(weights))
    if plot is not None:
        _plot(seq_len // cp_size, ratio, plot)


@app.command()
def launches(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    kernels: KernelsName = AUTO,
    workspace_mib: Workspace = ContextParallelOptions.workspace_mib,
    json_: Json = None,
) -> None:
    """Count what one layer launches, and the GB of tensors that it reads and writes.

    Example: python -m nemo_dsv4_cp bench launches --seq-len 131072 --cp-size 8 --kernels triton
    """
    _check(seq_len, cp_size, ratio)
    _check_outputs(json_)
    options = {"workspace_mib": workspace_mib, "kernels": kernels}
    # The last rank sees the most entries.
    weights = _weigh_all(seq_len, cp_size, ratio, cp_size - 1, **options)
    table = Table(
        title=f"V4-Flash, bfloat16, a row of {seq_len:,} tokens on {cp_size} ranks, the last rank; "
        f"kernels: {kernels}; GB of tensors read and written"
    )
    for header in ("ratio", "path"):
        table.add_column(header)
    for header in ("launches fwd", "GB fwd", "launches bwd", "GB bwd"):
        table.add_column(header, justify="right")
    for weight in weights:
        parts = (weight.forward, weight.backward)
        figures = [(f"{part.count:,}", f"{part.moved_bytes / 1e9:,.1f}") for part in parts]
        table.add_row(str(weight.case.ratio), weight.case.path, *figures[0], *figures[1])
    _emit(table, _figures(weights), json_)


Models = Annotated[list[str], typer.Option("--model", help="v4_flash or v4_pro; may be repeated.")]
Archs = Annotated[
    list[int], typer.Option("--arch", help="Capability times 10: 80, 90, 100; may be repeated.")
]


@app.command()
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
    _check_outputs(json_)
    for name in model:
        if name not in MODELS:
            raise typer.BadParameter(f"--model {name} is none of {', '.join(MODELS)}")
    with quiet():
        from nemo_dsv4_cp.tools.compiled_kernels import ARCHITECTURES, compile_all
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
    _emit(table, rows, json_)


def _largest_table(weights: Sequence[Weight]) -> Table:
    table = Table(title="The largest tensors at the peak")
    for header in ("ratio", "path", "GiB", "dtype", "shape", "made by"):
        table.add_column(header, justify="right" if header == "GiB" else "left")
    for weight in weights:
        for tensor in weight.largest:
            table.add_row(
                str(weight.case.ratio),
                weight.case.path,
                f"{tensor.bytes / GIB:.2f}",
                tensor.dtype,
                " x ".join(map(str, tensor.shape)),
                tensor.operation,
            )
    return table


@app.command("time")
def time_(
    seq_len: SeqLen = 8192,
    cp_size: CpSize = 2,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    kernels: KernelsName = AUTO,
    repeats: Annotated[int, typer.Option(help="Measurements of each path.", min=1)] = 5,
    json_: Json = None,
) -> None:
    """Time forward and backward: gloo ranks on the CPU, or one rank on a GPU if there is one.

    Example: python -m nemo_dsv4_cp bench time --seq-len 8192 --cp-size 2 --repeats 5
    """
    _check(seq_len, cp_size, ratio)
    _check_outputs(json_)
    with quiet():
        from nemo_dsv4_cp.tools.local_ranks import RankFailed
        from nemo_dsv4_cp.tools.timing import (
            CPU_SIZES,
            describe_machine,
            host_kernels,
            time_gloo_ranks,
            time_one_gpu_rank,
        )

    gpu = torch.cuda.is_available()
    measure = time_one_gpu_rank if gpu else time_gloo_ranks
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    try:
        with quiet():
            timings = [
                timing
                for each in track(ratio, "Timing", console=shown, transient=True)
                for timing in measure(_paths(), each, seq_len, cp_size, repeats, kernels)
            ]
    except ValueError as error:  # an option that the package refuses
        raise typer.BadParameter(f"{error}") from error
    except RankFailed as error:
        failed = Console(stderr=True)
        failed.print(f"{error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    what = (
        "V4-Flash sizes, bfloat16, the last rank alone (collectives cost nothing), host attn: "
        + host_kernels()
        if gpu
        else f"hidden {CPU_SIZES['hidden_size']}, float32, gloo ranks of one thread each"
    )
    table = Table(
        title=f"{seq_len:,} tokens on {cp_size} ranks, {what}; kernels: {kernels}; "
        f"median of {repeats}, in turn; {describe_machine()}"
    )
    for header in ("ratio", "path"):
        table.add_column(header)
    for header in ("seconds", "host / path", "peak GiB"):
        table.add_column(header, justify="right")
    host = {t.case.ratio: t.median for t in timings if t.case.path == HOST}
    for timing in timings:
        peak = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / GIB:.2f}"
        times = f"{host[timing.case.ratio] / timing.median:.2f}x"
        table.add_row(str(timing.case.ratio), timing.case.path, f"{timing.median:.3f}", times, peak)
    figures = [dataclasses.asdict(t) | {"median": t.median} for t in timings]
    _emit(table, {"machine": describe_machine(), "timings": figures}, json_)


@app.command()
def operations(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    workspace_mib: Workspace = ContextParallelOptions.workspace_mib,
    repeats: Annotated[int, typer.Option(help="Measurements of each operation.", min=1)] = 5,
    json_: Json = None,
) -> None:
    """Time each Triton operation of a layer alone, on this GPU, with TFLOP/s and share of its peak.

    Example: python -m nemo_dsv4_cp bench operations --seq-len 131072 --cp-size 8 --ratio 4
    """
    _check(seq_len, cp_size, ratio)
    _check_outputs(json_)
    with quiet():
        from nemo_dsv4_cp.tools.operation_timing import peak_tflops, time_operations
        from nemo_dsv4_cp.tools.sizes import read_model_fields
        from nemo_dsv4_cp.tools.timing import describe_machine
    try:
        times = [
            each
            for of_layer in ratio
            for each in time_operations(
                read_model_fields("v4_flash"), of_layer, seq_len, cp_size,
                dtype=torch.bfloat16, workspace_bytes=workspace_mib << 20, repeats=repeats,
            )
        ]  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(f"{error}") from error
    peak = peak_tflops()
    table = Table(
        title=f"V4-Flash, bfloat16, a row of {seq_len:,} tokens on {cp_size} ranks, the last rank; "
        f"median of {repeats}; {describe_machine()}"
    )
    for header in ("ratio", "operation"):
        table.add_column(header)
    for header in ("ms", "TFLOP/s", "of peak"):
        table.add_column(header, justify="right")
    for each in times:
        share = f"{each.tflops / peak:.0%}" if peak and each.flops else "-"
        speed = f"{each.tflops:,.1f}" if each.flops else "-"
        table.add_row(str(each.ratio), each.operation, f"{each.seconds * 1e3:,.3f}", speed, share)
    figures = [dataclasses.asdict(t) | {"tflops": t.tflops} for t in times]
    machine = {"machine": describe_machine(), "peak_tflops": peak, "operations": figures}
    _emit(table, machine, json_)


def _plot(shard: int, ratios: Sequence[int], destination: Path) -> None:
    """Draw memory and bytes against the row's length at one shard length, log-log."""
    import matplotlib  # an extra that only plots need

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [2**power for power in range(1, 7)]
    weights = [w for size in sizes for w in _weigh_all(shard * size, size, ratios, size - 1)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    colours = {path: f"C{place}" for place, path in enumerate(_paths())}
    styles = dict(zip(ratios, ("-", "--", ":"), strict=False))
    for path in _paths():
        for ratio in ratios:
            mine = [w for w in weights if (w.case.path, w.case.ratio) == (path, ratio)]
            lengths = [w.case.seq_len for w in mine]
            label, style = f"{path}, ratio {ratio}", {"color": colours[path], "ls": styles[ratio]}
            left.plot(lengths, [w.peak_bytes / 1e9 for w in mine], label=label, **style)
            right.plot(lengths, [w.received_forward / 1e9 for w in mine], label=label, **style)
    for capacity in GPU_GB:
        left.axhline(capacity, color="grey", lw=0.8)
        left.text(shard * 2, capacity * 1.05, f"{capacity} GB", color="grey")
    left.set_ylabel("peak of one layer's forward and backward, GB")
    right.set_ylabel("received by one rank in one layer's forward, GB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"tokens in the row ({shard:,} on each rank)")
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(destination, dpi=150)
    Console(stderr=True).print(f"Drawn: {destination}")
