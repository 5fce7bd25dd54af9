# SPDX-License-Identifier: Apache-2.0
"""``gpu-report``: whether the kernels are right on this GPU, and how fast, in one file to send."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nemo_dsv4_cp.cli.output import check_output, notice, require_gpu, running
from nemo_dsv4_cp.tools.sizes import is_v41, read_model_fields


def gpu_report(
    out: Annotated[Path, typer.Option(help="Where to write; .json and .md are appended.")] = Path(
        "gpu-report"
    ),
    model: Annotated[
        str, typer.Option(help="v4_flash, v4_pro, v41_flash or a config.")
    ] = "v4_flash",
    minutes: Annotated[
        float, typer.Option(help="After which no other measurement begins.", min=0.0)
    ] = 6.0,
    tests: Annotated[
        Path | None, typer.Option(help="JUnit file of the kernel tests, to be counted in.")
    ] = None,
) -> None:
    """Examine and time every kernel backend on this GPU, and write one report.

    It holds the environment, the certificates with every difference, and the times of operations
    and of whole layers beside AutoModel's own path, at 128K tokens on 8 ranks, 256K on 16 and 1M on
    64. Attach both files to an issue.

    Example: nemo-dsv4-cp gpu-report --out report

    Exit status: 0 if this package's Triton kernels are right here, 1 if not, 2 for a mistake in the
    arguments or where there is no GPU.
    """
    files = [out.with_name(f"{out.name}{suffix}") for suffix in (".json", ".md")]
    if not out.parent.is_dir():  # in the user's words, without a suffix
        check_output("--out", out)
    for file in files:
        check_output("--out", file)
    if tests is not None and not tests.is_file():
        raise typer.BadParameter(f"--tests: there is no file {tests}")
    require_gpu("gpu-report", "To compile the kernels without one: nemo-dsv4-cp bench kernels")
    with running(), Console(stderr=True).status("Examining and timing the kernels"):
        from nemo_dsv4_cp.bench.gpu_report import collect, markdown
        from nemo_dsv4_cp.tools.verified_models import kernel_sizes

        fields = read_model_fields(model)
        if is_v41(fields):
            fields = vars(kernel_sizes(fields))
        report = collect(fields, seconds=minutes * 60, tests=tests)
    files[0].write_text(json.dumps(asdict(report), indent=1) + "\n")
    files[1].write_text(markdown(report))
    for file in files:
        notice(f"Written: {file}")
    failed = [each for each in report.certificates if each["kernels"] == "triton" and each["error"]]
    if failed or report.tests.get("failed"):
        notice("The Triton kernels are not right here; see the report.", style="red")
        raise typer.Exit(1)
