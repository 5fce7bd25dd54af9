"""Our batch function inside the host's of 0.5, which stands here as modules of the same names."""

import sys
import types

import pytest

from nemo_dsv4_cp.host import cp_utils_hook

NAME = "nemo_automodel.components.distributed.cp_utils"


class Mesh:
    mesh_dim_names = ("cp", "tp")

    def __getitem__(self, name):
        return f"{name} mesh"


class Model:
    """What the hook asks of a model."""

    def prepare_model_inputs_for_cp(self, batch):
        def shard_batch(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
            return "context", {"cut by": "ours", "for": (cp_mesh, tp_mesh, padding_token_id)}, None

        return {"cp_sharder": types.SimpleNamespace(shard_batch=shard_batch)}


@pytest.fixture
def host(monkeypatch):
    """The host's module, and a recipe that imported the name before we came."""

    def make_cp_batch_and_ctx(
        device_mesh, batch, loss_mask=None, use_te=False, padding_token_id=0, num_chunks=1
    ):
        return "context", {"cut by": "host"}

    module = types.ModuleType(NAME)
    recipe = types.ModuleType("recipe")
    module.make_cp_batch_and_ctx = recipe.make_cp_batch_and_ctx = make_cp_batch_and_ctx
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setitem(sys.modules, "recipe", recipe)
    yield recipe
    cp_utils_hook.uninstall()


def test_our_models_batches_are_ours_whichever_module_imported_the_name_first(host):
    model = Model()
    cp_utils_hook.install(model)
    _, cut = host.make_cp_batch_and_ctx(Mesh(), {}, padding_token_id=7)
    assert cut == {"cut by": "ours", "for": ("cp mesh", "tp mesh", 7)}
    assert sys.modules[NAME].make_cp_batch_and_ctx is host.make_cp_batch_and_ctx


def test_any_other_models_batches_are_the_hosts(host):
    model = Model()
    cp_utils_hook.install(model)
    del model  # only other models are left
    assert host.make_cp_batch_and_ctx(Mesh(), {})[1] == {"cut by": "host"}


def test_a_function_in_the_batch_comes_first(host):
    model = Model()
    cp_utils_hook.install(model)

    def mine(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
        return None, {"cut by": "the batch's", "mask": loss_mask}

    _, cut = host.make_cp_batch_and_ctx(Mesh(), {"_cp_make_batch_fn": mine}, "mask")
    assert cut == {"cut by": "the batch's", "mask": "mask"}


def test_installing_again_changes_nothing_and_uninstalling_gives_the_hosts_back(host):
    original, models = host.make_cp_batch_and_ctx, [Model(), Model()]
    for model in models:
        cp_utils_hook.install(model)
    wrapped = host.make_cp_batch_and_ctx
    assert wrapped.__wrapped__ is original
    cp_utils_hook.uninstall()
    assert host.make_cp_batch_and_ctx is original


def test_a_host_that_takes_other_arguments_is_refused_by_name(host):
    sys.modules[NAME].make_cp_batch_and_ctx = lambda batch: None
    with pytest.raises(RuntimeError, match=r"cp_utils.make_cp_batch_and_ctx takes \['batch'\]"):
        cp_utils_hook.install(Model())
