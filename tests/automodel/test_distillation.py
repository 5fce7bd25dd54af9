# SPDX-License-Identifier: Apache-2.0
"""The distillation recipe under CP: batches cut by the model, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from nemo_automodel.components.distributed.context_parallel.sharder import ContextParallelSharder
from nemo_automodel.recipes.llm import kd

from nemo_dsv4_cp.automodel import distillation, patches
from nemo_dsv4_cp.automodel.contracts import UnsupportedAutoModel
from nemo_dsv4_cp.automodel.distillation import DistillationSharder


@pytest.fixture
def recipe(monkeypatch):  # whose own changes are taken back after ours
    """The recipe's module as AutoModel ships it."""
    patches.undo()
    yield kd
    patches.undo()


def test_labels_are_cut_in_place_as_the_recipe_expects(recipe):
    distillation.install()
    assert recipe.ContextParallelSharder is DistillationSharder

    def shard_batch(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
        return None, {"labels": loss_mask[:, 2:] * 1}, None

    model = SimpleNamespace(
        _owns_cp_attention=True,
        supports_thd=True,
        prepare_model_inputs_for_cp=lambda batch, num_chunks: {
            "cp_sharder": ContextParallelSharder(shard_batch=shard_batch)
        },
    )
    labels = torch.arange(4)[None]
    sharder = recipe.ContextParallelSharder(
        model, None, {"qkv_format": "thd"}, loss_mask=labels, invoke_pre_embed=False
    )
    _, batch = sharder.shard({})
    assert labels.tolist() == [[2, 3]]
    assert "labels" not in batch


def test_a_teacher_that_does_not_see_across_the_cuts_is_refused(recipe, monkeypatch):
    teacher = SimpleNamespace(_cp_size_of_job=2)
    monkeypatch.setattr(kd, "_build_teacher_model", lambda: teacher)
    distillation.install()
    with pytest.raises(ValueError, match=r"teacher SimpleNamespace .* give teacher_model"):
        recipe._build_teacher_model()


def test_another_recipe_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(kd, "ContextParallelSharder", object)
    with pytest.raises(UnsupportedAutoModel, match=r"llm\.kd cuts batches in a way of its own"):
        distillation.install()
