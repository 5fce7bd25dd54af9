# SPDX-License-Identifier: Apache-2.0
"""``bench``: one attention layer of one rank, by AutoModel's path and every transport.

``work`` profiles it with fake tensors, without a GPU; ``time``, ``overlap`` and ``operations``
measure this machine. ``bytes``, ``memory`` and ``launches``, and ``kernels``, have files of their
own.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from nemo_dsv4_cp.checks.model_layers import selects
from nemo_dsv4_cp.cli.bench_models import (
    NAMES,
    Columns,
    Layers,
    Model,
    Ratios,
    cases,
    check,
    installed_paths,
    layer_columns,
    title,
    wanted,
)
from nemo_dsv4_cp.cli.output import (
    check_outputs,
    emit,
    progress,
    quiet,
    require_gpu,
    running,
    table,
)
from nemo_dsv4_cp.options import AUTO
from nemo_dsv4_cp.tools.crossings import AUTOMODEL, BOUNDARY
from nemo_dsv4_cp.tools.sizes import GIB, V41_FLASH, read_model_fields

if TYPE_CHECKING:  # AutoModel takes seconds to import, and every command would wait for it
    from nemo_dsv4_cp.bench.timing import Timing

app = typer.Typer(no_args_is_help=True, help="Measure one attention layer of one rank.")

SeqLen = Annotated[int, typer.Option(help="Tokens in the whole row.")]
CpSize = Annotated[int, typer.Option(help="Number of CP ranks.", min=1)]
Workspace = Annotated[
    int | None, typer.Option(help="context_parallel.workspace_mib; auto without it.", min=1)
]
KernelsName = Annotated[str, typer.Option("--kernels", help="context_parallel.kernels.")]
Balance = Annotated[str, typer.Option(help="context_parallel.balance: auto, on or off.")]
Json = Annotated[Path | None, typer.Option("--json", help='Write the figures here; "-" prints.')]


@app.command()
def work(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    model: Model = "v4_flash",
    ratio: Ratios = None,
    layer: Layers = None,
    shortest: Annotated[
        int | None, typer.Option(help="Pack documents of at least this many tokens, drawn.", min=1)
    ] = None,
    longest: Annotated[int, typer.Option(help="And of at most this many.", min=1)] = 200_000,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    json_: Json = None,
) -> None:
    """Count what each rank's layer computes, with balance and without, on fake tensors.

    Products of the Triton path in TFLOP; what the causal view hides does not count. Without --ratio
    and --layer: V4-Flash's ratios 4 and 128, or V4.1-Flash's layers 2 and 20.

    Example: nemo-dsv4-cp bench work --seq-len 1048576 --cp-size 64 --shortest 1000
    """
    numbers = wanted(model, ratio, layer, ratios=(4, 128), layers=(2, 20))
    check_outputs(json_=json_)
    if shortest is not None and shortest > longest:
        raise typer.BadParameter(f"--shortest {shortest} is more than --longest {longest}")
    with running(mistakes=(ValueError, ImportError)):
        from nemo_dsv4_cp.bench.profiling import count_flops, draw_documents

        documents = () if shortest is None else draw_documents(seq_len, shortest, longest, seed)
        options: dict[str, Any] = {"kernels": "triton", "documents": documents}
        layers = [
            [
                cases(model, [BOUNDARY], [each], seq_len, cp_size, rank, balance=balance, **options)
                for rank in range(cp_size)
            ]
            for each in numbers
            for balance in ("off", "on")
        ]
        figures = []
        for of_ranks in progress(layers, "Counting"):
            ((case, *_), *_) = of_ranks
            ranks = [count_flops(each) for (each,) in of_ranks]
            for step, flops in zip(("forward", "backward"), zip(*ranks, strict=True), strict=True):
                over = {"largest_over_mean": max(flops) * cp_size / sum(flops)}
                over["last_over_first"] = flops[-1] / flops[0]
                row = {"ratio": case.ratio, "balance": case.balance, "pass": step}
                number = {} if case.layer is None else {"layer": case.layer}
                figures.append(number | row | {"flops": list(flops)} | over)
    holds = f"{len(documents)} documents" if documents else "one document"
    shown = f"{NAMES[model]}, a row of {seq_len:,} tokens, {holds}, on {cp_size} ranks; TFLOP"
    kind = "layer" if model == V41_FLASH else "ratio"
    columns: Columns = {
        kind: itemgetter(kind),
        "balance": itemgetter("balance"),
        "pass": itemgetter("pass"),
        "least": lambda row: f"{min(row['flops']) / 1e12:,.2f}",
        "mean": lambda row: f"{sum(row['flops']) / cp_size / 1e12:,.2f}",
        "largest": lambda row: f"{max(row['flops']) / 1e12:,.2f}",
        "largest / mean": lambda row: f"{row['largest_over_mean']:.3f}",
        "last / first": lambda row: f"{row['last_over_first']:.3f}",
    }
    emit(figures, json_, table(shown, figures, columns))


@app.command("time")
def time_(
    seq_len: SeqLen = 8192,
    cp_size: CpSize = 2,
    model: Model = "v4_flash",
    ratio: Ratios = None,
    layer: Layers = None,
    kernels: KernelsName = AUTO,
    balance: Balance = AUTO,
    repeats: Annotated[int, typer.Option(help="Measurements of each path.", min=1)] = 5,
    json_: Json = None,
) -> None:
    """Time forward and backward: gloo ranks on the CPU, or one rank on a GPU if there is one.

    Example: nemo-dsv4-cp bench time --seq-len 8192 --cp-size 2 --repeats 5
    """
    numbers = wanted(model, ratio, layer)
    check_outputs(json_=json_)
    gpu = torch.cuda.is_available()
    if gpu and model == V41_FLASH:
        if balance == "on":
            raise typer.BadParameter(
                "--balance on: the one rank on a GPU has no others to select for its queries of "
                "V4.1; use off"
            )
        balance = "off"  # what others would return is memory as it was, and no index
    with running(mistakes=(ValueError, ImportError)):
        from nemo_dsv4_cp.bench import timing

        measure = timing.time_one_gpu_rank if gpu else timing.time_gloo_ranks
        if gpu and kernels == AUTO:
            kernels = timing.certified_kernels(model)
        options = {"kernels": kernels, "balance": balance}
        layers = [
            cases(model, installed_paths(), [each], seq_len, cp_size, cp_size - 1, **options)
            for each in numbers
        ]
        times = [
            each for of_layer in progress(layers, "Timing") for each in measure(of_layer, repeats)
        ]
    what = (
        f"{NAMES[model]} sizes, bfloat16, the last rank alone (collectives cost nothing), "
        "AutoModel's attn: " + timing.automodel_kernels()
        if gpu
        else f"hidden {timing.CPU_SIZES['hidden_size']}, float32, gloo ranks of one thread each"
    )
    machine = timing.describe_machine()
    shown = (
        f"{seq_len:,} tokens on {cp_size} ranks, {what}; kernels: {kernels}; balance: {balance}; "
        f"median of {repeats}, in turn; {machine}"
    )

    def speedup(each: Timing) -> float:
        """AutoModel's time as a multiple; AutoModel 0.5 has no path to compare with."""
        case = replace(each.case, path=AUTOMODEL)
        return next((t.median for t in times if t.case == case), float("nan")) / each.median

    columns = {
        **layer_columns(model),
        "path": lambda each: each.case.path,
        "seconds": lambda each: f"{each.median:.3f}",
        "AutoModel / path": lambda each: f"{speedup(each):.2f}x",
        "peak GiB": lambda each: f"{each.peak_bytes / GIB:.2f}" if each.peak_bytes else "-",
    }
    figures = [asdict(each) | {"median": each.median} for each in times]
    emit({"machine": machine, "timings": figures}, json_, table(shown, times, columns))


