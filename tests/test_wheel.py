# SPDX-License-Identifier: Apache-2.0
"""What is published: the wheel's files, and what it declares."""

import ast
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nemo_dsv4_cp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemo_dsv4_cp"
# Imported by what is of use with the extra alone.
EXTRAS = {"matplotlib": "plot", "triton": "triton"}
NEEDS_TRITON = (PACKAGE / "kernels" / "triton", PACKAGE / "tools" / "ahead.py")


def tracked():
    """The files of the package by their paths from the root, without what Python writes there."""
    if (ROOT / ".git").exists():
        listed = subprocess.check_output(["git", "ls-files", PACKAGE.name], cwd=ROOT, text=True)
        # A file that was deleted and not yet committed is listed too.
        return {name for name in listed.splitlines() if (ROOT / name).exists()}
    paths = (path for path in PACKAGE.rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def imports(path):
    """The top-level modules that a file imports, each with whether a function imports it."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        yield from ((name.partition(".")[0], id(node) in inside) for name in names)


def imported_distributions():
    """The distributions that the package imports, by what installed ones say of their modules."""
    modules = {name for path in PACKAGE.rglob("*.py") for name, _ in imports(path)}
    modules -= sys.stdlib_module_names | {PACKAGE.name}
    owners = packages_distributions()
    return {canonicalize_name(owners[module][0]) for module in modules}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked: built offline, as a release is, from an sdist of a copy of the tree."""
    work = tmp_path_factory.mktemp("wheel")
    for name in [*tracked(), "pyproject.toml", "README.md", "LICENSE"]:
        copy = work / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    command = ["-m", "build", "--no-isolation", "--outdir", str(work / "dist"), "."]
    done = subprocess.run(
        [sys.executable, *command], cwd=work / "tree", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (work / "dist").glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    with ZipFile(built) as archive:
        archive.extractall(work / "unpacked")
    return work / "unpacked"


@pytest.fixture(scope="module")
def declared(wheel):
    """The wheel's metadata."""
    (info,) = wheel.glob("*.dist-info")
    return Distribution.at(info)


def test_the_wheel_holds_the_tracked_files_of_the_package_and_no_others(wheel):
    files = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    held = {str(file) for file in files if not file.parts[0].endswith(".dist-info")}
    assert held == tracked()
    assert "nemo_dsv4_cp/py.typed" in held
    assert {file.name for file in files if file.suffix == ""} >= {"LICENSE", "METADATA"}


def test_what_the_package_imports_is_what_the_wheel_requires(declared):
    requires = [Requirement(line) for line in declared.requires]
    always = {canonicalize_name(each.name) for each in requires if each.marker is None}
    assert always == imported_distributions() - set(EXTRAS)
    for name, extra in EXTRAS.items():
        of_extra = [each for each in requires if canonicalize_name(each.name) == name]
        assert any(each.marker.evaluate({"extra": extra}) for each in of_extra)


def test_requirements_pin_nothing_that_is_installed(declared):
    requires = [Requirement(line) for line in declared.requires]
    assert {each.operator for one in requires for each in one.specifier} == {">="}


def test_what_extras_bring_is_imported_where_it_is_used_alone():
    for path in PACKAGE.rglob("*.py"):
        needs_triton = any(path.is_relative_to(place) for place in NEEDS_TRITON)
        allowed = {"triton"} if needs_triton else set()
        early = {name for name, in_function in imports(path) if not in_function}
        assert early & set(EXTRAS) <= allowed, path


def test_the_version_is_stated_once(declared):
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert declared.version == stated == nemo_dsv4_cp.__version__
    assert f"## [{stated}]" in (ROOT / "CHANGELOG.md").read_text()
    assert [path for path in PACKAGE.rglob("*.py") if f'"{stated}"' in path.read_text()] == []


def test_links_lead_to_one_repository(declared):
    links = dict(line.split(", ") for line in declared.metadata.get_all("Project-URL"))
    assert set(links) == {"Homepage", "Documentation", "Issues", "Changelog"}
    assert all(link.startswith(links["Homepage"]) for link in links.values())
    for name, place in (("Documentation", "/tree/main/"), ("Changelog", "/blob/main/")):
        assert (ROOT / links[name].removeprefix(links["Homepage"] + place)).exists()
