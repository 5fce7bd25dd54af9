# SPDX-License-Identifier: Apache-2.0
"""The workflows of .github parse, and run what is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
TRIGGERS = True  # what YAML 1.1 makes of the key `on`


def steps(workflow):
    tree = yaml.safe_load(workflow.read_text())
    return [step for job in tree["jobs"].values() for step in job["steps"]]


def test_pushes_and_pull_requests_run_the_tests_and_nights_run_all():
    ci, nightly = (
        yaml.safe_load((FOLDER / f"{name}.yml").read_text()) for name in ("ci", "nightly")
    )
    assert set(ci[TRIGGERS]) == {"push", "pull_request"}
    assert nightly[TRIGGERS]["schedule"][0]["cron"]
    commands = [[step.get("run") for step in steps(workflow)] for workflow in WORKFLOWS]
    assert "make test PYTHON=python" in commands[0]
    assert "make test-all PYTHON=python" in commands[1]


def test_ci_runs_every_python_that_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    ci = yaml.safe_load((FOLDER / "ci.yml").read_text())
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python-version"] == named
    assert project["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_major_version_and_jobs_end(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action)] == []
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        assert job["timeout-minutes"] > 0
        assert job["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_cached_downloads_depend_on_files_that_exist(workflow):
    cached = [step["with"] for step in steps(workflow) if "cache" in step.get("with", {})]
    assert cached
    for each in cached:
        assert all((ROOT / name).exists() for name in each["cache-dependency-path"].split())


@pytest.mark.parametrize("page", [*WORKFLOWS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:run: |`)make ([\w-]+)", page.read_text())) <= set(targets)