@app.command()
def overlap(
    seq_len: SeqLen = 8192,
    ratio: Annotated[
        list[int], typer.Option("--ratio", help="Compress ratio; may be repeated.")
    ] = [4],  # noqa: B006
    delay: Annotated[float, typer.Option(help="Seconds that a collective takes longer.")] = 0.2,
    repeats: Annotated[int, typer.Option(help="Measurements of each.", min=1)] = 3,
    json_: Json = None,
) -> None:
    """Measure how much of delayed collectives overlaps with compute, on two gloo ranks of this CPU.

    Example: nemo-dsv4-cp bench overlap --delay 0.2
    """
    with quiet():
        from nemo_dsv4_cp.bench.overlap import RANKS, SIZES, measure
        from nemo_dsv4_cp.bench.timing import describe_machine
    check(seq_len, RANKS, ratio, json_=json_)
    if not delay > 0:
        raise typer.BadParameter(f"--delay {delay} slows nothing; use seconds, such as 0.2")
    layers = [
        (each, balance) for each in ratio for balance in (("off", "on") if each else ("off",))
    ]
    with running():
        passes = [
            each
            for layer in progress(layers, "Timing")
            for each in measure(*layer, seq_len=seq_len, delay=delay, repeats=repeats)
        ]
    machine = describe_machine()
    title = (
        f"{seq_len:,} tokens on {RANKS} gloo ranks of one thread each, hidden "
        f"{SIZES['hidden_size']}, float32; each collective {delay:g} s longer; least of "
        f"{repeats}, in turn, waited: median; {machine}"
    )
    columns = {
        "ratio": lambda each: each.ratio,
        "balance": lambda each: each.balance,
        "overlap": lambda each: str(each.overlap).lower(),
        "pass": lambda each: each.direction,
        "collectives": lambda each: each.collectives,
        "seconds": lambda each: f"{each.seconds:.3f}",
        "slowed": lambda each: f"{each.slowed_seconds:.3f}",
        "waited": lambda each: f"{each.waited:.3f}",
        "hidden": lambda each: f"{each.hidden:.0%}",
    }
    figures = [asdict(each) | {"hidden": each.hidden} for each in passes]
    shown = table(title, passes, columns, collapse_padding=True)
    emit({"machine": machine, "passes": figures}, json_, shown)


