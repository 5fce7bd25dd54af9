# SPDX-License-Identifier: Apache-2.0
"""The whole model over real gloo ranks against AutoModel's own at CP size 1."""

import copy

import pytest
import torch
from nemo_automodel._transformers import capabilities
from nemo_automodel.components.distributed.context_parallel.sharder import ContextParallelSharder
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import HAS_TILELANG

from nemo_dsv4_cp import model as model_module
from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.automodel import job, patches
from nemo_dsv4_cp.batch import CP_GROUP_KEY
from nemo_dsv4_cp.checks.certificate import Certificate
from nemo_dsv4_cp.checks.consistency import settings_of
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.meshes import FakeMesh
from tests.parity import GroupMesh, assert_parity, cpu_backend, model_job, randomise, tiny_config
from tests.ranks import RankError

SLOW = pytest.mark.slow  # other sizes of what the rest shows
RATIOS = [0, 4, 128, 4]
BOUNDARY = {"transport": "boundary"}


@pytest.mark.parametrize("transport", [pytest.param("all_gather", marks=SLOW), "boundary"])
@pytest.mark.parametrize("size", [pytest.param(2, marks=SLOW), 4])
@pytest.mark.parametrize(
    ("seq_len", "padded_row"),
    [
        pytest.param(777, False, marks=SLOW),
        (777, True),
        pytest.param(1024, False, marks=SLOW),
    ],
)
def test_a_moe_model_equals_automodels_at_one_rank(ranks, transport, size, seq_len, padded_row):
    options = {"transport": transport}
    assert_parity(ranks.run(model_job, size, RATIOS, 2, seq_len, options, padded_row))


def test_one_rank_equals_automodels_without_its_dense_mask(ranks):
    assert_parity(ranks.run(model_job, 1, RATIOS, 2, 777, BOUNDARY, True))


@pytest.mark.parametrize("size", [2, 4])
def test_a_moe_model_whose_indexer_has_to_choose_equals_automodel(ranks, size):
    # Few enough entries that rounding of the layers before cannot swap two near ties.
    assert_parity(ranks.run(model_job, size, RATIOS, 2, 190, BOUNDARY, True, 0, 8))


def test_a_larger_pad_multiple_changes_nothing(ranks):
    options = BOUNDARY | {"pad_multiple": 256}
    assert_parity(ranks.run(model_job, 2, RATIOS, 1, 300, options))


@pytest.mark.parametrize(
    ("size", "rows", "seq_len", "seed"),
    [(4, 1, 60, 31), (4, 2, 60, 31), (4, 2, 60, 6), (4, 1, 61, 28), (3, 1, 1031, 1)],
)
def test_weights_whose_scale_gradients_cancel_are_no_error(ranks, size, rows, seq_len, seed):
    # Here a scale's gradient is a two-thousandth of its terms, and rounding up to 3e-4 of it.
    assert_parity(ranks.run(model_job, size, RATIOS, rows, seq_len, BOUNDARY, False, seed))


@pytest.mark.parametrize("seed", [pytest.param(0, marks=SLOW), 31])
def test_a_rank_that_loses_its_part_of_a_scales_gradient_is_found(ranks, seed):
    arguments = (RATIOS, 1, 1000, BOUNDARY, False, seed, 512, "scale")
    for differences in ranks.run(model_job, 8, *arguments):
        wrong = {found.name for found in differences if not found.passes}
        assert wrong == {found.name for found in differences if found.name.endswith("scale")}


def model_job_with(group, rank, seq_len, changes):
    return model_job(group, rank, RATIOS, 2, seq_len, BOUNDARY, True, **changes)


@pytest.mark.parametrize("size", [2, 4])
def test_the_auxiliary_loss_balances_whole_rows(ranks, size):
    overrides = {"moe_overrides": {"aux_loss_coeff": 1.0}}
    assert_parity(ranks.run(model_job_with, size, 300, overrides))


