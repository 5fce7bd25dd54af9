# SPDX-License-Identifier: Apache-2.0
"""``bench bytes``, ``memory`` and ``launches``: layers profiled with fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_dsv4_cp.cli.bench import Balance, CpSize, Json, KernelsName, SeqLen, Workspace
from nemo_dsv4_cp.cli.bench_models import (
    Columns,
    Layers,
    Model,
    Ratios,
    cases,
    installed_paths,
    layer_columns,
    title,
    wanted,
)
from nemo_dsv4_cp.cli.output import check_outputs, emit, progress, running, table, two_plots
from nemo_dsv4_cp.options import AUTO
from nemo_dsv4_cp.tools.sizes import GIB, V41_FLASH

if TYPE_CHECKING:  # AutoModel takes seconds to import, and every command would wait for it
    from nemo_dsv4_cp.bench.layer import Case
    from nemo_dsv4_cp.bench.profiling import LayerProfile

IndexerLoss = Annotated[
    str | None,
    typer.Option(help="Train the indexer of V4's layers of ratio 4: sparse or full."),
]
Plot = Annotated[Path | None, typer.Option(help="Draw memory and bytes against length here.")]


def _profiles(model: str, *case: Any, **options: Any) -> list[LayerProfile]:
    """Profile a rank's layers by every path; the other arguments are those of :func:`cases`."""
    mode = options.get("indexer_loss")
    if mode not in (None, "sparse", "full"):
        raise typer.BadParameter(f"--indexer-loss {mode} is unknown; use sparse or full")
    if mode and model == V41_FLASH:
        raise typer.BadParameter("--indexer-loss is for v4_flash: V4.1's indexer is frozen")
    with running(mistakes=(ValueError, ImportError)):
        from nemo_dsv4_cp.bench.profiling import profile

        chosen = cases(model, installed_paths(), *case, **options)
        return [profile(each) for each in progress(chosen, "Profiling")]


def _figures(profiles: Sequence[LayerProfile]) -> list[dict[str, Any]]:
    return [
        asdict(each)
        | {
            f"{step}_bytes_per_token_and_remote_rank": each.per_token(
                getattr(each, f"received_{step}")
            )
            for step in ("forward", "backward")
        }
        for each in profiles
    ]


def _layer_columns(model: str, case: Callable[[Any], Case] = attrgetter("case")) -> Columns:
    return {**layer_columns(model, case), "path": lambda row: case(row).path}


def _received_columns(model: str) -> Columns:
    carried: Columns = {"carried GiB": lambda each: f"{each.carried_bytes / GIB:.2f}"}
    return {
        **_layer_columns(model),
        "received fwd": lambda each: f"{each.per_token(each.received_forward):,.1f}",
        "received bwd": lambda each: f"{each.per_token(each.received_backward):,.1f}",
        "peak GiB": lambda each: f"{each.peak_bytes / GIB:.2f}",
        "saved GiB": lambda each: f"{each.saved_bytes / GIB:.2f}",
        **(carried if model == V41_FLASH else {}),
    }


_BY_TOKEN = "received: bytes per local token and remote rank"


