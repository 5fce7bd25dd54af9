# SPDX-License-Identifier: Apache-2.0
"""``bench``: what a layer takes, by AutoModel's path and every transport, side by side."""

from __future__ import annotations

import typer

from nemo_dsv4_cp.cli import bench_compiled, bench_profiled, bench_timed

app = typer.Typer(no_args_is_help=True, help="Measure one attention layer of one rank.")
app.command("bytes")(bench_profiled.bytes_)
app.command()(bench_profiled.memory)
app.command()(bench_profiled.launches)
app.command()(bench_profiled.work)
app.command()(bench_compiled.kernels)
app.command("time")(bench_timed.time_)
app.command()(bench_timed.overlap)
app.command()(bench_timed.operations)
