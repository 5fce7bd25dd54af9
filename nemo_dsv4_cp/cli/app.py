# SPDX-License-Identifier: Apache-2.0
"""The command line of the package: one sub-command a file, and ``bench`` four."""

from __future__ import annotations

import typer

from nemo_dsv4_cp.cli import (
    bench,
    bench_kernels,
    bench_profiles,
    compose,
    doctor,
    gpu_report,
    plan,
    verify,
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)
app.command()(compose.compose)
app.command()(plan.plan)
app.command()(verify.verify)
app.command()(doctor.doctor)
app.command()(gpu_report.gpu_report)
bench.app.command("bytes")(bench_profiles.bytes_)
bench.app.command()(bench_profiles.memory)
bench.app.command()(bench_profiles.launches)
bench.app.command()(bench_kernels.kernels)
app.add_typer(bench.app, name="bench")


@app.callback()
def main() -> None:
    """Context parallelism for DeepSeek-V4 in NeMo AutoModel."""
