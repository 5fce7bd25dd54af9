# SPDX-License-Identifier: Apache-2.0
import importlib.util
import inspect
import sys

import pytest
import torch
from nemo_automodel._transformers import auto_model
from nemo_automodel.components.distributed.pipelining import functional as pipelining
from nemo_automodel.components.models.deepseek_v4 import model as deepseek_v4
from nemo_automodel.components.moe import parallelizer
from nemo_automodel.recipes.llm import kd, train_ft
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nemo_dsv4_cp.automodel import cpu, patches

PATCHED = {
    train_ft: "torch",
    kd: "torch",
    auto_model: "torch",
    deepseek_v4: "torch",
    pipelining: "torch",
    parallelizer: "apply_cp",
}


@pytest.fixture
def no_cuda(monkeypatch):
    """A process whose torch sees no CUDA, and whose AutoModel is put back afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    patches.undo()
    torch.compiler.set_stance("default")


def patched():
    return [getattr(module, name) for module, name in PATCHED.items()]


def test_automodels_unchecked_cuda_calls_return_the_cpu_or_do_nothing(no_cuda):
    cpu.lift_cuda_assumptions()
    train_ft.torch.cuda.reset_peak_memory_stats()
    train_ft.torch.cuda.empty_cache()
    assert train_ft.torch.cuda.max_memory_allocated() == 0
    view = auto_model.torch
    assert view.cuda.current_device() == torch.device("cpu")
    assert view.device("cuda", view.cuda.current_device()) == torch.device("cpu")
    view = deepseek_v4.torch
    assert view.device(f"cuda:{view.cuda.current_device()}") == torch.device("cpu")
    pipelining.torch.cuda.synchronize(torch.device("cpu"))


def test_torch_itself_and_all_else_in_it_stay_as_they_are(no_cuda):
    functions = (torch.device, torch.cuda.current_device, torch.cuda.reset_peak_memory_stats)
    cpu.lift_cuda_assumptions()
    assert functions == (
        torch.device,
        torch.cuda.current_device,
        torch.cuda.reset_peak_memory_stats,
    )
    assert train_ft.torch.no_grad is torch.no_grad
    assert auto_model.torch.cuda.Stream is torch.cuda.Stream


def test_lifting_twice_changes_nothing_more(no_cuda):
    cpu.lift_cuda_assumptions()
    once = patched()
    cpu.lift_cuda_assumptions()
    assert all(a is b for a, b in zip(once, patched(), strict=True))


def test_what_was_lifted_is_given_back_and_can_be_lifted_again(no_cuda):
    before = patched()
    for _ in range(2):
        cpu.lift_cuda_assumptions()
        assert not any(a is b for a, b in zip(before, patched(), strict=True))
        patches.undo()
        assert all(a is b for a, b in zip(before, patched(), strict=True))


def test_with_cuda_lifting_is_refused(no_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = patched()
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        cpu.lift_cuda_assumptions()
    assert patched() == before


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (train_ft, "torch.cuda.reset_peak_memory_stats()"),
        (auto_model, 'torch.device("cuda", torch.cuda.current_device())'),
        (auto_model, "device = torch.cuda.current_device()"),
        (deepseek_v4, 'torch.device(f"cuda:{torch.cuda.current_device()}")'),
        (parallelizer, "from transformer_engine.pytorch.attention import DotProductAttention"),
    ],
)
def test_a_release_that_changed_is_named_and_left_alone(no_cuda, monkeypatch, module, code):
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: source(of).replace(code, "changed"))
    before = patched()
    with pytest.raises(RuntimeError) as error:
        cpu.lift_cuda_assumptions()
    for part in (module.__name__, code, "written for 0.7.0"):
        assert part in str(error.value)
    assert patched() == before


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="needs no stand-in"
)
def test_apply_cp_sets_up_a_models_own_attention_without_transformer_engine(no_cuda):
    class Attention(torch.nn.Module):
        def setup_cp_attention(self, cp_mesh):
            self.cp_mesh = cp_mesh

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    block = torch.nn.Module()
    block.self_attn, block.mlp = Attention(), torch.nn.Identity()
    model.model.layers = torch.nn.ModuleList([block])

    with pytest.raises(ModuleNotFoundError, match="transformer_engine"):
        parallelizer.apply_cp(model, "mesh")
    cpu.lift_cuda_assumptions()
    parallelizer.apply_cp(model, "mesh")
    assert block.self_attn.cp_mesh == "mesh"
    assert not [name for name in sys.modules if name.startswith("transformer_engine")]


class Drawn(torch.nn.Module):
    """Initialised as AutoModel does it: one weight as a whole, the other shard by shard."""

    def __init__(self):
        super().__init__()
        self.whole = torch.nn.Linear(3, 7, bias=False, device="meta")
        self.sharded = torch.nn.Linear(5, 4, bias=False, device="meta")

    def initialize_weights(self, dtype):
        torch.nn.init.normal_(self.whole.weight)
        weight = self.sharded.weight
        (weight.to_local() if isinstance(weight, DTensor) else weight).normal_()


def weights(seed, group=None, rank=0, **kwargs):
    def apply_model_infrastructure(model, **kwargs):
        if group is not None:
            fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        model.to_empty(device="cpu")
        torch.manual_seed(rank)
        model.initialize_weights(torch.float32)
        return model

    model = cpu._with_weights_of_seed(apply_model_infrastructure, seed)(Drawn(), **kwargs)
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return [weight.tolist() for weight in whole]


def weights_of_rank(group, rank, seed):
    return weights(seed, group, rank)


@pytest.mark.parametrize("count", [2, 3])
def test_first_weights_are_the_seeds_on_any_number_of_ranks(ranks, count):
    assert ranks.run(weights_of_rank, count, 7) == [weights(7)] * count
    assert weights(7) != weights(8)


def test_weights_that_are_loaded_are_not_drawn_again():
    loaded = [weights(seed, load_base_model=True) for seed in (7, 8)]
    assert loaded[0] == loaded[1]


@pytest.mark.parametrize("cuda", [False, True])
def test_the_recipe_lifts_only_where_there_is_no_cuda(no_cuda, monkeypatch, cuda):
    during_setup = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    automodels_recipe = train_ft.TrainFinetuneRecipeForNextTokenPrediction
    monkeypatch.setattr(
        automodels_recipe,
        "setup",
        lambda recipe: during_setup.append((recipe, auto_model.apply_model_infrastructure)),
    )
    infrastructure = auto_model.apply_model_infrastructure
    before = patched()
    recipe = cpu.CpuFinetuneRecipe({"seed": 3})
    recipe.setup()
    ((set_up, used),) = during_setup
    assert set_up is recipe
    assert (used is infrastructure) is cuda
    assert auto_model.apply_model_infrastructure is infrastructure
    assert (patched() == before) is cuda
