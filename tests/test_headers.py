# SPDX-License-Identifier: Apache-2.0
"""Every source file names its license, once and first."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
KEY = "SPDX-License-" + "Identifier"
LINE = f"# {KEY}: Apache-2.0"


def test_every_file_starts_with_its_license():
    sources = [
        path for top in ("nemo_dsv4_cp", "tests", "docs") for path in (ROOT / top).rglob("*.py")
    ]
    assert len(sources) > 200
    texts = {path.relative_to(ROOT): path.read_text() for path in sources}
    assert [name for name, text in texts.items() if text.split("\n", 1)[0] != LINE] == []
    assert [name for name, text in texts.items() if text.count(KEY) != 1] == []
