# SPDX-License-Identifier: Apache-2.0
"""Writes docs/support.md's table of combined recipe options from test results.

``make test-recipes`` runs it. Its argument is the file of ``pytest --recipes``.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.recipes.options import OPTIONS, REFUSALS, REPLACEMENTS

PAGE = Path(__file__).with_name("support.md")
START, END = "<!-- recipe options -->\n", "<!-- end of recipe options -->\n"
SIGNS = {"equal": "=", "refused": "R", "fails": "fails"}


def table(results: list[dict[str, Any]]) -> str:
    """Return a triangular table of pairs, the meaning of its rows, and the refused pairs."""
    outcomes = {frozenset(result["options"]): result["outcome"] for result in results}
    numbered = list(enumerate(OPTIONS, 1))
    lines = [f"| | {' | '.join(str(number) for number, _ in numbered)} |"]
    lines.append(f"|---{'|:-:' * len(OPTIONS)}|")
    for number, row in numbered:
        cells = []
        for column in OPTIONS[:number]:
            paired = row is column or row.factor != column.factor
            found = outcomes.get(frozenset({row.name, column.name}))
            cells.append(SIGNS[found] if found else "?" if paired else "")
        cells += [""] * (len(OPTIONS) - number)
        lines.append(f"| {number} {row.name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {option.name}: {option.meaning}" for number, option in numbered)]
    lines += ["", "Refused with an error before the first optimizer step:", ""]
    for why, refusals in groupby(REFUSALS, lambda refusal: refusal.why):
        spelled = ", ".join(" with ".join(sorted(refusal.options)) for refusal in refusals)
        lines.append(f"- {spelled}: {why}")
    lines += ["", "Equal, but with another loss than the one in the recipe:", ""]
    for replacement in REPLACEMENTS:
        lines.append(f"- {' with '.join(sorted(replacement.options))}: {replacement.why}")
    return "\n".join(lines) + "\n"


def main(path: str) -> None:
    """Put the table of these results into its page."""
    results = json.loads(Path(path).read_text())
    text = PAGE.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    PAGE.write_text(f"{text[:start]}\n{table(results)}\n{text[end:]}")


if __name__ == "__main__":
    main(sys.argv[1])
