# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md names files and targets that exist, and few of them per change."""

import re

import pytest

from tests.test_docs import CODE, LINK, PACKAGE, ROOT, anchors

PAGE = ROOT / "CONTRIBUTING.md"
TEXT = PAGE.read_text()
PATH = re.compile(r"[\w./-]+(\.(py|md|toml|txt)|/)|Makefile")
NAME = re.compile(r"(?!Makefile)_?[A-Za-z]\w+")
MOST_FILES = 5


def paths(text):
    return [code for _, code in CODE.findall(text) if PATH.fullmatch(code)]


def found(name):
    """The file of a path from the root or the package, if there is one."""
    return [at / name for at in (ROOT, PACKAGE) if (at / name).is_file()]


def changes():
    sections = TEXT.partition("## Where a change goes\n")[2].split("\n### ")[1:]
    return [pytest.param(section, id=section.partition("\n")[0]) for section in sections]


def test_every_path_exists():
    named = paths(TEXT) + [link.partition("#")[0] for link in LINK.findall(TEXT)]
    named = [name for name in named if "://" not in name and name != ".venv/"]
    assert len(named) > 50
    assert [name for name in named if not any((at / name).exists() for at in (ROOT, PACKAGE))] == []


def test_links_lead_to_headings():
    linked = [link.partition("#") for link in LINK.findall(TEXT) if "#" in link]
    assert linked
    for path, _, anchor in linked:
        assert anchor in anchors(ROOT / path)


@pytest.mark.parametrize("section", changes())
def test_a_change_touches_few_files(section):
    listed = "\n".join(line for line in section.splitlines() if line.startswith("- "))
    files = {name for name in paths(listed) if not name.endswith("/")}
    assert 2 < len(files) <= MOST_FILES


@pytest.mark.parametrize("section", changes())
def test_names_of_the_code_are_in_the_files_that_a_change_names(section):
    sources = "".join(file.read_text() for name in paths(section) for file in found(name))
    named = [code for _, code in CODE.findall(section) if NAME.fullmatch(code)]
    assert [name for name in named if name not in sources] == []
