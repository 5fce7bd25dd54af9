# SPDX-License-Identifier: Apache-2.0
"""What the commands share: silence, progress, mistakes, tables, files and plots."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")

TEXT_COLUMNS = (
    *("ratio", "path", "balance", "overlap", "pass", "model", "kernel"),
    *("operation", "dtype", "shape", "made by", "tensor", "tensor core", "bound", ""),
)
"""Headers of columns that are aligned to the left; figures are to the right."""


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings and log records up to level WARNING of torch and AutoModel; errors still show.

    What they print, as AutoModel 0.6 does on import, goes to stderr: stdout is for the results.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def running(prefix: str = "", mistakes: Any = ValueError) -> Iterator[None]:
    """Run quietly; end the command in a line where the package refuses a value or a rank fails.

    Args:
        prefix: What stands before the message of a mistake.
        mistakes: The errors, one or several types, that are mistakes in the arguments.
    """
    with quiet():
        from nemo_dsv4_cp.tools.local_ranks import RankFailed

    try:
        with quiet():
            yield
    except RankFailed as error:
        notice(f"{error}", style="red", highlight=False)
        raise typer.Exit(1) from error
    except mistakes as error:
        raise typer.BadParameter(f"{prefix}{error}") from error


def require_gpu(command: str, instead: str) -> None:
    """End a command that measures a GPU where torch sees none.

    Args:
        command: Its name.
        instead: What to run without a GPU, in a sentence.
    """
    if torch.cuda.is_available():
        return
    on_cpus = torch.version.cuda is None and torch.version.hip is None
    build = f" (torch {torch.__version__} is a CPU build)" if on_cpus else ""
    notice(f"{command} needs a GPU, and torch sees none{build}. {instead}", style="red")
    raise typer.Exit(2)


def notice(text: str, style: str | None = None, **options: Any) -> None:
    """Print a line to stderr."""
    Console(stderr=True).print(text, style=style, markup=False, soft_wrap=True, **options)


warn = partial(notice, style="yellow")


def progress(items: Iterable[T], what: str) -> Iterable[T]:
    """Yield the items behind a progress bar on stderr."""
    return track(items, what, console=Console(stderr=True), transient=True)


def table(
    title: str | None,
    rows: Iterable[T],
    columns: Mapping[str, Callable[[T], object]],
    **options: Any,
) -> Table:
    """Make a table with a function of a row for each column."""
    made = Table(title=title, **options)
    for header in columns:
        made.add_column(header, justify="left" if header in TEXT_COLUMNS else "right")
    for row in rows:
        made.add_row(*(str(cell(row)) for cell in columns.values()))
    return made


def check_outputs(*, json_: Path | None = None, plot: Path | None = None) -> None:
    """Refuse outputs that could not be written, before minutes of measuring."""
    if json_ is not None and str(json_) != "-":
        check_output("--json", json_)
    if plot is None:
        return
    check_output("--plot", plot)
    if plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"--plot {plot} is no picture's name; end it with .png")
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'nemo-dsv4-cp[plot]'")


def check_output(option: str, output: Path) -> None:
    """Refuse the file of an option if it could not be written."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"{option} {output}: there is no directory {output.parent}")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise typer.BadParameter(
            f"{option} {output} cannot be written; name a file in a directory you may write to"
        )
    if output.exists() and not os.access(output, os.W_OK):
        raise typer.BadParameter(f"{option} {output} is read-only; name another file")


def emit(figures: Any, destination: Path | None, *tables: Table) -> None:
    """Write the figures as JSON, and print the tables unless the figures go to stdout."""
    text = json.dumps(figures, indent=2)
    if str(destination) == "-":
        typer.echo(text)
        return
    for each in tables:
        Console().print(each)
    if destination is not None:
        destination.write_text(text + "\n")


@contextmanager
def two_plots(destination: Path, left: str, right: str, below: str) -> Iterator[tuple[Any, Any]]:
    """Draw two log-log plots side by side, and save them.

    Args:
        destination: Where.
        left: What the left one plots.
        right: What the right one plots.
        below: What both plot it against.
    """
    import matplotlib  # an extra that only plots need

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(12, 5))
    for axes, label in zip(both, (left, right), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(below)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    yield both
    for axes in both:
        if any(len(line.get_xdata()) for line in axes.lines):  # a logarithm needs a figure
            axes.set_yscale("log")
    figure.tight_layout()
    figure.savefig(destination, dpi=150)
    plt.close(figure)
    notice(f"Drawn: {destination}")
