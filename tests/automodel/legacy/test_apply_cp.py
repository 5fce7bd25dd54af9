# SPDX-License-Identifier: Apache-2.0
"""AutoModel's ``apply_cp`` leaves out models with a CP attention of their own, and no others."""

import types

import pytest
from nemo_automodel.components.moe import parallelizer

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.automodel.legacy import cp_utils_hook


@pytest.fixture
def set_up(monkeypatch):  # whose change is taken back after ours
    """The models that AutoModel sets up, its own function standing in."""
    models = []
    patches.undo()
    monkeypatch.setattr(parallelizer, "apply_cp", lambda model, cp_mesh: models.append(model))
    yield models
    patches.undo()


def test_only_models_without_a_cp_attention_of_their_own_are_automodel(set_up):
    cp_utils_hook.leave_out_own_cp_attention()
    cp_utils_hook.leave_out_own_cp_attention()
    ours, other = types.SimpleNamespace(_owns_cp_attention=True), types.SimpleNamespace()
    for model in (ours, other):
        parallelizer.apply_cp(model, "mesh")
    assert set_up == [other]


def test_undoing_gives_automodels_function_back(set_up):
    original = parallelizer.apply_cp
    cp_utils_hook.leave_out_own_cp_attention()
    assert parallelizer.apply_cp is not original
    patches.undo()
    assert parallelizer.apply_cp is original
