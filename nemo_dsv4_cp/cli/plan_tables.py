# SPDX-License-Identifier: Apache-2.0
"""What ``plan`` prints: memory and bytes of each cp_size, then who computes how much, and time.

Every table fits a terminal of 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nemo_dsv4_cp.gpus import LINK_SHARE, Gpu
from nemo_dsv4_cp.tools.inventory import AUTOMODEL, PATHS
from nemo_dsv4_cp.tools.planning import Request, Row
from nemo_dsv4_cp.tools.sizes import GIB
from nemo_dsv4_cp.tools.step_time import Time

_IN_HEADERS = {"boundary": "boun-\ndary", "all_gather": "all_\ngather", "automodel": "auto-\nmodel"}


def print_plan(
    model: str,
    request: Request,
    rows: Sequence[Row],
    *,
    smallest: int | None,
    fastest: int | None,
    warnings: Sequence[str],
) -> None:
    """Print the tables, what they say, and what is poor.

    Args:
        model: As the user named it.
        request: What the plan is made for.
        rows: The sizes that are planned.
        smallest: The smallest cp_size that fits, None if none does.
        fastest: The fastest.
        warnings: Settings that are poor.
    """
    console = Console()
    rows_of = f"{request.batch} row{'s' if request.batch > 1 else ''}"
    console.print(
        f"{model}: {rows_of} of {request.seq_len:,} tokens, {request.ranks} {request.gpu.name} of "
        f"{request.gpu.memory:g} GiB; {request.transport} against AutoModel's own path; "
        "GiB of one rank",
        markup=False,
    )
    console.print(_memory(request, rows, smallest))
    console.print(
        "recv: received in a step, all layers, forward and backward. attn: peak of the worst "
        f"layer's attention. need: attn, one checkpointed input a layer, and --reserved "
        f"{request.reserved:g}.",
        markup=False,
    )
    console.print(_time(request, rows, smallest, fastest))
    console.print(
        "last / first, largest / mean: multiply-adds of the ranks. moved: what balance adds to "
        f"recv. step and tokens: with balance {request.balance} "
        f"{'and overlap' if request.overlap else 'without overlap'}; *: the fastest that fits.",
        markup=False,
    )
    detailed = next((row for row in rows if row.cp_size == fastest), rows[-1])
    console.print(_layers(detailed))
    console.print(_assumed(request.gpu), markup=False)
    if smallest is None:
        console.print(
            "No cp_size up to --ranks fits: use more ranks, shorter or fewer rows, or a smaller "
            "--reserved.",
            style="bold red",
        )
    else:
        console.print(f"Smallest cp_size that fits: {smallest}", style="bold green")
        console.print(f"Fastest cp_size that fits: {fastest}", style="bold green")
    for warning in warnings:
        console.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False)


def _table(headers: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    return table


def _memory(request: Request, rows: Sequence[Row], smallest: int | None) -> Table:
    headers = ["cp\nsize", "shard\ntokens", "pad\n%"]
    headers += [f"recv\n{_IN_HEADERS[path]}" for path in PATHS]
    headers += [
        f"attn\n{_IN_HEADERS[request.transport]}",
        f"attn\n{_IN_HEADERS[AUTOMODEL]}",
        "need",
        "fits",
    ]
    table = _table(headers)
    for row in rows:
        table.add_row(
            str(row.cp_size),
            f"{row.shard_len:,}",
            f"{row.padding * 100:.1f}",
            *(_gib(row.of(path).received_bytes) for path in PATHS),
            _gib(row.of(request.transport).attention_bytes),
            _gib(row.of(AUTOMODEL).attention_bytes),
            _gib(row.needed_bytes),
            "yes" if row.fits else "no",
            style="bold" if row.cp_size == smallest else None,
        )
    return table


def _time(
    request: Request, rows: Sequence[Row], smallest: int | None, fastest: int | None
) -> Table:
    moving = rows[0].moving.balance
    headers = ["cp\nsize", "last /\nfirst\noff", moving, "largest\n/ mean\noff", moving]
    headers += ["moved\nGiB", "at\nratios", "step\ns\noff", moving, "tokens\na second "]
    table = _table(headers)
    for row in rows:
        sharings = (row.staying, row.moving)
        last_over_first = (f"{each.last_over_first:.2f}" for each in sharings)
        largest_over_mean = (f"{each.largest_over_mean:.2f}" for each in sharings)
        table.add_row(
            str(row.cp_size),
            *last_over_first,
            *largest_over_mean,
            _gib(row.moving.moved_bytes),
            ", ".join(map(str, row.moving.moved_ratios)) or "-",
            *(_figure(each.step.seconds(overlap=request.overlap)) for each in sharings),
            f"{row.tokens_a_second:,.0f}{'*' if row.cp_size == fastest else ' '}",
            style="bold" if row.cp_size in (smallest, fastest) else None,
        )
    return table


def _layers(row: Row) -> Table:
    headers = [f"cp_size {row.cp_size}\nratio", "layers"]
    for sharing in (row.staying, row.moving):
        headers += [f"balance {sharing.balance}\ncomputes", "waits", "without\noverlap"]
    table = _table(headers)
    steps = (row.staying.step, row.moving.step)
    for each in zip(*(step.layers for step in steps), strict=True):
        table.add_row(str(each[0].ratio), str(each[0].layers), *_milliseconds(each, digits=1))
    table.add_row("step", "", *_milliseconds(steps, digits=0))
    return table


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
        "of FSDP and of expert parallelism, the optimizer, and what memory bounds."
    )


def _gib(size: int) -> str:
    digits = 2 if size < 10 * GIB else 1 if size < 100 * GIB else 0
    return f"{size / GIB:,.{digits}f}"


def _figure(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"
