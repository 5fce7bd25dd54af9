# SPDX-License-Identifier: Apache-2.0
"""Writes docs/refusals.md's list of broken batches and configs from the kinds that tests try.

``make refusals`` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tests.breaking import Kind
from tests.hostile import KINDS

PAGE = Path(__file__).with_name("refusals.md")
START, END = "<!-- hostile input -->\n", "<!-- end of hostile input -->\n"


def code(text: str) -> str:
    """Return text as inline code; it may contain backticks."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def together(kinds: Sequence[Kind]) -> str:
    """Return the names of kinds with one outcome, their common prefix once."""
    about = kinds[0].what.partition(": ")[0]
    if len(kinds) > 1 and all(kind.what.startswith(f"{about}: ") for kind in kinds):
        return f"{about}: {', '.join(kind.what.removeprefix(f'{about}: ') for kind in kinds)}"
    return "; ".join(kind.what for kind in kinds)


def rows(kinds: Sequence[Kind]) -> list[str]:
    """Return the rows of a table; neighbors with one outcome share a row."""
    if kinds[0].error is None:
        return [f"| {kind.what} |" for kind in kinds]
    found = []
    for (error, message), alike in groupby(kinds, key=lambda kind: (kind.error, kind.message)):
        assert error is not None
        shown = code(message.replace("OPTION", "...").strip())
        found.append(f"| {together(list(alike))} | `{error.__name__}`: {shown} |")
    return found


def tables(kinds: Sequence[Kind]) -> str:
    """Return a table for each section."""
    text = ""
    for section, of_it in groupby(kinds, key=lambda kind: kind.section):
        kinds_of_it = list(of_it)
        head = [section] if kinds_of_it[0].error is None else [section, "error"]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows(kinds_of_it)]
        text += "\n".join(lines) + "\n\n"
    return text.rstrip() + "\n"


def written(page: str, kinds: Sequence[Kind]) -> str:
    """Return the page with newly generated tables."""
    start, end = page.index(START) + len(START), page.index(END)
    return f"{page[:start]}\n{tables(kinds)}\n{page[end:]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), KINDS))
