# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``bench`` share: options, their checks, and how figures come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.cli.quiet import quiet
from nemo_dsv4_cp.sequence.layout import local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.tools.inventory import AUTOMODEL

console = Console()

SeqLen = Annotated[int, typer.Option(help="Tokens in the whole row.")]
CpSize = Annotated[int, typer.Option(help="Number of CP ranks.", min=1)]
Ratios = Annotated[list[int], typer.Option("--ratio", help="Compress ratio; may be repeated.")]
Workspace = Annotated[int, typer.Option(help="context_parallel.workspace_mib.", min=1)]
KernelsName = Annotated[str, typer.Option("--kernels", help="context_parallel.kernels.")]
Balance = Annotated[str, typer.Option(help="context_parallel.balance: auto, on or off.")]
Json = Annotated[Path | None, typer.Option("--json", help='Write the figures here; "-" prints.')]
Plot = Annotated[Path | None, typer.Option(help="Draw memory and bytes against length here.")]


def paths() -> list[str]:
    """AutoModel's path, where the installed release has one (since 0.6), and every transport."""
    with quiet():
        hosted = find_spec("nemo_automodel.components.models.deepseek_v4.cp") is not None
    return [*([AUTOMODEL] if hosted else []), *plugins.names(plugins.TRANSPORTS)]


def check(seq_len: int, cp_size: int, ratios: Sequence[int]) -> None:
    """Refuse ratios that are none of V4's, and rows that do not cut evenly."""
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


def check_outputs(*outputs: Path | None, plot: Path | None = None) -> None:
    """Refuse outputs that could not be written, before minutes of measuring."""
    for output in (*outputs, plot):
        if output is None or str(output) == "-":
            continue
        if not output.parent.is_dir() or output.is_dir():
            raise typer.BadParameter(f"{output} cannot be written; name a file in a directory")
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'nemo-dsv4-cp[plot]'")


def emit(table: Table, figures: Any, destination: Path | None) -> None:
    """Print the table, unless figures go to stdout, and write the figures."""
    text = json.dumps(figures, indent=2)
    if destination is None or str(destination) != "-":
        console.print(table)
    if destination is not None and str(destination) == "-":
        typer.echo(text)
    elif destination is not None:
        destination.write_text(text)
