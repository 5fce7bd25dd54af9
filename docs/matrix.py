# SPDX-License-Identifier: Apache-2.0
"""Writes docs/support.md's matrix from test results.

``make test-automodels`` and ``make test-torch`` run it. Its arguments are the files of ``pytest
--matrix``, one for each release of AutoModel and of torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from packaging.version import Version

PAGE = Path(__file__).with_name("support.md")
START, END = "<!-- support matrix -->\n", "<!-- end of support matrix -->\n"


def matrix(results: list[dict[str, dict[str, str]]]) -> str:
    """Return a table of capabilities by release, and below it the notes that its cells refer to."""
    notes: list[str] = []

    def cell(outcome: str) -> str:
        short, _, why = outcome.replace("; ", ": ", 1).partition(": ")
        why = why.removeprefix("but ")
        if not why:
            return short
        if why not in notes:
            notes.append(why)
        return f"{short} [{notes.index(why) + 1}]"

    packages = [result["packages"] for result in results]
    rows = [
        ["", *(f"AutoModel {found['nemo_automodel']}" for found in packages)],
        ["---"] * (len(results) + 1),
        ["torch", *(found["torch"].partition("+")[0] for found in packages)],
        ["transformers", *(found["transformers"] for found in packages)],
    ]
    for name in results[0]["capabilities"]:
        rows.append([name, *(cell(result["capabilities"][name]) for result in results)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"[{number}] {note}  " for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def main(paths: list[str]) -> None:
    """Put the matrix of these results, newest release first, into its page."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    # A stable sort: results of one release stay in the order of the arguments.
    results.sort(key=lambda result: Version(result["packages"]["nemo_automodel"]), reverse=True)
    text = PAGE.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    PAGE.write_text(f"{text[:start]}\n{matrix(results)}\n{text[end:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
