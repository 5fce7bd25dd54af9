# SPDX-License-Identifier: Apache-2.0
"""What ``verify`` allows for rounding, that it passes right recipes, and which faults it finds."""

from unittest.mock import patch

import pytest
import torch
from nemo_automodel.components.models.common.mtp import MTPConfig
from nemo_automodel.components.models.deepseek_v4.model import (
    DeepseekV4ForCausalLM,
    DeepseekV4HashGate,
)
from nemo_automodel.components.moe.layers import MoE
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dsv4_cp.attention.layer import ContextParallelAttention
from nemo_dsv4_cp.automodel import training_step
from nemo_dsv4_cp.automodel.contracts import has_v41
from nemo_dsv4_cp.automodel.torch_api import NO_BACKWARD, backward_id
from nemo_dsv4_cp.exchange.collectives import process_group
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.tools import local_ranks
from nemo_dsv4_cp.tools.verification import (
    case_of,
    compare,
    draw_weights,
    gradient_limit,
)
from tests.parity import cpu_backend, tiny_config, worst
from tests.ranks import fork_ranks


class DoublePrecision(TorchDispatchMode):
    """Operations that request float32 return float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def automodels_model(seed):
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
    parameters = backward(automodels_model(31), 31)
    limits = {name: gradient_limit(name, parameters) for name in parameters}
    assert sum(map(is_scale, limits)) == 9
    assert {limit for name, limit in limits.items() if not is_scale(name)} == {5e-5}
    assert min(limits.values()) == 5e-5
    assert limits["model.layers.3.attn_hc.scale"] == 5e-5  # hardly cancels
    assert 1e-3 < limits["model.hc_head.hc_scale"] < 1e-2  # to a two-thousandth


@pytest.mark.parametrize("name", ["model.layers.2.ffn_hc.scale", "model.hc_head.hc_scale"])
def test_the_terms_by_which_a_scale_is_judged_add_up_to_its_gradient(name):
    parameters = backward(automodels_model(0), 0)
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
def test_automodels_own_rounding_is_within_what_is_allowed(rows, seq_len, seed):
    model = automodels_model(seed)
    parameters = backward(model, seed, rows, seq_len)
    single = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    limits = {name: gradient_limit(name, parameters) for name in parameters}
    with torch.compiler.set_stance("force_eager"), DoublePrecision():
        double = backward(model.double(), seed, rows, seq_len)
    for name, limit in limits.items():
        assert double[name].grad.dtype == torch.float64
        assert worst(single[name], double[name].grad) <= limit, name


LOSSES = "nemo_automodel.components.loss"
CHUNKED = {"loss_fn": {"_target_": f"{LOSSES}.chunked_ce.ChunkedCrossEntropy", "chunk_len": 50}}
FUSED = {"loss_fn": {"_target_": f"{LOSSES}.linear_ce.FusedLinearCrossEntropy"}}
AUXILIARY = {"model": {"moe_overrides": {"aux_loss_coeff": 0.01}, "mtp_loss_scaling_factor": 0.3}}
NO_BIAS_UPDATE = {"model": {"moe_overrides": {"gate_bias_update_factor": 0.0}}}
INDEXER_LOSS = {"indexer_loss": {"coefficient": 0.01}}
WARM_UP = {"indexer_loss": {"coefficient": 1.0, "mode": "full"}, "train_only": "indexer"}
INDEXER = ("wq_b.weight", "weights_proj.weight", "wkv.weight", "wgate.weight")
FULL, SELECTIVE = (
    {"distributed": {"activation_checkpointing": how}} for how in (True, "selective")
)


def case(recipe, *, cp_size=2, packed=True, context_parallel=None):
    """Two layers of ratio 4, the first with a hash gate, and one of MTP: seconds."""
    config = {
        "compress_ratios": [4, 4],
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 1,
        "context_parallel": context_parallel,
    }
    return case_of(recipe, config, cp_size=cp_size, packed=packed)


def case_v41(recipe, *, packed):
    """Window, source and reuse of ratio 2, candidates, one selection in them; Engram in two."""
    text = {
        "num_hidden_layers": 5,
        "compress_ratios": [0, 2, 2, 1, 1],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3, 4],
        "candidate_source_layer_id": 3,
        "engram_layer_ids": [1, 2],
        "sliding_window": 32,
        "hc_mult": 2,
    }
    return case_of(recipe, {"text_config": text}, cp_size=2, packed=packed)


def hash_each_shard_alone(model):
    def hashes(step, input_ids, real, documents):
        return model.model.engram_hash(input_ids, token_mask=real, sequence_ids=documents)

    model.model._hashes = hashes


def before_each_moe(model, change):
    """Change an MoE and the padding mask that it gets before each of its forwards."""

    def hook(moe, args):
        hidden, padding_mask = args
        return hidden, change(moe, padding_mask)

    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_pre_hook(hook)


def balance_each_shard_alone(model):
    def without_mesh(moe, padding_mask):
        moe.cp_mesh = None
        return padding_mask

    before_each_moe(model, without_mesh)


def count_padding_as_load(model):
    before_each_moe(model, lambda moe, padding_mask: None)


def update_no_bias(model):
    model.model.update_moe_gate_bias = lambda: None


def scale_mtp_by_the_default(model):
    scaled = model.mtp_config
    model.mtp_config = MTPConfig(
        num_layers=scaled.num_layers, layer_pattern=scaled.layer_pattern, loss_scaling_factor=0.1
    )


def hide_logits_to_keep(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def forget_ids_on_recomputation(model):
    def forget(gate, args):
        if backward_id() != NO_BACKWARD:
            gate.set_input_ids(None)

    for module in model.modules():
        if isinstance(module, DeepseekV4HashGate):
            module.register_forward_pre_hook(forget)


def double_the_indexers_loss(model):
    for module in model.modules():
        if isinstance(module, ContextParallelAttention):
            doubled = {"coefficient": 0.02}
            module._options = ContextParallelOptions.from_block({"indexer_loss": doubled})


def outcome(group, rank, case, fault=None):
    """Return what differs and what was not run, or the error."""
    original = training_step.parallelize

    def parallelize(model, *args, **kwargs):
        model, setup = original(model, *args, **kwargs)
        if fault is not None:
            fault(model)
        return model, setup

    with patch.object(training_step, "parallelize", parallelize):
        try:
            differences, not_run = compare(group, rank, case)
        except Exception as error:
            return f"{type(error).__name__}: {error}", []
    return [each.name for each in differences if not each.passes], not_run


RIGHT = {
    "auxiliary loss, fused cross entropy": (
        case(AUXILIARY | FUSED, packed=False),
        ["loss_fn: FusedLinearCrossEntropy (does not run here"],
    ),
    "full checkpointing, chunked cross entropy": (case(AUXILIARY | FULL | CHUNKED), []),
    "selective checkpointing, no bias update": (case(SELECTIVE | NO_BIAS_UPDATE), []),
    "indexer's loss": (case(FULL, context_parallel=INDEXER_LOSS), []),
    "warm-up of the indexer": (case({}, packed=False, context_parallel=WARM_UP), []),
}
HAS_V41 = has_v41()
if HAS_V41:
    RIGHT["V4.1, one document per row"] = (case_v41({}, packed=False), [])
    RIGHT["V4.1, chunked cross entropy"] = (case_v41(CHUNKED, packed=True), [])
GATE, MTP_GATE = "model.layers.1.mlp.gate", "mtp.layers.0.mlp.gate"
WRONG = {
    "each shard balanced alone": (
        balance_each_shard_alone,
        case(AUXILIARY),
        [f"auxiliary loss of {GATE}", f"gradient of {GATE}.weight"],
    ),
    "padding counted as load": (
        count_padding_as_load,
        case({}),
        [f"expert load of {GATE}", f"expert load of {MTP_GATE}"],
    ),
    "no bias update": (update_no_bias, case(FULL), [f"correction bias of {GATE} after the step"]),
    "MTP at the default scale": (scale_mtp_by_the_default, case(AUXILIARY), ["loss"]),
    "logits_to_keep hidden": (hide_logits_to_keep, case(CHUNKED), "requires a model supporting"),
    "another coefficient": (
        double_the_indexers_loss,
        case({}, context_parallel=INDEXER_LOSS),
        [f"gradient of model.layers.0.self_attn.compressor.indexer.{name}" for name in INDEXER],
    ),
    "token ids lost": (forget_ids_on_recomputation, case(FULL), "CheckpointError"),
}
if HAS_V41:
    WRONG["n-grams cut with the row"] = (
        hash_each_shard_alone,
        case_v41(FULL, packed=True),
        ["logits", "gradient of model.layers.1.engram.embed.weight"],
    )


def outcomes_job(group, rank, cases):
    return [outcome(group, rank, *each) for each in cases]


@pytest.fixture(scope="module")
def outcomes():
    """All comparisons by one pair of ranks: importing AutoModel takes longer than any."""
    cases = [(each, None) for each, _ in RIGHT.values()]
    cases += [(each, fault) for fault, each, _ in WRONG.values()]
    with patch.object(local_ranks, "spawn", fork_ranks):
        found = local_ranks.run(outcomes_job, 2, cases)
    names = [*(("right", name) for name in RIGHT), *(("wrong", name) for name in WRONG)]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_a_recipe_that_trains_right_passes(name, outcomes):
    differs, not_run = outcomes["right", name]
    assert differs == []
    expected = RIGHT[name][1]
    assert len(not_run) == len(expected)
    assert all(part in said for part, said in zip(expected, not_run, strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_found_and_named(name, outcomes):
    differs, _ = outcomes["wrong", name]
    expected = WRONG[name][2]
    if isinstance(expected, str):
        assert expected in differs
    else:
        assert set(expected) <= set(differs)


@pytest.fixture
def one_thread():
    """As the local ranks have: threads cost more than they give on layers of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_padding_of_packed_rows_is_checked_without_context_parallelism_too(one_thread):
    alone = case(AUXILIARY | FULL, cp_size=1)
    with process_group("gloo", rank=0, size=1) as group:
        assert outcome(group, 0, alone) == ([], [])
        differs, _ = outcome(group, 0, alone, count_padding_as_load)
    assert f"expert load of {GATE}" in differs
    assert "logits" not in differs
