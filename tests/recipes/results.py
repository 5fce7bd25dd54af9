# SPDX-License-Identifier: Apache-2.0
"""Collects what the tests found of each recipe option: ``pytest --recipes FILE`` writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OPTIONS = "recipe options"
FOUND = "found"
"""Properties that a test records: the names of its options, and what they do together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--recipes", type=Path, help="write what combined recipe options do, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    # With xdist only the process that receives the results of all tests writes.
    if config.getoption("--recipes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config.getoption("--recipes")))


class _Collector:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when != "call" or OPTIONS not in properties:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        found = properties.get(FOUND) or (crash.message if crash else "")
        self._found.append(
            {
                "options": properties[OPTIONS],
                "outcome": found.partition(";")[0] if report.passed else "fails",
                "found": found,
                "seconds": round(report.duration, 1),
            }
        )

    def pytest_sessionfinish(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._found, indent=1) + "\n")
