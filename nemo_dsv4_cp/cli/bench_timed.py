# SPDX-License-Identifier: Apache-2.0
"""``bench time``, ``overlap`` and ``operations``: measured on this machine."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_dsv4_cp.cli.bench_options import (
    Balance,
    CpSize,
    Json,
    KernelsName,
    Ratios,
    SeqLen,
    Workspace,
    check,
    check_outputs,
    console,
    emit,
    paths,
)
from nemo_dsv4_cp.cli.quiet import quiet
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.tools.inventory import AUTOMODEL
from nemo_dsv4_cp.tools.sizes import GIB


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

    Example: python -m nemo_dsv4_cp bench time --seq-len 8192 --cp-size 2 --repeats 5
    """
    check(seq_len, cp_size, ratio)
    check_outputs(json_)
    with quiet():
        from nemo_dsv4_cp.bench.timing import (
            CPU_SIZES,
            automodel_kernels,
            describe_machine,
            time_gloo_ranks,
            time_one_gpu_rank,
        )
        from nemo_dsv4_cp.tools.local_ranks import RankFailed

    gpu = torch.cuda.is_available()
    measure = time_one_gpu_rank if gpu else time_gloo_ranks
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    try:
        with quiet():
            timings = [
                timing
                for each in track(ratio, "Timing", console=shown, transient=True)
                for timing in measure(
                    paths(), each, seq_len, cp_size, repeats, kernels=kernels, balance=balance
                )
            ]
    except ValueError as error:  # an option that the package refuses
        raise typer.BadParameter(f"{error}") from error
    except RankFailed as error:
        failed = Console(stderr=True)
        failed.print(f"{error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    what = (
        "V4-Flash sizes, bfloat16, the last rank alone (collectives cost nothing), "
        "AutoModel's attn: " + automodel_kernels()
        if gpu
        else f"hidden {CPU_SIZES['hidden_size']}, float32, gloo ranks of one thread each"
    )
    table = Table(
        title=f"{seq_len:,} tokens on {cp_size} ranks, {what}; kernels: {kernels}; "
        f"balance: {balance}; median of {repeats}, in turn; {describe_machine()}"
    )
    for header in ("ratio", "path"):
        table.add_column(header)
    for header in ("seconds", "AutoModel / path", "peak GiB"):
        table.add_column(header, justify="right")
    automodel = {t.case.ratio: t.median for t in timings if t.case.path == AUTOMODEL}
    for timing in timings:
        peak = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / GIB:.2f}"
        times = f"{automodel[timing.case.ratio] / timing.median:.2f}x"
        table.add_row(str(timing.case.ratio), timing.case.path, f"{timing.median:.3f}", times, peak)
    figures = [dataclasses.asdict(t) | {"median": t.median} for t in timings]
    emit(table, {"machine": describe_machine(), "timings": figures}, json_)


def overlap(
    seq_len: SeqLen = 8192,
    ratio: Ratios = [4],  # noqa: B006
    delay: Annotated[float, typer.Option(help="Seconds that a collective takes longer.")] = 0.2,
    repeats: Annotated[int, typer.Option(help="Measurements of each.", min=1)] = 3,
    json_: Json = None,
) -> None:
    """Measure how much of slowed collectives computing hides, on two gloo ranks of this CPU.

    Example: python -m nemo_dsv4_cp bench overlap --delay 0.2
    """
    with quiet():
        from nemo_dsv4_cp.bench.overlap import RANKS, SIZES, measure
        from nemo_dsv4_cp.bench.timing import describe_machine
        from nemo_dsv4_cp.tools.local_ranks import RankFailed
    check(seq_len, RANKS, ratio)
    check_outputs(json_)
    if not delay > 0:
        raise typer.BadParameter(f"--delay {delay} slows nothing; use seconds, such as 0.2")
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    layers = [
        (each, balance) for each in ratio for balance in (("off", "on") if each else ("off",))
    ]
    try:
        with quiet():
            passes = [
                each
                for of_layer, balance in track(layers, "Timing", console=shown, transient=True)
                for each in measure(
                    of_layer, balance, seq_len=seq_len, delay=delay, repeats=repeats
                )
            ]
    except RankFailed as error:
        failed = Console(stderr=True)
        failed.print(f"{error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    table = Table(
        collapse_padding=True,
        title=f"{seq_len:,} tokens on {RANKS} gloo ranks of one thread each, hidden "
        f"{SIZES['hidden_size']}, float32; each collective {delay:g} s longer; least of "
        f"{repeats}, in turn, waited: median; {describe_machine()}",
    )
    for header in ("ratio", "balance", "overlap", "pass"):
        table.add_column(header)
    for header in ("collectives", "seconds", "slowed", "waited", "hidden"):
        table.add_column(header, justify="right")
    for each in passes:
        table.add_row(
            str(each.ratio),
            each.balance,
            str(each.overlap).lower(),
            each.direction,
            str(each.collectives),
            f"{each.seconds:.3f}",
            f"{each.slowed_seconds:.3f}",
            f"{each.waited:.3f}",
            f"{each.hidden:.0%}",
        )
    figures = [dataclasses.asdict(each) | {"hidden": each.hidden} for each in passes]
    emit(table, {"machine": describe_machine(), "passes": figures}, json_)


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
    check(seq_len, cp_size, ratio)
    check_outputs(json_)
    with quiet():
        from nemo_dsv4_cp.bench.operation_timing import peak_tflops, time_operations
        from nemo_dsv4_cp.bench.timing import describe_machine
        from nemo_dsv4_cp.tools.sizes import read_model_fields
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
    emit(table, machine, json_)
