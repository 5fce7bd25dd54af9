# SPDX-License-Identifier: Apache-2.0
"""The one place where process groups are made."""

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import nemo_dsv4_cp
from nemo_dsv4_cp.exchange.collectives import cp_rank, cp_size, process_group
from nemo_dsv4_cp.exchange.gather import all_gather

PACKAGE = Path(nemo_dsv4_cp.__file__).parent


def test_a_fake_group_is_any_rank_of_any_number():
    with process_group("fake", rank=5, size=8) as group:
        assert (cp_rank(group), cp_size(group)) == (5, 8)
        assert all_gather(torch.ones(2, 3), dim=0, cp_group=group).shape == (16, 3)
    assert not dist.is_initialized()


def test_a_group_is_taken_down_after_an_error_too():
    with pytest.raises(ZeroDivisionError), process_group("fake", rank=0, size=2):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def uses_torch_distributed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        if any(name.startswith("torch.distributed") and "DTensor" not in name for name in names):
            return True
    return False


def test_only_the_collectives_call_torch_distributed():
    callers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if uses_torch_distributed(path)
    }
    assert {name for name in callers if not name.startswith("automodel/")} == {
        "exchange/collectives.py"
    }