@pytest.mark.parametrize("size", [1, 2])
def test_text_of_a_config_with_a_vision_tower_takes_our_path(ranks, size):
    if not hasattr(tiny_config(RATIOS), "vision_n_layers"):
        pytest.skip("this AutoModel has no vision tower")
    tower = {"vision_n_layers": 1, "vision_dim": 64, "vision_n_heads": 4, "vision_inter_dim": 64}
    assert_parity(ranks.run(model_job_with, size, 300, tower))


def test_images_without_a_vision_tower_are_refused_as_by_automodel():
    model, ids = build(), torch.ones(1, 16, dtype=torch.long)
    if not hasattr(model.model, "vision_enabled"):
        pytest.skip("this AutoModel has no vision tower")
    with pytest.raises(ValueError, match="without visual pseudo tokens"):
        model(ids, pixel_values=torch.zeros(4, 3, 14, 14))
    with pytest.raises(ValueError, match="require a DeepSeek-V4 vision checkpoint"):
        model(ids, vision_token_types=torch.zeros_like(ids))


def test_token_types_of_text_pass_the_sharder():
    ids = torch.ones(1, 300, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "vision_token_types": torch.full_like(ids, -1)}
    shard = build().prepare_model_inputs_for_cp(batch)["cp_sharder"].shard_batch
    _, cut, _ = shard(FakeMesh(2), None, dict(batch))
    assert "vision_token_types" not in cut
    with pytest.raises(NotImplementedError, match=r"images \(vision_token_types in the batch\)"):
        shard(FakeMesh(2), None, batch | {"vision_token_types": torch.zeros_like(ids)})


def test_padding_of_packed_rows_is_no_expert_load_at_one_rank():
    # Two documents of 40 and 50 tokens, 10 of padding between them and 28 at the end.
    ids = torch.randint(0, 97, (1, 128))
    lengths = {"seq_lens": torch.tensor([[40, 50]]), "seq_lens_padded": torch.tensor([[50, 50]])}
    model = build().train()
    model(ids, qkv_format="thd", **lengths)
    gates = [layer.mlp.gate for layer in model.model.layers.values()][1:]
    for gate in gates:
        assert int(gate._cumulative_expert_load.sum()) == 2 * 90  # two experts per token


def build(cls=DeepseekV4ContextParallelForCausalLM, *, attn="sdpa", **changes):
    backend = cpu_backend()
    backend.attn = attn
    model = cls(tiny_config(RATIOS, **changes), backend=backend)
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    return model.eval()


