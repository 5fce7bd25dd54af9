# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of the README and docs/how_it_works.md next to this file.

Run it with: python docs/figures/draw.py [NAME ...]
(it needs matplotlib; `memory` takes some fifteen minutes)
"""

from __future__ import annotations

import logging
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.bench.profiling import profile
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced, contiguous, entries_seen
from nemo_dsv4_cp.tools.crossings import AUTOMODEL

HERE = Path(__file__).parent
LOCAL_TOKENS = 16_384
CP_SIZES = (2, 4, 8, 16, 32, 64)
PATHS = ("boundary", "all_gather", AUTOMODEL)
GPU_GB = (80, 141)

INK, PALE = "#333333", "#f1f1f1"
SHARDS = ("#cfe0f3", "#9dc3e6", "#5b9bd5")
HALO, FEATURES, ENTRIES = "#c0504d", "#e39a36", "#4f8a4c"

RANKS = ("#cfe0f3", "#e39a36", "#4f8a4c", "#5b9bd5")

STYLE = {
    "svg.hashsalt": "nemo-dsv4-cp",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
}


def main() -> None:
    """Draw all, or those that are named."""
    drawn = {"cut": cut, "balance": balance, "memory": memory}
    with plt.rc_context(STYLE):
        for name in sys.argv[1:] or drawn:
            save(drawn[name](), f"{name}.svg")


def balance() -> Figure:
    """Which rank computes which queries of a row, and how many entries they see."""
    starts = [0, 5, 17, 20, 56, 60, 61]  # of packed documents, in 64ths of the row
    tokens, ranks = 65_536, len(RANKS)
    plain = SequenceLayout(tokens // ranks, 0, ranks)
    packed = SequenceLayout.of_documents(
        torch.tensor([[start * tokens // 64 for start in starts]]),
        tokens // ranks,
        cp_rank=0,
        cp_size=ranks,
    )
    figure, every = plt.subplots(
        2, 2, figsize=(11, 4.6), height_ratios=(3, 2), sharey="row", layout="constrained"
    )
    titles = ("A row of one document", f"A packed row, {len(starts)} documents")
    for layout, title, column in zip((plain, packed), titles, every.T, strict=True):
        _who_computes(column[0], layout, title)
        _how_much(column[1], layout)
    every[0, 0].set_ylabel("visible entries of a query")
    every[1, 0].set_ylabel("visible to a rank's\nqueries / mean")
    every[1, 0].legend(loc="upper left", ncols=2)
    return figure


def _who_computes(axes: Axes, layout: SequenceLayout, title: str) -> None:
    schedule, seq_len = balanced(layout), layout.seq_len
    positions = torch.arange(0, seq_len, seq_len // 2048)
    first, stop = layout.visible_entries(positions, 4)
    seen = (stop - first)[0]
    for rank, color in enumerate(RANKS):
        for run in (*schedule.local[rank], *schedule.remote[rank]):
            inside = (positions >= run.start) & (positions < run.stop)
            x = [*positions[inside].tolist(), run.stop]
            y = [*seen[inside].tolist(), seen[inside][-1].item()]
            axes.fill_between(x, y, color=color, lw=0)
            axes.axvspan(run.start, run.stop, ymax=0.08, color=color, lw=0)
    for rank in range(layout.cp_size):
        shard = layout.shard(rank)
        axes.axvline(shard.start, color=INK, lw=0.8, ls=":")
        axes.text(shard.start + len(shard) / 2, -2400, f"shard of rank {rank}", ha="center")
    axes.set_xlim(0, seq_len)
    axes.set_ylim(-1400, seq_len // 4)
    axes.set_xticks([])
    axes.set_yticks([0, seq_len // 8, seq_len // 4])
    axes.set_title(f"{title}: colors show the rank that computes", fontsize=10)


def _how_much(axes: Axes, layout: SequenceLayout) -> None:
    for place, (schedule, label) in enumerate(
        ((contiguous(layout), "balance: off"), (balanced(layout), "balance: on"))
    ):
        seen = entries_seen(layout, schedule, 4)
        mean = sum(seen) / len(seen)
        x = [rank + 0.4 * (place - 0.5) for rank in range(layout.cp_size)]
        bars = axes.bar(
            x,
            [each / mean for each in seen],
            0.36,
            color=RANKS,
            alpha=1 if place else 0.4,
            hatch="" if place else "///",
            edgecolor=INK,
            lw=0.5,
            label=label,
        )
        axes.bar_label(bars, [f"{each / mean:.2f}" for each in seen], fontsize=7)
    axes.axhline(1, color=INK, lw=0.8, ls=":")
    axes.set_xticks(range(layout.cp_size), [f"rank {rank}" for rank in range(layout.cp_size)])
    axes.set_ylim(0, 2.4)


def save(figure: Figure, name: str) -> None:
    """Write a figure next to this file."""
    # Date is left out, so that drawing again gives the same bytes.
    figure.savefig(HERE / name, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def cut() -> Figure:
    """What crosses a cut at ratio 4: tokens of the rank before, and entries of all ranks."""
    figure, axes = plt.subplots(figsize=(11, 4.8))
    axes.set_xlim(0, 96)
    axes.set_ylim(0, 46)
    axes.axis("off")
    width, top, height = 28, 36, 5

    _text(
        axes, 0, 44.5, "Rank 2 of a row that is cut into contiguous shards, in a layer of ratio 4"
    )
    for rank, color in enumerate(SHARDS):
        left = 2 + rank * 32
        _box(axes, left, top, width, height, color)
        _text(axes, left + width / 2 - 1, top + height / 2, f"tokens of rank {rank}", centered=True)
        _box(axes, left, 4, width, height - 1, color)
        for entry in range(1, 7):
            x = left + width * entry / 7
            axes.plot([x, x], [4, 8], color="white", lw=1)
        _text(axes, left + width / 2, 6, f"entries of rank {rank}", centered=True)

    # The halo and the window are the end of the neighbor's shard, wider than true to scale.
    end, begin = 2 + 32 + width, 2 + 64
    _box(axes, end - 7, top, 7, height, HALO)
    _box(axes, end - 2, top, 2, height, FEATURES)
    _arrow(axes, (end - 5, top), (begin + 2, 28.5), HALO)
    _arrow(axes, (end - 1, top), (begin + 15, 28.5), FEATURES)
    _box(axes, begin - 4, 22.5, 14.5, 6, HALO)
    _text(axes, begin + 3.25, 25.5, "halo: W-1 = 127\nraw keys", centered=True, color="white")
    _box(axes, begin + 11.5, 22.5, 16.5, 6, FEATURES)
    _text(axes, begin + 19.75, 25.5, "one previous window's\nfeatures, 4 tokens", centered=True)
    _text(axes, begin + 12, 20.6, "1.3 bytes together", centered=True)

    _box(axes, begin - 4, 12.5, 32, 6, ENTRIES)
    _text(
        axes,
        begin + 12,
        15.5,
        "all ranks' finished entries\n256 bytes, and 64 of index keys",
        centered=True,
        color="white",
    )
    for begin_x, end_x in ((16, 64), (48, 70), (80, 80)):
        _arrow(axes, (begin_x, 8), (end_x, 12.5), ENTRIES)

    notes = (
        "Left of the cut come, in one exchange with the neighbor,",
        "the keys that the sliding window of rank 2's first queries",
        "reaches, and what its first overlapping window pools too.",
        "",
        "Entries are pooled where their last token lies. Only these,",
        "a quarter as many as tokens, are gathered from all ranks.",
        "",
        "Bytes: forward, bfloat16, per local token and remote rank.",
        "boundary 321.3     all_gather 6,464.0     AutoModel 11,584.0",
    )
    for line, note in enumerate(notes):
        _text(axes, 2, 30.5 - 2.1 * line, note)
    return figure


def memory() -> Figure:
    """Peak memory of one layer's forward and backward against the row's length, log-log."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    lengths = [LOCAL_TOKENS * size for size in CP_SIZES]
    peaks_gb = _peaks_gb()
    labels = {AUTOMODEL: "AutoModel 0.7.0", "all_gather": "all_gather", "boundary": "boundary"}
    colors = {AUTOMODEL: HALO, "all_gather": FEATURES, "boundary": SHARDS[2]}
    for path, label in labels.items():
        peaks = [peaks_gb[path, size] for size in CP_SIZES]
        axes.plot(lengths, peaks, marker="o", ms=4, color=colors[path], label=label)
        axes.annotate(
            f"{peaks[-1]:.1f}", (lengths[-1], peaks[-1]), (5, -3), textcoords="offset points"
        )
    for capacity in GPU_GB:
        axes.axhline(capacity, color="grey", lw=0.8, ls="--")
        axes.text(lengths[0], capacity * 1.05, f"{capacity} GB", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    names = [f"{length >> 10}K" if length < 1 << 20 else f"{length >> 20}M" for length in lengths]
    ranks = [f"{name}\n{size} ranks" for name, size in zip(names, CP_SIZES, strict=True)]
    axes.set_xticks(lengths, ranks)
    axes.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.set_ylim(4, 260)
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.6)
    axes.set_xlabel("tokens in the row, 16,384 on each rank")
    axes.set_ylabel("peak of one layer, GB")
    axes.set_title("Forward and backward of one V4-Flash layer of ratio 4, last rank", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    return figure


def _peaks_gb() -> dict[tuple[str, int], float]:
    # The longest rows take the longest to profile: they go first.
    cases = [(path, size) for size in reversed(CP_SIZES) for path in PATHS]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(_peak_gb, *zip(*cases, strict=True)), strict=True))


def _peak_gb(path: str, cp_size: int) -> float:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = Case(path, 4, LOCAL_TOKENS * cp_size, cp_size, cp_size - 1, balance="off")
        peak = profile(case).peak_bytes / 1e9
    print(f"{path}, {cp_size} ranks: {peak:.2f} GB", flush=True)
    return peak


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, alpha: float = 1
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fc=color, ec=INK, lw=0.6, alpha=alpha))


def _text(
    axes: Axes, x: float, y: float, text: str, *, centered: bool = False, color: str = INK
) -> None:
    align = "center" if centered else "left"
    axes.text(x, y, text, ha=align, va="center", color=color, fontsize=9 if not centered else 8)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=10, color=color, lw=1.2)
    )


if __name__ == "__main__":
    main()
