# SPDX-License-Identifier: Apache-2.0
"""``bench bytes``, ``memory``, ``launches``, ``work``: weighed on fake tensors, without a GPU."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_dsv4_cp.cli.bench_options import (
    Balance,
    CpSize,
    Json,
    KernelsName,
    Plot,
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
from nemo_dsv4_cp.tools.inventory import BOUNDARY
from nemo_dsv4_cp.tools.sizes import GIB

if TYPE_CHECKING:  # AutoModel takes seconds to import, and every command would wait for it
    from nemo_dsv4_cp.bench.profiling import Weight

GPU_GB = (80, 141)
"""Memory of an H100 and an H200, in GB, drawn into plots."""


def _weigh_all(
    seq_len: int, cp_size: int, ratios: Sequence[int], rank: int, **options: Any
) -> list[Weight]:
    with quiet():
        from nemo_dsv4_cp.bench.layer import Case
        from nemo_dsv4_cp.bench.profiling import weigh

    cases = [
        Case(path, ratio, seq_len, cp_size, rank, **options) for ratio in ratios for path in paths()
    ]
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    try:
        with quiet():
            return [weigh(case) for case in track(cases, "Weighing", console=shown, transient=True)]
    except ValueError as error:  # an option that the package refuses
        raise typer.BadParameter(f"{error}") from error


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
    "V4-Flash, bfloat16, a row of {seq_len:,} tokens on {cp_size} ranks, rank {rank}; "
    "balance: {balance}; received: bytes per local token and remote rank"
)


def bytes_(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    balance: Balance = AUTO,
    json_: Json = None,
    plot: Plot = None,
) -> None:
    """Weigh what one layer receives from other ranks, on fake tensors.

    Example: python -m nemo_dsv4_cp bench bytes --seq-len 131072 --cp-size 8
    """
    check(seq_len, cp_size, ratio)
    check_outputs(json_, plot=plot)
    # A middle rank has neighbours on both sides: halos arrive, and their gradients return.
    weights = _weigh_all(seq_len, cp_size, ratio, cp_size // 2, balance=balance)
    title = _WEIGHED.format(seq_len=seq_len, cp_size=cp_size, rank=cp_size // 2, balance=balance)
    emit(_weight_table(title, weights), _figures(weights), json_)
    if plot is not None:
        _plot(seq_len // cp_size, ratio, plot)


def memory(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    kernels: KernelsName = AUTO,
    balance: Balance = AUTO,
    workspace_mib: Workspace = ContextParallelOptions.workspace_mib,
    json_: Json = None,
    plot: Plot = None,
) -> None:
    """Weigh the memory of one layer's forward and backward, and its largest tensors.

    Example: python -m nemo_dsv4_cp bench memory --seq-len 1048576 --cp-size 64 --ratio 4
    """
    check(seq_len, cp_size, ratio)
    check_outputs(json_, plot=plot)
    # The last rank sees the most entries.
    options = {"workspace_mib": workspace_mib, "kernels": kernels, "balance": balance}
    weights = _weigh_all(seq_len, cp_size, ratio, cp_size - 1, **options)
    title = _WEIGHED.format(seq_len=seq_len, cp_size=cp_size, rank=cp_size - 1, balance=balance)
    emit(_weight_table(title, weights), _figures(weights), json_)
    if json_ is None or str(json_) != "-":
        console.print(_largest_table(weights))
    if plot is not None:
        _plot(seq_len // cp_size, ratio, plot)


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


def launches(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [0, 4, 128],  # noqa: B006
    kernels: KernelsName = AUTO,
    balance: Balance = AUTO,
    workspace_mib: Workspace = ContextParallelOptions.workspace_mib,
    json_: Json = None,
) -> None:
    """Count what one layer launches, and the GB of tensors that it reads and writes.

    Example: python -m nemo_dsv4_cp bench launches --seq-len 131072 --cp-size 8 --kernels triton
    """
    check(seq_len, cp_size, ratio)
    check_outputs(json_)
    options = {"workspace_mib": workspace_mib, "kernels": kernels, "balance": balance}
    # The last rank sees the most entries.
    weights = _weigh_all(seq_len, cp_size, ratio, cp_size - 1, **options)
    table = Table(
        title=f"V4-Flash, bfloat16, a row of {seq_len:,} tokens on {cp_size} ranks, the last rank; "
        f"kernels: {kernels}; balance: {balance}; GB of tensors read and written"
    )
    for header in ("ratio", "path"):
        table.add_column(header)
    for header in ("launches fwd", "GB fwd", "launches bwd", "GB bwd"):
        table.add_column(header, justify="right")
    for weight in weights:
        parts = (weight.forward, weight.backward)
        figures = [(f"{part.count:,}", f"{part.moved_bytes / 1e9:,.1f}") for part in parts]
        table.add_row(str(weight.case.ratio), weight.case.path, *figures[0], *figures[1])
    emit(table, _figures(weights), json_)


Shortest = Annotated[
    int | None, typer.Option(help="Pack documents of at least this many tokens, drawn.", min=1)
]


def work(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    ratio: Ratios = [4, 128],  # noqa: B006
    shortest: Shortest = None,
    longest: Annotated[int, typer.Option(help="And of at most this many.", min=1)] = 200_000,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    json_: Json = None,
) -> None:
    """Count what each rank's layer computes, with balance and without, on fake tensors.

    Products of V4-Flash's Triton path in TFLOP; what the causal view hides does not count.

    Example: python -m nemo_dsv4_cp bench work --seq-len 1048576 --cp-size 64 --shortest 1000
    """
    check(seq_len, cp_size, ratio)
    check_outputs(json_)
    if shortest is not None and shortest > longest:
        raise typer.BadParameter(f"--shortest {shortest} is more than --longest {longest}")
    with quiet():
        from nemo_dsv4_cp.bench.flops import count, draw_documents
        from nemo_dsv4_cp.bench.layer import Case

    documents = () if shortest is None else draw_documents(seq_len, shortest, longest, seed)
    layers = [(each, balance) for each in ratio for balance in ("off", "on")]
    shown = console if sys.stdout.isatty() else Console(stderr=True)
    counted = []
    for each, balance in track(layers, "Counting", console=shown, transient=True):
        with quiet():
            ranks = [
                count(
                    Case(
                        BOUNDARY,
                        each,
                        seq_len,
                        cp_size,
                        rank,
                        kernels="triton",
                        balance=balance,
                        documents=documents,
                    )
                )
                for rank in range(cp_size)
            ]
        counted.append(ranks)
    holding = f"{len(documents)} documents" if documents else "one document"
    table = Table(
        title=f"V4-Flash, a row of {seq_len:,} tokens, {holding}, on {cp_size} ranks; TFLOP"
    )
    for header in ("ratio", "balance", "pass"):
        table.add_column(header)
    for header in ("least", "mean", "largest", "largest / mean", "last / first"):
        table.add_column(header, justify="right")
    figures = []
    for (each, balance), ranks in zip(layers, counted, strict=True):
        for direction in ("forward", "backward"):
            flops = [getattr(rank, direction) for rank in ranks]
            mean = sum(flops) / len(flops)
            over = {"largest_over_mean": max(flops) / mean, "last_over_first": flops[-1] / flops[0]}
            shown_flops = [f"{n / 1e12:,.2f}" for n in (min(flops), mean, max(flops))]
            shown_over = [f"{n:.3f}" for n in over.values()]
            table.add_row(str(each), balance, direction, *shown_flops, *shown_over)
            named = {"ratio": each, "balance": balance, "pass": direction}
            figures.append(named | {"flops": flops} | over)
    emit(table, figures, json_)


def _plot(shard: int, ratios: Sequence[int], destination: Path) -> None:
    """Draw memory and bytes against the row's length at one shard length, log-log."""
    import matplotlib  # an extra that only plots need

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [2**power for power in range(1, 7)]
    weights = [w for size in sizes for w in _weigh_all(shard * size, size, ratios, size - 1)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    colours = {path: f"C{place}" for place, path in enumerate(paths())}
    styles = dict(zip(ratios, ("-", "--", ":"), strict=False))
    for path in paths():
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
