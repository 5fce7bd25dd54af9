# SPDX-License-Identifier: Apache-2.0
"""``bench``: one attention layer of one rank, by AutoModel's path and every transport.

``work`` profiles it with fake tensors, without a GPU; ``time``, ``overlap`` and ``operations``
measure this machine. ``bytes``, ``memory`` and ``launches``, and ``kernels``, have files of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer

from nemo_dsv4_cp import plugins
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
from nemo_dsv4_cp.sequence.layout import local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.tools.inventory import AUTOMODEL, BOUNDARY
from nemo_dsv4_cp.tools.sizes import GIB, read_model_fields

app = typer.Typer(no_args_is_help=True, help="Measure one attention layer of one rank.")

SeqLen = Annotated[int, typer.Option(help="Tokens in the whole row.")]
CpSize = Annotated[int, typer.Option(help="Number of CP ranks.", min=1)]
Ratios = Annotated[list[int], typer.Option("--ratio", help="Compress ratio; may be repeated.")]
Workspace = Annotated[
    int | None, typer.Option(help="context_parallel.workspace_mib; auto without it.", min=1)
]
KernelsName = Annotated[str, typer.Option("--kernels", help="context_parallel.kernels.")]
Balance = Annotated[str, typer.Option(help="context_parallel.balance: auto, on or off.")]
Json = Annotated[Path | None, typer.Option("--json", help='Write the figures here; "-" prints.')]


def installed_paths() -> list[str]:
    """AutoModel's path, where the installed release has one (since 0.6), and every transport."""
    with quiet():
        has_cp = find_spec("nemo_automodel.components.models.deepseek_v4.cp") is not None
    return [*([AUTOMODEL] if has_cp else []), *plugins.names(plugins.TRANSPORTS)]


def check(seq_len: int, cp_size: int, ratios: Sequence[int], **outputs: Path | None) -> None:
    """Refuse ratios that are none of V4's, rows that do not cut evenly, and outputs."""
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
    check_outputs(**outputs)


def _title(seq_len: int, cp_size: int, rest: str) -> str:
    return f"V4-Flash, bfloat16, a row of {seq_len:,} tokens on {cp_size} ranks, {rest}"


@app.command()
def work(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [4, 128],  # noqa: B006
    shortest: Annotated[
        int | None, typer.Option(help="Pack documents of at least this many tokens, drawn.", min=1)
    ] = None,
    longest: Annotated[int, typer.Option(help="And of at most this many.", min=1)] = 200_000,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    json_: Json = None,
) -> None:
    """Count what each rank's layer computes, with balance and without, on fake tensors.

    Products of V4-Flash's Triton path in TFLOP; what the causal view hides does not count.

    Example: nemo-dsv4-cp bench work --seq-len 1048576 --cp-size 64 --shortest 1000
    """
    check(seq_len, cp_size, ratio, json_=json_)
    if shortest is not None and shortest > longest:
        raise typer.BadParameter(f"--shortest {shortest} is more than --longest {longest}")
    with running():
        from nemo_dsv4_cp.bench.layer import Case
        from nemo_dsv4_cp.bench.profiling import count_flops, draw_documents

        documents = () if shortest is None else draw_documents(seq_len, shortest, longest, seed)
        layers = [(each, balance) for each in ratio for balance in ("off", "on")]
        figures = []
        for each, balance in progress(layers, "Counting"):
            options: dict[str, Any] = {
                "kernels": "triton",
                "balance": balance,
                "documents": documents,
            }
            ranks = [
                count_flops(Case(BOUNDARY, each, seq_len, cp_size, rank, **options))
                for rank in range(cp_size)
            ]
            for step, flops in zip(("forward", "backward"), zip(*ranks, strict=True), strict=True):
                over = {"largest_over_mean": max(flops) * cp_size / sum(flops)}
                over["last_over_first"] = flops[-1] / flops[0]
                layer = {"ratio": each, "balance": balance, "pass": step, "flops": list(flops)}
                figures.append(layer | over)
    holds = f"{len(documents)} documents" if documents else "one document"
    title = f"V4-Flash, a row of {seq_len:,} tokens, {holds}, on {cp_size} ranks; TFLOP"
    columns = {
        "ratio": lambda row: row["ratio"],
        "balance": lambda row: row["balance"],
        "pass": lambda row: row["pass"],
        "least": lambda row: f"{min(row['flops']) / 1e12:,.2f}",
        "mean": lambda row: f"{sum(row['flops']) / cp_size / 1e12:,.2f}",
        "largest": lambda row: f"{max(row['flops']) / 1e12:,.2f}",
        "largest / mean": lambda row: f"{row['largest_over_mean']:.3f}",
        "last / first": lambda row: f"{row['last_over_first']:.3f}",
    }
    emit(figures, json_, table(title, figures, columns))