@app.command()
def operations(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    model: Model = "v4_flash",
    ratio: Ratios = None,
    layer: Layers = None,
    workspace_mib: Workspace = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each operation.", min=1)] = 5,
    json_: Json = None,
) -> None:
    """Time each Triton operation of a layer alone, on this GPU, with TFLOP/s and share of its peak.

    Example: nemo-dsv4-cp bench operations --seq-len 131072 --cp-size 8 --ratio 4
    """
    numbers = wanted(model, ratio, layer)
    check_outputs(json_=json_)
    require_gpu("bench operations", "To model the times without one: nemo-dsv4-cp bench kernels")
    with running(mistakes=(ValueError, ImportError)):
        from nemo_dsv4_cp.bench.timing import describe_machine
        from nemo_dsv4_cp.checks.operation_timing import peak_tflops, time_operations
        from nemo_dsv4_cp.kernels.triton import TritonKernels

        workspace = None if workspace_mib is None else workspace_mib << 20
        kernels = TritonKernels(workspace_bytes=workspace)
        fields = read_model_fields(model)
        sizes = SimpleNamespace(**fields.get("text_config", fields))
        options: dict[str, Any] = {"dtype": torch.bfloat16, "repeats": repeats}
        times = [
            (case, each)
            for case in cases(model, [BOUNDARY], numbers, seq_len, cp_size, cp_size - 1)
            for each in time_operations(
                kernels,
                sizes,
                case.ratio,
                seq_len,
                cp_size,
                selects=None if case.layer is None else selects(sizes, case.layer),
                **options,
            )
        ]
    machine, peak = describe_machine(), peak_tflops()
    shown = title(model, seq_len, cp_size, f"the last rank; median of {repeats}; {machine}")
    columns = {
        **layer_columns(model, itemgetter(0)),
        "operation": lambda row: row[1].operation,
        "ms": lambda row: f"{row[1].seconds * 1e3:,.3f}",
        "TFLOP/s": lambda row: f"{row[1].tflops:,.1f}" if row[1].flops else "-",
        "of peak": lambda row: f"{row[1].tflops / peak:.0%}" if peak and row[1].flops else "-",
    }
    figures = [
        ({} if case.layer is None else {"layer": case.layer})
        | asdict(each)
        | {"tflops": each.tflops}
        for case, each in times
    ]
    written = {"machine": machine, "peak_tflops": peak, "operations": figures}
    emit(written, json_, table(shown, times, columns))