def initialised(cls):
    torch.manual_seed(0)
    model = cls(tiny_config(RATIOS), backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    return model


def test_parameters_and_random_draws_are_automodel():
    mine, theirs = (
        initialised(cls) for cls in (DeepseekV4ContextParallelForCausalLM, DeepseekV4ForCausalLM)
    )
    expected = theirs.state_dict()
    assert list(mine.state_dict()) == list(expected)
    for name, value in mine.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_every_attention_of_the_model_is_ours_mtp_included():
    model = build(num_nextn_predict_layers=1, compress_ratios=[*RATIOS, 0])
    attentions = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    assert len(attentions) == 5
    assert all(type(attention) is ContextParallelAttention for attention in attentions)


def test_initialised_from_the_meta_device_nothing_is_left_to_chance():
    with torch.device("meta"):
        model = DeepseekV4ContextParallelForCausalLM(tiny_config(RATIOS), backend=cpu_backend())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.initialize_weights(dtype=torch.float32)
    assert not [name for name, p in model.named_parameters() if not p.isfinite().all()]


def test_left_padding_is_refused_at_one_rank_too():
    ids = torch.ones(2, 6, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"row 1 .* padding_side"):
        build()(ids, attention_mask=mask)


def test_packed_rows_at_one_rank_are_automodels_where_it_cuts_no_window():
    ids = torch.randint(0, 97, (1, 256))
    packed = {"qkv_format": "thd", "seq_lens": torch.tensor([[128, 128]])}
    packed["seq_lens_padded"] = packed["seq_lens"]
    expected = build(DeepseekV4ForCausalLM)(ids, **packed).logits
    torch.testing.assert_close(build()(ids, **packed).logits, expected)


def test_multi_token_prediction_at_one_rank_is_automodel():
    changes = {"num_nextn_predict_layers": 1, "compress_ratios": [*RATIOS, 4]}
    ids = torch.randint(0, 97, (2, 200))
    (expected,) = build(DeepseekV4ForCausalLM, **changes).train()(ids).mtp_per_depth_h
    (mine,) = build(**changes).train()(ids).mtp_per_depth_h
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_embeddings_serve_in_place_of_ids():
    model, ids = build(num_hash_layers=0), torch.randint(0, 97, (2, 64))
    embeds = model.model.embed_tokens(ids)
    assert torch.equal(model.model(inputs_embeds=embeds), model.model(ids))
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model.model()


def test_a_cp_size_that_cannot_work_is_refused_before_the_first_step():
    model = build(max_position_embeddings=512)
    batch = {"input_ids": torch.ones(1, 300).long(), "labels": torch.ones(1, 300).long()}
    sharder = model.prepare_model_inputs_for_cp(batch)["cp_sharder"]
    sharder.shard_batch(FakeMesh(4), None, dict(batch))
    with pytest.raises(ValueError, match=r"cp_size=8 cannot work.* use 4 or fewer"):
        sharder.shard_batch(FakeMesh(8), None, dict(batch))


def gate_bias_job(group, rank):
    config = tiny_config(RATIOS)
    mine, reference = (
        cls(config, backend=cpu_backend()).train()
        for cls in (DeepseekV4ContextParallelForCausalLM, DeepseekV4ForCausalLM)
    )
    reference.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(reference, 0)
    mine.load_state_dict(reference.state_dict())
    ids = torch.randint(0, 97, (1, 500), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone()}
    sharder = mine.prepare_model_inputs_for_cp(batch)["cp_sharder"]
    reference(ids)
    _, batch, _ = sharder.shard_batch(GroupMesh(group), None, batch)
    batch.pop("labels")
    mine(**batch)
    for model in (mine, reference):
        model.update_moe_gate_bias()
    expected = reference.state_dict()
    biases = {k: v for k, v in mine.state_dict().items() if "e_score_correction_bias" in k}
    return [bool(v.any()) and torch.equal(v, expected[k]) for k, v in biases.items()]


def test_experts_are_balanced_by_the_whole_row(ranks):
    for same in ranks.run(gate_bias_job, 2):
        assert len(same) == 3  # the first of four layers routes by token id
        assert all(same)


def copied_job(group, rank):
    """Return whether a copy that is made after a step trains as the model does."""
    model = initialised(DeepseekV4ContextParallelForCausalLM)
    ids = torch.arange(512).remainder(97)[None]
    batch = {"input_ids": ids, "labels": ids}
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    _, batch, _ = sharder.shard_batch(GroupMesh(group), None, batch)
    batch.pop("labels")
    model(**batch).logits.sum().backward()
    copied = copy.deepcopy(model)
    copied.zero_grad()
    copied(**batch).logits.sum().backward()
    gradients = [[p.grad for p in each.parameters()] for each in (model, copied)]
    return all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_can_be_copied_after_a_step(ranks):
    assert ranks.run(copied_job, 2) == [True, True]


def token_verbs_job(group, rank):
    class Mesh(dict):
        mesh_dim_names = ("cp",)

    model = DeepseekV4ContextParallelForCausalLM(tiny_config(RATIOS), backend=cpu_backend())
    ids = torch.arange(2 * 300).view(2, 300) % 97
    batch = {"input_ids": ids, "labels": ids.clone()}
    sharder = ContextParallelSharder(model, Mesh(cp=GroupMesh(group)), batch)
    _, batch = sharder.shard(batch)
    values = torch.randn(2, 300, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = torch.randn(2, 300, 5, generator=torch.Generator().manual_seed(1))
    local = sharder.shard_token_tensor(values, fill=0)
    back = sharder.gather_token_tensor(local, trim=True)
    (back.sum() * (rank + 1)).backward()
    wide = sharder.gather_token_tensor(sharder.shard_token_tensor(logits, fill=0), trim=True)
    return {
        "shard": torch.equal(
            local.detach().nonzero(), batch["labels"].ne(-100).long().mul(local.detach()).nonzero()
        ),
        "round trip": torch.equal(back, values) and torch.equal(wide, logits),
        "gradient": values.grad is not None and values.grad.ne(0).any().item(),
    }


def test_token_verbs_round_trip_in_the_callers_coordinates(ranks):
    for answers in ranks.run(token_verbs_job, 2):
        assert all(answers.values()), answers


def test_training_on_a_batch_that_another_sharder_cut_is_refused():
    model = build().train()
    model._cp_size_of_job = 2
    with pytest.raises(RuntimeError, match=r"cp_size=2, and the recipe did not cut the batch"):
        model(torch.zeros(1, 8, dtype=torch.long))


def test_multi_token_prediction_under_cp_needs_the_shifted_tokens(ranks):
    with pytest.raises(RankError, match="needs mtp_per_depth_input_ids"):
        ranks.run(unshifted_job, 2)


def unshifted_job(group, rank):
    model = build(num_nextn_predict_layers=1).train()
    model(torch.zeros(1, 128, dtype=torch.long), **{CP_GROUP_KEY: group})


@pytest.mark.skipif(HAS_TILELANG, reason="TileLang is installed here")
def test_a_recipe_for_tilelang_trains_in_torch_where_it_is_not_installed(caplog):
    model = build(attn="tilelang")
    with caplog.at_level("INFO"):
        model.choose_kernels()
    assert "TileLang, which model.backend.attn: tilelang names, is not installed" in caplog.text
    layers = [m for m in model.modules() if isinstance(m, ContextParallelAttention)]
    assert {layer.kernels_name for layer in layers} == {"torch"}
    assert model(torch.zeros(1, 128, dtype=torch.long)).logits.isfinite().all()


def test_on_gpus_every_layer_takes_the_kernels_that_the_job_chose(monkeypatch):
    chosen, requested = Certificate("another", 0.5, 12.0, 321.0, None, "report.json"), []

    def choose(name, subject_of, *, strict):
        requested.append((name, subject_of("triton").dtypes, strict))
        return chosen

    load, names = plugins.load, plugins.names
    monkeypatch.setattr(
        plugins, "load", lambda group, name: load(group, "torch" if name == "another" else name)
    )
    monkeypatch.setattr(plugins, "names", lambda group: [*names(group), "another"])
    monkeypatch.setattr(model_module, "choose_kernels", choose)

    def checked_against_the_mesh(**options):
        config = tiny_config(RATIOS, context_parallel=options)
        model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
        monkeypatch.setattr(capabilities, job.FUNCTION, lambda model, mesh: model)
        job.install()
        capabilities.attach_capabilities_and_validate(model, None)
        patches.undo()
        return model

    assert checked_against_the_mesh().model.gpu is None  # on CPUs nothing is examined
    monkeypatch.setattr(model_module, "trains_on_gpus", lambda: True)
    model = checked_against_the_mesh()
    checked_against_the_mesh(kernels="another", kernels_check="warn")
    for settled in ({"kernels": "torch"}, {"kernels_check": "off"}):
        checked_against_the_mesh(**settled)
    dtypes = ("bfloat16", "float32")
    assert requested == [(None, dtypes, True), ("another", dtypes, False)]
    layers = [m for m in model.modules() if isinstance(m, ContextParallelAttention)]
    assert {layer.kernels_name for layer in layers} == {"another"}
    assert "321 TFLOP/s" in settings_of(model)["context_parallel.balance"]
