"""What ``verify`` allows rounding, that it allows an error nothing, and what it leaves out."""

import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dsv4_cp.tools import recipes
from nemo_dsv4_cp.tools.verification import draw_weights, gradient_limit, left_out
from tests.parity import cpu_backend, tiny_config, worst


class DoublePrecision(TorchDispatchMode):
    """Whatever asks for float32 gets float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def host_model(seed):
    config = tiny_config([0, 4, 128, 4], index_topk=512)
    model = DeepseekV4ForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    draw_weights(model, seed)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    return model


def backward(model, seed, rows=1, seq_len=60):
    """Leave fresh gradients in the model and return its parameters that have one."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids, labels = (torch.randint(0, 97, (rows, seq_len), generator=generator) for _ in range(2))
    model.zero_grad()
    cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).backward()
    return {name: p for name, p in model.named_parameters() if p.grad is not None}


def is_scale(name):
    return name.endswith("scale")


def test_only_scales_are_allowed_more_than_5e_5_and_only_where_they_cancel():
    parameters = backward(host_model(31), 31)
    limits = {name: gradient_limit(name, parameters) for name in parameters}
    assert sum(map(is_scale, limits)) == 9
    assert {limit for name, limit in limits.items() if not is_scale(name)} == {5e-5}
    assert min(limits.values()) == 5e-5
    assert limits["model.layers.3.attn_hc.scale"] == 5e-5  # hardly cancels
    assert 1e-3 < limits["model.hc_head.hc_scale"] < 1e-2  # to a two-thousandth


@pytest.mark.parametrize("name", ["model.layers.2.ffn_hc.scale", "model.hc_head.hc_scale"])
def test_the_terms_by_which_a_scale_is_judged_add_up_to_its_gradient(name):
    parameters = backward(host_model(0), 0)
    scale, fn = parameters[name], parameters[name.removesuffix("scale") + "fn"]
    parts = (fn * fn.grad).sum(dim=1).split([2] if scale.numel() == 1 else [2, 2, 4])
    sums = torch.stack([part.sum() for part in parts]).detach() / scale.detach()
    assert worst(sums, scale.grad) < gradient_limit(name, parameters)


def test_the_limit_of_a_scale_follows_its_most_cancelled_sum():
    eps = torch.finfo(torch.float32).eps
    scale, fn = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((3,), (3, 2)))
    fn.grad = torch.tensor([[1.0, -1.0], [300.0, -299.0], [2.0, 0.0]])  # one stream: 1 + 1 + 1 rows
    scale.grad = torch.tensor([0.0, 1.0, 2.0])
    parameters = {"layers.0.attn_hc.scale": scale, "layers.0.attn_hc.fn": fn}
    limit = gradient_limit("layers.0.attn_hc.scale", parameters)
    assert limit == pytest.approx(16 * eps * 599 / 2)
    assert gradient_limit("layers.0.attn_hc.fn", parameters) == 5e-5


@pytest.mark.parametrize(("rows", "seq_len", "seed"), [(1, 60, 31), (2, 60, 6), (1, 61, 28)])
def test_the_hosts_own_rounding_is_within_what_is_allowed(rows, seq_len, seed):
    model = host_model(seed)
    parameters = backward(model, seed, rows, seq_len)
    single = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    limits = {name: gradient_limit(name, parameters) for name in parameters}
    with torch.compiler.set_stance("force_eager"), DoublePrecision():
        double = backward(model.double(), seed, rows, seq_len)
    for name, limit in limits.items():
        assert double[name].grad.dtype == torch.float64
        assert worst(single[name], double[name].grad) <= limit, name


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({}, []),
        ({"peft": {"dim": 8}}, ["LoRA (peft)"]),
        ({"peft": None, "fp8": {"enabled": False}}, []),
        ({"fp8": {"enabled": True}}, ["FP8 (fp8)"]),
        ({"quantization": {"load_in_4bit": True}}, ["quantisation (quantization)"]),
        ({"distributed": {"pp_size": 2}}, ["pipeline stages (distributed.pp_size: 2)"]),
        ({"distributed": {"pp_size": 1, "ep_size": None}}, []),
        ({"model": {"backend": {"attn": "eager", "experts": "torch"}}}, []),
        ({"model": {"backend": {"attn": "tilelang"}}}, ["model.backend.attn: tilelang"]),
    ],
)
def test_what_is_not_run_is_named_with_its_setting(recipe, named):
    assert left_out(recipe) == named


def test_what_is_left_out_of_the_packages_recipes():
    assert left_out(recipes.compose("tiny_cpu").fields) == []
    of_flash = [
        "expert parallelism (distributed.ep_size: 64)",
        "recomputation (distributed.activation_checkpointing)",
        "model.backend.attn: tilelang",
        "model.backend.experts: torch_mm",
        "model.backend.dispatcher: hybridep",
    ]
    assert left_out(recipes.compose("flash_lora").fields) == ["LoRA (peft)", *of_flash]
    assert (
        left_out(recipes.compose("flash_distillation").fields)[0] == "the teacher (teacher_model)"
    )