def bytes_(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    model: Model = "v4_flash",
    ratio: Ratios = None,
    layer: Layers = None,
    balance: Balance = AUTO,
    indexer_loss: IndexerLoss = None,
    json_: Json = None,
    plot: Plot = None,
) -> None:
    """Profile what one layer receives from other ranks, with fake tensors.

    Example: nemo-dsv4-cp bench bytes --seq-len 131072 --cp-size 8
    """
    numbers = wanted(model, ratio, layer)
    check_outputs(json_=json_, plot=plot)
    # A middle rank has neighbors on both sides: halos arrive, and their gradients return.
    rank = cp_size // 2
    options = {"balance": balance, "indexer_loss": indexer_loss}
    profiles = _profiles(model, numbers, seq_len, cp_size, rank, **options)
    shown = title(model, seq_len, cp_size, f"rank {rank}; balance: {balance}; {_BY_TOKEN}")
    emit(_figures(profiles), json_, table(shown, profiles, _received_columns(model)))
    if plot is not None:
        _plot(model, numbers, seq_len // cp_size, plot)


def memory(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    model: Model = "v4_flash",
    ratio: Ratios = None,
    layer: Layers = None,
    kernels: KernelsName = AUTO,
    balance: Balance = AUTO,
    indexer_loss: IndexerLoss = None,
    workspace_mib: Workspace = None,
    json_: Json = None,
    plot: Plot = None,
) -> None:
    """Profile the memory of one layer's forward and backward, and its largest tensors.

    Example: nemo-dsv4-cp bench memory --seq-len 1048576 --cp-size 64 --ratio 4
    """
    numbers = wanted(model, ratio, layer)
    check_outputs(json_=json_, plot=plot)
    rank = cp_size - 1  # it sees the most
    options = {
        "workspace_mib": workspace_mib or AUTO,
        "kernels": kernels,
        "balance": balance,
        "indexer_loss": indexer_loss,
    }
    profiles = _profiles(model, numbers, seq_len, cp_size, rank, **options)
    shown = title(model, seq_len, cp_size, f"rank {rank}; balance: {balance}; {_BY_TOKEN}")
    tensors = [(each.case, tensor) for each in profiles for tensor in each.largest]
    columns: Columns = {
        **_layer_columns(model, itemgetter(0)),
        "GiB": lambda row: f"{row[1].bytes / GIB:.2f}",
        "dtype": lambda row: row[1].dtype,
        "shape": lambda row: " x ".join(map(str, row[1].shape)),
        "made by": lambda row: row[1].operation,
    }
    largest = table("The largest tensors at the peak", tensors, columns)
    emit(_figures(profiles), json_, table(shown, profiles, _received_columns(model)), largest)
    if plot is not None:
        _plot(model, numbers, seq_len // cp_size, plot)


def launches(
    seq_len: SeqLen = 131072,
    cp_size: CpSize = 8,
    model: Model = "v4_flash",
    ratio: Ratios = None,
    layer: Layers = None,
    kernels: KernelsName = AUTO,
    balance: Balance = AUTO,
    indexer_loss: IndexerLoss = None,
    workspace_mib: Workspace = None,
    json_: Json = None,
) -> None:
    """Count what one layer launches, and the GB of tensors that it reads and writes.

    Example: nemo-dsv4-cp bench launches --seq-len 131072 --cp-size 8 --kernels triton
    """
    numbers = wanted(model, ratio, layer)
    check_outputs(json_=json_)
    options = {
        "workspace_mib": workspace_mib or AUTO,
        "kernels": kernels,
        "balance": balance,
        "indexer_loss": indexer_loss,
    }
    profiles = _profiles(model, numbers, seq_len, cp_size, cp_size - 1, **options)
    settings = f"the last rank; kernels: {kernels}; balance: {balance}"
    shown = title(model, seq_len, cp_size, f"{settings}; GB of tensors read and written")
    columns = {
        **_layer_columns(model),
        "launches fwd": lambda each: f"{each.forward.count:,}",
        "GB fwd": lambda each: f"{each.forward.moved_bytes / 1e9:,.1f}",
        "launches bwd": lambda each: f"{each.backward.count:,}",
        "GB bwd": lambda each: f"{each.backward.moved_bytes / 1e9:,.1f}",
    }
    emit(_figures(profiles), json_, table(shown, profiles, columns))


def _plot(model: str, numbers: Sequence[int], shard: int, destination: Path) -> None:
    """Draw memory and bytes against the row's length at one shard length, log-log."""
    sizes, paths = [2**power for power in range(1, 7)], installed_paths()
    profiles = [each for n in sizes for each in _profiles(model, numbers, shard * n, n, n - 1)]
    styles, kind = dict(zip(numbers, cycle(("-", "--", ":", "-.")), strict=False)), "ratio"
    if model == V41_FLASH:
        kind = "layer"
    with two_plots(
        destination,
        "peak of one layer's forward and backward, GB",
        "received by one rank in one layer's forward, GB",
        f"tokens in the row ({shard:,} on each rank)",
    ) as (left, right):
        for place, path in enumerate(paths):
            for each in numbers:
                mine = [p for p in profiles if (p.case.path, getattr(p.case, kind)) == (path, each)]
                lengths = [p.case.seq_len for p in mine]
                style = {
                    "color": f"C{place}",
                    "ls": styles[each],
                    "label": f"{path}, {kind} {each}",
                }
                left.plot(lengths, [p.peak_bytes / 1e9 for p in mine], **style)
                right.plot(lengths, [p.received_forward / 1e9 for p in mine], **style)
        for capacity in (80, 141):  # GB of an H100 and an H200
            left.axhline(capacity, color="grey", lw=0.8)
            left.text(shard * 2, capacity * 1.05, f"{capacity} GB", color="grey")
        right.legend(fontsize=7)
