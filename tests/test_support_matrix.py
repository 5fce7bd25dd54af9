# SPDX-License-Identifier: Apache-2.0
"""The matrix of docs/support.md: what the tests showed, and all of it."""

import importlib.util
import json
from pathlib import Path

import pytest

from nemo_dsv4_cp.automodel.contracts import TESTED_RELEASES
from tests.capabilities import CAPABILITIES

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("matrix", DOCS / "matrix.py")
matrix = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(matrix)

TESTS = """
    import pytest

    @pytest.mark.capability("LoRA")
    def test_works(): ...

    @pytest.mark.capability("LoRA")
    def test_is_left_out():
        pytest.skip("ratio 4")

    @pytest.mark.capability("multi-token prediction")
    @pytest.mark.skipif(True, reason="shown by the next test")
    def test_is_shown_elsewhere(): ...

    @pytest.mark.capability("multi-token prediction", refused=True)
    def test_is_refused(): ...

    @pytest.mark.capability("knowledge distillation")
    def test_works_in_part(record_property):
        record_property("but", "on the first step alone")

    @pytest.mark.capability("attention layers, 1 to 8 ranks", "training, one document per row")
    def test_does_not_work():
        assert False

    @pytest.mark.capability("training, one document per row")
    def test_works_otherwise(): ...
"""


def test_what_tests_showed_is_written_by_capability(pytester):
    pytester.makepyfile(TESTS)
    pytester.runpytest("-p", "tests.capabilities", "--matrix", "found.json")
    found = json.loads((pytester.path / "found.json").read_text())
    assert found["packages"]["nemo_automodel"]
    assert found["capabilities"] == {
        "attention layers, 1 to 8 ranks": "fails",
        "training, one document per row": "fails",
        "expert parallelism and activation checkpointing": "not tested: no test ran",
        "packed documents and gradient accumulation": "not tested: no test ran",
        "multi-token prediction": "refused",
        "pipeline parallelism": "not tested: no test ran",
        "LoRA": "tested; not ratio 4",
        "knowledge distillation": "tested; but on the first step alone",
        "checkpoints, with the plugin and without": "not tested: no test ran",
    }


def test_a_capability_that_the_matrix_does_not_have_is_refused(pytester):
    pytester.makepyfile(
        'import pytest\n@pytest.mark.capability("levitation")\ndef test_it(): ...\n'
    )
    done = pytester.runpytest("-p", "tests.capabilities")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*levitation*"])


def test_cells_are_short_and_notes_hold_the_rest():
    results = [
        {
            "packages": {"nemo_automodel": release, "torch": "2.13.0+cpu", "transformers": "1"},
            "capabilities": {"X": cell},
        }
        for release, cell in [
            ("2.0", "tested; but not ratio 4"),
            ("1.0", "not tested: no test ran"),
        ]
    ]
    assert matrix.matrix(results).splitlines() == [
        "|  | AutoModel 2.0 | AutoModel 1.0 |",
        "| --- | --- | --- |",
        "| torch | 2.13.0 | 2.13.0 |",
        "| transformers | 1 | 1 |",
        "| X | tested [1] | not tested [2] |",
        "",
        "[1] not ratio 4  ",
        "[2] no test ran",
    ]


def test_the_matrix_is_written_between_the_marks_of_its_page_newest_first(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.START}old\n{matrix.END}after\n")
    found = []
    for release, torch in [("0.9.0", "2.13.0"), ("0.10.0", "2.13.0"), ("0.10.0", "2.8.0")]:
        packages = {"nemo_automodel": release, "torch": torch, "transformers": "1"}
        found.append(tmp_path / f"{release}-{torch}.json")
        found[-1].write_text(json.dumps({"packages": packages, "capabilities": {"X": "tested"}}))
    monkeypatch.setattr(matrix, "PAGE", page)
    matrix.main(list(map(str, found)))
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", matrix.START.strip()]
    assert lines[-2:] == [matrix.END.strip(), "after"]
    assert "|  | AutoModel 0.10.0 | AutoModel 0.10.0 | AutoModel 0.9.0 |" in lines
    assert "| torch | 2.13.0 | 2.8.0 | 2.13.0 |" in lines
    assert "| X | tested | tested | tested |" in lines and "old" not in lines


def test_the_page_has_every_release_and_capability_and_none_fails():
    text = matrix.PAGE.read_text()
    block = text[text.index(matrix.START) : text.index(matrix.END)]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in block.splitlines()
        if line.startswith("|")
    ]
    assert rows[0][1:] == [f"AutoModel {release}" for release in TESTED_RELEASES]
    assert tuple(row[0] for row in rows[4:]) == CAPABILITIES
    assert "fails" not in block
