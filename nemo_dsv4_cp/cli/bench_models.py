# SPDX-License-Identifier: Apache-2.0
"""Which layers of which model ``bench`` measures.

Of V4-Flash a layer of each compress ratio; of V4.1-Flash a layer of each kind, by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.cli.output import check_outputs, quiet
from nemo_dsv4_cp.sequence.layout import local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.tools.crossings import AUTOMODEL
from nemo_dsv4_cp.tools.sizes import V41_FLASH

if TYPE_CHECKING:  # AutoModel takes seconds to import, and every command would wait for it
    from nemo_dsv4_cp.bench.layer import Case

RATIOS = (0, 4, 128)
LAYERS = (0, 2, 3, 20, 24, 25)
"""Window; source of ratio 2; reuse; source of ratio 1 and of candidates; selection; reuse."""
NAMES = {"v4_flash": "V4-Flash", V41_FLASH: "V4.1-Flash"}

Model = Annotated[str, typer.Option(help=f"{' or '.join(NAMES)}.")]
Ratios = Annotated[
    list[int] | None,
    typer.Option("--ratio", help="Compress ratio, of V4; may be repeated. Several without it."),
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", help="Layer, of V4.1; may be repeated. Several without it."),
]
Columns = dict[str, Callable[[Any], object]]


def installed_paths() -> list[str]:
    """AutoModel's path, where the installed release has one (since 0.6), and every transport."""
    with quiet():
        has_cp = find_spec("nemo_automodel.components.models.deepseek_v4.cp") is not None
    return [*([AUTOMODEL] if has_cp else []), *plugins.names(plugins.TRANSPORTS)]


def check(seq_len: int, cp_size: int, ratios: Sequence[int], **outputs: Path | None) -> None:
    """Refuse ratios that are none of V4's, rows that do not cut evenly, and outputs."""
    for ratio in ratios:
        if ratio not in RATIOS:
            raise typer.BadParameter(f"--ratio {ratio} is none of V4's: use 0, 4 or 128")
    multiple = local_seq_multiple(ratios)
    if seq_len < 1 or seq_len % (cp_size * multiple):
        working = padded_seq_len(max(seq_len, 1), cp_size=cp_size, pad_multiple=multiple)
        raise typer.BadParameter(
            f"--seq-len {seq_len} does not cut into {cp_size} shards of a multiple of {multiple} "
            f"tokens; use {working}"
        )
    check_outputs(**outputs)


def wanted(
    model: str,
    ratio: list[int] | None,
    layer: list[int] | None,
    *,
    ratios: Sequence[int] = RATIOS,
    layers: Sequence[int] = LAYERS,
) -> Sequence[int]:
    """Return the ratios of V4's layers, or the numbers of V4.1's.

    ``ratios`` and ``layers`` are those to measure if the user names none.
    """
    if model not in NAMES:
        raise typer.BadParameter(f"--model {model} is unknown; use {' or '.join(NAMES)}")
    if model == V41_FLASH:
        if ratio:
            raise typer.BadParameter(f"--ratio is for v4_flash; with --model {model} use --layer")
        return layer or layers
    if layer:
        raise typer.BadParameter(f"--layer is for {V41_FLASH}; with --model {model} use --ratio")
    return ratio or ratios


def cases(
    model: str,
    paths: Sequence[str],
    numbers: Sequence[int],
    seq_len: int,
    cp_size: int,
    rank: int,
    **options: Any,
) -> list[Case]:
    """Return the measurements of the :func:`wanted` layers.

    Raises:
        ValueError: If V4.1-Flash has no such layer, or rows do not cut evenly.
        ImportError: If AutoModel has no V4.1.
    """
    if model != V41_FLASH:
        from nemo_dsv4_cp.bench.layer import Case

        check(seq_len, cp_size, numbers)
        return [
            Case(path, ratio, seq_len, cp_size, rank, **options)
            for ratio in numbers
            for path in paths
        ]
    # This import says what to do where AutoModel has no V4.1.
    from nemo_dsv4_cp import DeepseekV41ContextParallelConfig  # noqa: F401
    from nemo_dsv4_cp.bench import layer_v41

    return layer_v41.cases(paths, numbers, seq_len, cp_size, rank, **options)


def layer_columns(model: str, case: Callable[[Any], Case] = attrgetter("case")) -> Columns:
    """Return the columns that name a row's layer, by the row's case."""
    number: Columns = {"layer": lambda row: case(row).layer} if model == V41_FLASH else {}
    return {**number, "ratio": lambda row: case(row).ratio}


def title(model: str, seq_len: int, cp_size: int, rest: str) -> str:
    """Return a table's title."""
    return f"{NAMES[model]}, bfloat16, a row of {seq_len:,} tokens on {cp_size} ranks, {rest}"
