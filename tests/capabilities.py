# SPDX-License-Identifier: Apache-2.0
"""Collects what the tests show of each capability: ``pytest --matrix FILE`` writes it as JSON."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (
    "attention layers, 1 to 8 ranks",
    "training, one document per row",
    "expert parallelism and activation checkpointing",
    "packed documents and gradient accumulation",
    "multi-token prediction",
    "pipeline parallelism",
    "LoRA",
    "knowledge distillation",
    "checkpoints, with the plugin and without",
)
PACKAGES = ("nemo_automodel", "transformers", "torch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, help="write what was tested, by capability, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "capability(*names, refused): what of the support matrix the test shows"
    )
    if config.getoption("--matrix"):
        config.pluginmanager.register(_Collector(config.getoption("--matrix")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        unknown = {name for mark in item.iter_markers("capability") for name in mark.args}
        if unknown := unknown.difference(CAPABILITIES):
            raise pytest.UsageError(f"{item.nodeid} shows {unknown}, which CAPABILITIES has not")


class _Collector:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, list[str]] = {name: [] for name in CAPABILITIES}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        if report.when == "call" or not report.passed:
            for mark in item.iter_markers("capability"):
                outcome = _outcome(report, mark.kwargs.get("refused", False))
                for name in mark.args if outcome else ():
                    self._seen[name].append(outcome)
        return report

    def pytest_sessionfinish(self) -> None:
        found = {name: _summary(outcomes) for name, outcomes in self._seen.items()}
        packages = {name: version(name) for name in PACKAGES}
        self._path.write_text(json.dumps({"packages": packages, "capabilities": found}, indent=2))


def _outcome(report: pytest.TestReport, refused: bool) -> str | None:
    """What one test showed; None if another shows it on this release."""
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        return None if reason.startswith("shown by") else f"not tested: {reason}"
    if report.failed:
        return "fails"
    limits = [str(value) for name, value in report.user_properties if name == "but"]
    return "; but ".join(["refused" if refused else "tested", *limits])


def _summary(outcomes: list[str]) -> str:
    """The worst that was seen; what was left out is listed beside what was tested."""
    for worst in ("fails", "refused"):
        if worst in outcomes:
            return worst
    skipped = sorted({outcome for outcome in outcomes if outcome.startswith("not tested")})
    tested = sorted({outcome for outcome in outcomes if outcome.startswith("tested")})
    if tested and skipped:
        return f"{tested[-1]}; not {skipped[0].removeprefix('not tested: ')}"
    return (tested[-1] if tested else "; ".join(skipped)) or "not tested: no test ran"