@app.command("time")
def time_(
    seq_len: SeqLen = 8192,
    cp_size: CpSize = 2,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    kernels: KernelsName = AUTO,
    balance: Balance = AUTO,
    repeats: Annotated[int, typer.Option(help="Measurements of each path.", min=1)] = 5,
    json_: Json = None,
) -> None:
    """Time forward and backward: gloo ranks on the CPU, or one rank on a GPU if there is one.

    Example: nemo-dsv4-cp bench time --seq-len 8192 --cp-size 2 --repeats 5
    """
    check(seq_len, cp_size, ratio, json_=json_)
    gpu = torch.cuda.is_available()
    with running():
        from nemo_dsv4_cp.bench import timing

        measure = timing.time_one_gpu_rank if gpu else timing.time_gloo_ranks
        if gpu and kernels == AUTO:
            kernels = timing.certified_kernels()
        sizes, paths = (seq_len, cp_size, repeats), installed_paths()
        times = [
            each
            for of_layer in progress(ratio, "Timing")
            for each in measure(paths, of_layer, *sizes, kernels=kernels, balance=balance)
        ]
    what = (
        "V4-Flash sizes, bfloat16, the last rank alone (collectives cost nothing), "
        "AutoModel's attn: " + timing.automodel_kernels()
        if gpu
        else f"hidden {timing.CPU_SIZES['hidden_size']}, float32, gloo ranks of one thread each"
    )
    machine = timing.describe_machine()
    title = (
        f"{seq_len:,} tokens on {cp_size} ranks, {what}; kernels: {kernels}; balance: {balance}; "
        f"median of {repeats}, in turn; {machine}"
    )
    automodel = dict.fromkeys(ratio, float("nan"))  # AutoModel 0.5 has no path to compare with
    automodel |= {t.case.ratio: t.median for t in times if t.case.path == AUTOMODEL}
    columns = {
        "ratio": lambda each: each.case.ratio,
        "path": lambda each: each.case.path,
        "seconds": lambda each: f"{each.median:.3f}",
        "AutoModel / path": lambda each: f"{automodel[each.case.ratio] / each.median:.2f}x",
        "peak GiB": lambda each: f"{each.peak_bytes / GIB:.2f}" if each.peak_bytes else "-",
    }
    figures = [asdict(each) | {"median": each.median} for each in times]
    emit({"machine": machine, "timings": figures}, json_, table(title, times, columns))


@app.command()
def overlap(
    seq_len: SeqLen = 8192,
    ratio: Ratios = [4],  # noqa: B006
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
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    workspace_mib: Workspace = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each operation.", min=1)] = 5,
    json_: Json = None,
) -> None:
    """Time each Triton operation of a layer alone, on this GPU, with TFLOP/s and share of its peak.

    Example: nemo-dsv4-cp bench operations --seq-len 131072 --cp-size 8 --ratio 4
    """
    check(seq_len, cp_size, ratio, json_=json_)
    require_gpu("bench operations", "To model the times without one: nemo-dsv4-cp bench kernels")
    with running():
        from nemo_dsv4_cp.bench.timing import describe_machine
        from nemo_dsv4_cp.checks.operation_timing import peak_tflops, time_operations
        from nemo_dsv4_cp.kernels.triton import TritonKernels

        workspace = None if workspace_mib is None else workspace_mib << 20
        kernels = TritonKernels(workspace_bytes=workspace)
        sizes = SimpleNamespace(**read_model_fields("v4_flash"))
        times = [
            each
            for of_layer in ratio
            for each in time_operations(
                kernels, sizes, of_layer, seq_len, cp_size, dtype=torch.bfloat16, repeats=repeats
            )
        ]
    machine, peak = describe_machine(), peak_tflops()
    title = _title(seq_len, cp_size, f"the last rank; median of {repeats}; {machine}")
    columns = {
        "ratio": lambda each: each.ratio,
        "operation": lambda each: each.operation,
        "ms": lambda each: f"{each.seconds * 1e3:,.3f}",
        "TFLOP/s": lambda each: f"{each.tflops:,.1f}" if each.flops else "-",
        "of peak": lambda each: f"{each.tflops / peak:.0%}" if peak and each.flops else "-",
    }
    figures = [asdict(each) | {"tflops": each.tflops} for each in times]
    written = {"machine": machine, "peak_tflops": peak, "operations": figures}
    emit(written, json_, table(title, times, columns))
