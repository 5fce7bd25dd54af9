# SPDX-License-Identifier: Apache-2.0
"""What the documents show is run, parsed or looked up."""

import ast
import dataclasses
import functools
import pkgutil
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer
import yaml

import nemo_dsv4_cp
from nemo_dsv4_cp import ContextParallelOptions
from nemo_dsv4_cp.checks.batch_rules import MESSAGES
from nemo_dsv4_cp.cli.app import app

ROOT = Path(__file__).parents[1]
PACKAGE = Path(nemo_dsv4_cp.__file__).parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
SOURCE = re.compile(r"[\w/.]+(\.py|/)")
DOTTED = re.compile(r"nemo_dsv4_cp(\.\w+)+")
FRONT_PAGE_LINES = 150
ENTRANCES = ("python -m nemo_dsv4_cp ", "nemo-dsv4-cp ")
PLACEHOLDER = "\0"
# The errors of commands are the commands' own matter: typer shows them with the option.
FOLDERS = (
    "checks",
    "sequence",
    "exchange",
    "attention",
    "kernels",
    "kernels/reference",
    "kernels/triton",
    "automodel",
)
TRAINING = ["*.py", *(f"{folder}/*.py" for folder in FOLDERS), "bench/profiling.py"]


def blocks(*languages):
    """Every fenced block of these languages, with a name that states where it is."""
    return [
        pytest.param(text, id=f"{document.name}:{source[: match.start()].count(chr(10)) + 1}")
        for document in DOCUMENTS
        for source in [document.read_text()]
        for match in FENCE.finditer(source)
        for language, text in [match.groups()]
        if language in languages
    ]


def shown_commands():
    """Every command of ours in a shell block or in inline code."""
    found = []
    for document in DOCUMENTS:
        source = document.read_text()
        shells = [text for language, text in FENCE.findall(source) if language in ("sh", "bash")]
        lines = [line for text in shells for line in text.replace("\\\n", " ").splitlines()]
        lines += [code for _, code in CODE.findall(FENCE.sub("", source))]
        for line in map(str.strip, lines):
            if line.startswith(ENTRANCES):
                found.append(pytest.param(line, id=f"{document.name}: {line}"))
    return found


def resolve(line):
    """Say what is wrong with a command line, None if it names things that exist."""
    words = shlex.split(line.removeprefix("python -m "), comments=True)[1:]
    command = typer.main.get_command(app)
    # By its methods: typer may bring a click of its own.
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
    options = [(*parameter.opts, *parameter.secondary_opts) for parameter in command.params]
    known = {"--help"}.union(*options)
    unknown = [word for word in words if word.startswith("-") and word.split("=")[0] not in known]
    return f"{command.name} has no {unknown}" if unknown else None


def anchors(document):
    """The names by which a link reaches the headings of a page, as GitHub makes them."""
    headings = HEADING.findall(FENCE.sub("", document.read_text()))
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def is_there(name):
    """Whether a dotted name is a module, what is in one, or a group of entry points."""
    if entry_points(group=name):
        return True
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def excerpts():
    """The inline code in the first column of the tables headed `message`."""
    found, inside = [], False
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        inside = line.startswith("|") and (inside or line.startswith("| message |"))
        code = CODE.search(line.split("|")[1]) if inside else None
        if code:
            found.append(code[2].strip())
    return found


def _message(node):
    """Return the text of a string expression, PLACEHOLDER for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else PLACEHOLDER
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_message, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _message(node.left) + _message(node.right)
    return PLACEHOLDER


def _normal(text):
    return " ".join(text.split())


@functools.cache
def source_strings():
    """Every string of the package's source."""
    trees = (ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py")))
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds))
    return {_normal(_message(node)) for node in nodes}


def raised_messages():
    """The messages of the errors that a training may end with."""
    yield from (_normal(re.sub(r"{\w+}", PLACEHOLDER, text)) for text in MESSAGES.values())
    paths = sorted({path for pattern in TRAINING for path in PACKAGE.glob(pattern)})
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            kind = getattr(node.exc.func, "id", "")
            if kind in ("ValueError", "RuntimeError", "NotImplementedError", "KeyError"):
                yield _normal(_message(node.exc.args[0]))


def holds(message, excerpt):
    """Whether the excerpt's pieces, between its `...`, stand in the message in their order."""
    place = 0
    for piece in map(_normal, excerpt.split("...")):
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "<document>", "exec"), {"__name__": "document"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_parse_and_their_options_are_accepted(text):
    tree = yaml.safe_load(text)
    for section in ("model", "teacher_model"):
        config = ((tree or {}).get(section) or {}).get("config") or {}
        if str(config.get("_target_", "")).startswith("nemo_dsv4_cp"):
            ContextParallelOptions.from_block(config.get("context_parallel"))


@pytest.mark.parametrize("line", shown_commands())
def test_shown_commands_and_their_options_exist(line):
    assert resolve(line) is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nemo-dsv4-cp nothing", "there is no command nothing"),
        ("python -m nemo_dsv4_cp bench memory --length 3", "memory has no ['--length']"),
    ],
)
def test_commands_that_do_not_exist_are_noticed(line, complaint):
    assert resolve(line) == complaint


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files_and_headings(document):
    links = LINK.findall(FENCE.sub("", document.read_text()))
    astray = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            astray.append(link)
    assert astray == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_modules_named_in_inline_code_exist(document):
    named = [code for _, code in CODE.findall(FENCE.sub("", document.read_text()))]
    files = [code for code in named if SOURCE.fullmatch(code)]
    modules = [code for code in named if DOTTED.fullmatch(code)]
    # From the root or the package; a table of how_it_works.md is about automodel/ alone.
    places = (ROOT, PACKAGE, PACKAGE / "automodel")
    assert [f for f in files if not any((place / f).exists() for place in places)] == []
    assert [module for module in modules if not is_there(module)] == []


def test_the_front_page_fits_its_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= FRONT_PAGE_LINES


def test_the_front_page_shows_every_yaml_key_and_its_default():
    page = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+|{.*?})` \|", page, re.MULTILINE)
    shown = {key: yaml.safe_load(default) for key, default in rows}
    assert shown == dataclasses.asdict(ContextParallelOptions())


@pytest.mark.parametrize("excerpt", excerpts())
def test_message_excerpts_are_in_the_source(excerpt):
    assert any(holds(message, excerpt) for message in source_strings())


def test_every_error_of_a_training_is_in_the_list():
    shown = excerpts()
    missing = [m for m in raised_messages() if not any(holds(m, excerpt) for excerpt in shown)]
    assert [message.replace(PLACEHOLDER, "...") for message in missing] == []
