# SPDX-License-Identifier: Apache-2.0
"""Our batch function inside AutoModel's of 0.5, which stands here as modules of the same names."""

import sys
import types

import pytest

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.automodel.legacy import cp_utils_hook

NAME = "nemo_automodel.components.distributed.cp_utils"


class Mesh:
    mesh_dim_names = ("cp", "tp")

    def __init__(self, size=2):
        self._size = size

    def __getitem__(self, name):
        return Mesh(self._size)

    def size(self):
        return self._size


class Model:
    """What the hook needs of a model."""

    _owns_cp_attention = True

    def prepare_model_inputs_for_cp(self, batch):
        def shard_batch(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
            cut = {"cut by": "ours", "meshes": (cp_mesh.size(), tp_mesh.size())}
            return "context", cut | {"padding": padding_token_id}, None

        return {"cp_sharder": types.SimpleNamespace(shard_batch=shard_batch)}


class Recipe:
    """A recipe of AutoModel, in a module that imported the function before we came."""

    def __init__(self, make_cp_batch_and_ctx, *model_parts):
        self.make, self.model_parts = make_cp_batch_and_ctx, list(model_parts)

    def cut(self, batch, size=2):
        return self.make(Mesh(size), batch, padding_token_id=7)[1]


@pytest.fixture
def automodel(monkeypatch):
    """AutoModel's module, and a recipe's that imported the name before we came."""

    def make_cp_batch_and_ctx(
        device_mesh, batch, loss_mask=None, use_te=False, padding_token_id=0, num_chunks=1
    ):
        return "context", {"cut by": "AutoModel", "chunks": num_chunks}

    patches.undo()
    module = types.ModuleType(NAME)
    recipe = types.ModuleType("recipe")
    module.make_cp_batch_and_ctx = recipe.make_cp_batch_and_ctx = make_cp_batch_and_ctx
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setitem(sys.modules, "recipe", recipe)
    cp_utils_hook.install()
    yield recipe
    patches.undo()


LABELS = {"labels": "some"}


def test_our_models_batches_are_ours_whichever_module_imported_the_name_first(automodel):
    model = Model()
    cp_utils_hook.adopt(model)
    cut = Recipe(automodel.make_cp_batch_and_ctx, model).cut(dict(LABELS))
    assert cut == {"cut by": "ours", "meshes": (2, 2), "padding": 7}
    assert sys.modules[NAME].make_cp_batch_and_ctx is automodel.make_cp_batch_and_ctx


def test_any_other_models_batches_are_automodels_though_ours_lives_beside_it(automodel):
    ours, other = Model(), object()
    cp_utils_hook.adopt(ours)
    assert Recipe(automodel.make_cp_batch_and_ctx, other).cut({})["cut by"] == "AutoModel"
    assert Recipe(automodel.make_cp_batch_and_ctx, ours).cut(dict(LABELS))["cut by"] == "ours"


def test_a_model_inside_a_data_parallel_wrapper_is_found(automodel):
    ours = Model()
    cp_utils_hook.adopt(ours)
    wrapped = types.SimpleNamespace(module=ours)
    assert Recipe(automodel.make_cp_batch_and_ctx, wrapped).cut(dict(LABELS))["cut by"] == "ours"


def test_a_loop_without_a_recipe_trains_the_model_of_ours_that_lives(automodel):
    model = Model()
    cp_utils_hook.adopt(model)
    assert automodel.make_cp_batch_and_ctx(Mesh(), dict(LABELS))[1]["cut by"] == "ours"
    del model
    assert automodel.make_cp_batch_and_ctx(Mesh(), {}, None, False, 0, 4)[1]["chunks"] == 4


def test_a_recipe_that_keeps_its_labels_to_itself_is_refused_under_cp(automodel):
    ours = Model()
    cp_utils_hook.adopt(ours)
    recipe = Recipe(automodel.make_cp_batch_and_ctx, ours)
    with pytest.raises(NotImplementedError, match=r"without labels.*cp_size: 1"):
        recipe.cut({})
    assert recipe.cut({}, size=1)["cut by"] == "ours"


def test_a_function_in_the_batch_comes_first(automodel):
    model = Model()
    cp_utils_hook.adopt(model)

    def mine(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
        return None, {"cut by": "the batch's", "mask": loss_mask}

    _, cut = automodel.make_cp_batch_and_ctx(Mesh(), {"_cp_make_batch_fn": mine}, "mask")
    assert cut == {"cut by": "the batch's", "mask": "mask"}


def test_installing_again_changes_nothing_and_undoing_gives_automodels_back(automodel):
    wrapped = automodel.make_cp_batch_and_ctx
    original = wrapped.__wrapped__
    cp_utils_hook.install()
    assert automodel.make_cp_batch_and_ctx is wrapped
    assert not hasattr(original, "__wrapped__")
    late = types.ModuleType("late")
    late.make_cp_batch_and_ctx = sys.modules[NAME].make_cp_batch_and_ctx
    sys.modules["late"] = late
    patches.undo()
    del sys.modules["late"]
    for module in (automodel, late, sys.modules[NAME]):
        assert module.make_cp_batch_and_ctx is original
