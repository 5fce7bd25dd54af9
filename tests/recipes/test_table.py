# SPDX-License-Identifier: Apache-2.0
"""The table of recipe options: what was found of each pair, and all of them."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.recipes import options
from tests.recipes.options import FIXED_PAIRS, OPTIONS, Option, Refusal, Replacement, pairs

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("recipes", DOCS / "recipes.py")
recipes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recipes)

TESTS = """
    import pytest

    def test_is_equal(record_property):
        record_property("recipe options", ["a"])
        record_property("found", "equal; loss of step 0 differs by 1e-07")

    def test_fails(record_property):
        record_property("recipe options", ["a", "b"])
        assert False, "gradients differ"

    def test_is_about_something_else(): ...
"""


def test_what_tests_found_is_written_by_options(pytester):
    pytester.makepyfile(TESTS)
    pytester.runpytest("-p", "tests.recipes.results", "--recipes", "found/recipes.json")
    found = json.loads((pytester.path / "found" / "recipes.json").read_text())
    assert [(each["options"], each["outcome"]) for each in found] == [
        (["a"], "equal"),
        (["a", "b"], "fails"),
    ]
    assert "gradients differ" in found[1]["found"]


def test_pairs_are_of_different_factors_and_the_fixed_ones_are_among_them():
    names = [option.name for option in OPTIONS]
    assert len(set(names)) == len(names)
    assert ("chunked", "fused") not in pairs()
    assert set(map(frozenset, FIXED_PAIRS)) < set(map(frozenset, pairs()))


@pytest.fixture
def three_options(monkeypatch):
    """Two values of one factor and an option that goes with the first alone."""
    three = (
        Option("one", "`x: 1`", "x", {}),
        Option("two", "`x: 2`", "x", {}),
        Option("three", "`y: 1`", "y", {}),
    )
    monkeypatch.setattr(recipes, "OPTIONS", three)
    refused = Refusal(frozenset({"two", "three"}), "no", "both want the same rows")
    monkeypatch.setattr(recipes, "REFUSALS", (refused,))
    replaced = Replacement(frozenset({"one", "three"}), "Other", "one warns and takes `Other`")
    monkeypatch.setattr(recipes, "REPLACEMENTS", (replaced,))
    return [{"options": [option.name], "outcome": "equal"} for option in three] + [
        {"options": ["one", "three"], "outcome": "equal"},
        {"options": ["two", "three"], "outcome": "refused"},
    ]


def test_a_cell_is_a_pair_and_the_diagonal_an_option_alone(three_options):
    assert recipes.table(three_options).splitlines() == [
        "| | 1 | 2 | 3 |",
        "|---|:-:|:-:|:-:|",
        "| 1 one | = |  |  |",
        "| 2 two |  | = |  |",
        "| 3 three | = | R | = |",
        "",
        "1. one: `x: 1`",
        "2. two: `x: 2`",
        "3. three: `y: 1`",
        "",
        "Refused with an error before the first optimizer step:",
        "",
        "- three with two: both want the same rows",
        "",
        "Equal, but with another loss than the one in the recipe:",
        "",
        "- one with three: one warns and takes `Other`",
    ]


def test_a_pair_without_a_result_stands_out(three_options):
    assert "| 3 three | ? | R | = |" in recipes.table(
        [each for each in three_options if each["options"] != ["one", "three"]]
    )


def test_the_table_is_written_between_the_marks_of_its_page(three_options, tmp_path, monkeypatch):
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text(f"before\n{recipes.START}old\n{recipes.END}after\n")
    found.write_text(json.dumps(three_options))
    monkeypatch.setattr(recipes, "PAGE", page)
    recipes.main(str(found))
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", recipes.START.strip()]
    assert lines[-2:] == [recipes.END.strip(), "after"]
    assert "| 1 one | = |  |  |" in lines and "old" not in lines


def test_the_page_has_every_option_and_refusal_and_no_pair_is_untested_or_fails():
    text = recipes.PAGE.read_text()
    block = text[text.index(recipes.START) : text.index(recipes.END)]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in block.splitlines()
        if line.startswith("|")
    ][2:]
    names = [option.name for option in OPTIONS]
    assert [row[0].split()[1] for row in rows] == names
    refused = {
        frozenset({names[row], names[column]})
        for row, cells in enumerate(rows)
        for column, sign in enumerate(cells[1:])
        if sign == "R"
    }
    every = {frozenset({name}) for name in names} | set(map(frozenset, pairs()))
    assert refused == {each for each in every if options.refusal_of(*each)}
    assert not {sign for cells in rows for sign in cells[1:]} & {"?", "fails"}
    for refusal in options.REFUSALS:
        assert refusal.why in block
