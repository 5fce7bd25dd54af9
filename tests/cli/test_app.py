# SPDX-License-Identifier: Apache-2.0
"""Commands through their installed entry point, as a user runs them, and the demo."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_dsv4_cp.cli import demo

COMMAND = str(Path(sys.executable).with_name("nemo-dsv4-cp"))


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--help"], "Context parallelism for DeepSeek-V4 in NeMo AutoModel"),
        (["plan", "v4_pro", "--seq-len", "131072", "--ranks", "16"], "Smallest cp_size that fits"),
        (["compose", "pro_sft", "parallel=one_node_8"], "ep_size: 8"),
        (["bench", "bytes", "--seq-len", "1024", "--cp-size", "2", "--ratio", "0"], "boundary"),
    ],
)
def test_a_command_answers(arguments, printed):
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    assert printed in " ".join(done.stdout.split())


@pytest.mark.parametrize(("losses", "status"), [([2.0, 1.0], 0), ([1.0, 2.0], 1)])
def test_the_demo_keeps_its_files_only_where_something_is_wrong(
    losses, status, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "_train_with_bar", lambda *_: demo.Training(losses, 1.0))
    assert demo.main() == status
    kept = list(tmp_path.iterdir())
    assert len(kept) == status
    assert all(f"Kept: {directory}" in capsys.readouterr().out for directory in kept)
