# SPDX-License-Identifier: Apache-2.0
"""``doctor``: whether this environment can train, and what to do where it cannot."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nemo_dsv4_cp.cli.output import quiet


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print the findings for machines.")] = False,
) -> None:
    """Look at versions, entry points, AutoModel's contracts, devices, kernels and known traps.

    Example: nemo-dsv4-cp doctor

    Exit status: 0 if training can start, 1 if it would fail.
    """
    console, errors = Console(), Console(stderr=True)
    with quiet(), errors.status("Looking around"):
        from nemo_dsv4_cp.tools.diagnosis import diagnose

        findings = diagnose()
    if json_:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        table = Table()
        for header in ("", "subject", "found", "what to do"):
            table.add_column(header, overflow="fold")
        for finding in findings:
            mark = "[red]x[/red]" if finding.fatal else "[yellow]![/yellow]"
            mark = mark if finding.remedy else "[green]ok[/green]"
            advice = finding.remedy or finding.note or ""
            table.add_row(mark, finding.subject, finding.found, advice)
        console.print(table)
    fatal = [finding.subject for finding in findings if finding.fatal]
    if fatal:
        errors.print(f"[red]Training would fail:[/red] {', '.join(fatal)}")
        raise typer.Exit(1)
