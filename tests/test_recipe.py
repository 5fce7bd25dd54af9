# SPDX-License-Identifier: Apache-2.0
"""Recipes trained by AutoModel's own CLI, on forked processes; test_compose.py uses torchrun.

What a release of AutoModel cannot do, or we cannot do there, is held to its error message.
"""

import inspect
import json

import pytest
import torch
from nemo_automodel.components.moe import experts
from nemo_automodel.recipes.llm import kd
from safetensors.torch import load_file

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.automodel import mtp
from nemo_dsv4_cp.automodel.sharding import HAS_SHARDER
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.tools.recipes import compose
from tests.parity import cpu_backend, worst
from tests.recipes import options
from tests.recipes.launching import Failed, Training

REQUESTS_MTP = mtp.ASKS_MODELS
# Before 0.7 the recipe moves every value of a batch to the device; packed rows hold a string.
MOVES_ALL = "v.to(self.dist_env.device, non_blocking=True) for k, v in batch.items()"
DISTILS_PACKED_ROWS = MOVES_ALL not in inspect.getsource(kd)


def tiny():
    """The tiny recipe; its rows are too short for `auto` to move queries, as the demo shows."""
    fields = compose("tiny_cpu").fields
    fields["model"]["config"]["context_parallel"]["balance"] = "on"
    return fields


FEW_STEPS = {"max_steps": 4, "global_batch_size": 2, "local_batch_size": 2}
PACKED = options.PACKED | {"packed_sequence": {"packed_sequence_size": 1000}}
LORA = {
    "peft": {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "target_modules": ["*wq_a", "*wq_b", "*wkv", "*wo_b"],
        "dim": 8,
        "alpha": 16,
    }
}


STAGES = options.STAGES["distributed"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, launcher):
    def run(name: str, processes: int, **changes) -> Training:
        """Train the tiny recipe with sections changed."""
        return launcher.train(tmp_path_factory.mktemp(name), tiny(), processes, changes)

    return run


@pytest.fixture(scope="module")
def cut_and_whole(launch):
    def run(name: str, **changes) -> tuple[Training, Training]:
        """One recipe at CP=2 and at CP=1."""
        cut = launch(f"{name}_cp_2", 2, **changes)
        whole = launch(f"{name}_cp_1", 1, distributed={"cp_size": 1}, **changes)
        return cut, whole

    return run


def assert_same(cut: Training, whole: Training) -> None:
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)
    assert cut.losses[0] == pytest.approx(whole.losses[0], abs=1e-5)


@pytest.fixture(scope="module")
def trained(cut_and_whole):
    """Four steps of two rows."""
    return cut_and_whole("trained", step_scheduler=FEW_STEPS)


@pytest.fixture(scope="module")
def expert_parallel(launch):
    """The same four steps with experts on either rank, and a checkpoint at the end."""
    return launch(
        "expert_parallel",
        2,
        step_scheduler=FEW_STEPS | {"ckpt_every_steps": 4},
        distributed={"ep_size": 2, "activation_checkpointing": True},
        checkpoint={
            "enabled": True,
            "model_save_format": "safetensors",
            "save_consolidated": True,
        },
    )


@pytest.mark.capability("training, one document per row")
def test_the_cli_trains_at_cp_2_as_at_cp_1_and_the_loss_falls(trained):
    assert_same(*trained)
    losses = trained[0].losses
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.capability("expert parallelism and activation checkpointing")
def test_expert_parallelism_and_checkpointing_change_no_loss(
    trained, expert_parallel, record_property
):
    with_experts, without = expert_parallel, trained[0]
    if "weights.float(), differentiable=False" in inspect.getsource(experts):
        record_property(
            "but",
            "only the first step: this release's torch dispatcher passes routers no gradient",
        )
        with_experts, without = (
            run._replace(losses=run.losses[:1]) for run in (with_experts, without)
        )
    assert_same(with_experts, without)


@pytest.fixture(scope="module")
def packed(cut_and_whole):
    """Two steps of two microbatches of packed rows, with MTP if AutoModel requests its inputs."""
    config = tiny()["model"]["config"] | {"num_nextn_predict_layers": 2 if REQUESTS_MTP else 0}
    return cut_and_whole(
        "packed",
        **PACKED,
        model={"config": config},
        step_scheduler={"max_steps": 2, "global_batch_size": 4, "local_batch_size": 2},
    )


@pytest.mark.capability("packed documents and gradient accumulation")
def test_packed_rows_and_gradient_accumulation_at_cp_2_equal_one_rank(packed):
    assert_same(*packed)


@pytest.mark.skipif(not REQUESTS_MTP, reason="shown by the next test")
@pytest.mark.capability("multi-token prediction")
def test_multi_token_prediction_at_cp_2_equals_one_rank(packed):
    assert_same(*packed)


def test_a_recipe_that_cuts_batches_by_itself_is_refused(launch):
    with pytest.raises(Failed, match=r"cp_size=2, and the recipe did not cut the batch"):
        launch("own_cut", 2, recipe="tests.own_cut.OwnCutRecipe")


@pytest.mark.skipif(REQUESTS_MTP, reason="shown by the test before")
@pytest.mark.capability("multi-token prediction", refused=True)
def test_multi_token_prediction_is_refused_where_the_recipe_does_not_ask_for_its_inputs(launch):
    config = tiny()["model"]["config"] | {"num_nextn_predict_layers": 1}
    with pytest.raises(Failed, match="num_nextn_predict_layers: 0"):
        launch("mtp", 2, model={"config": config}, step_scheduler={"max_steps": 1})


def assert_same_steps(one: Training, other: Training, *, later: float = 1e-5) -> None:
    """Compare losses and gradient norms, by default to a tenth of the last digit of the log.

    Args:
        one: A training.
        other: The same with other ranks.
        later: What steps after the first may differ by.
    """
    for found, expected in ((one.losses, other.losses), (one.norms, other.norms)):
        assert found == pytest.approx(expected, abs=later)
        assert found[0] == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.slow  # tests/recipes trains the option alone
@pytest.mark.capability("pipeline parallelism")
def test_two_stages_at_cp_2_log_the_losses_and_norms_of_one(launch, trained):
    both = launch("stages_cp_2", 4, distributed=STAGES, step_scheduler=FEW_STEPS)
    assert_same_steps(both, trained[0])


@pytest.mark.slow
@pytest.mark.capability("pipeline parallelism")
def test_two_stages_of_packed_rows_and_experts_on_either_rank_do_as_well(launch):
    changes = PACKED | {"step_scheduler": FEW_STEPS | {"max_steps": 2}}
    both = launch("packed_stages_cp_2", 4, distributed=STAGES | {"ep_size": 2}, **changes)
    stages = launch("packed_stages", 2, distributed=STAGES | {"cp_size": 1}, **changes)
    # The step between may take roundings of the cut rows far, with pipeline stages or without.
    assert_same_steps(both, stages, later=1e-4)


@pytest.fixture(scope="module")
def distillation():
    """What makes of the tiny recipe a distillation into LoRA."""
    teacher = tiny()["model"]
    teacher["config"] |= {"num_hidden_layers": 2, "compress_ratios": [4, 128]}
    return (
        {
            "recipe": "tests.tokenizerless.TokenizerlessDistillationRecipe",
            "teacher_model": teacher,
            "kd_ratio": 0.5,
            "kd_loss_fn": {"_target_": "nemo_automodel.components.loss.kd_loss.KDLoss"},
            "step_scheduler": {"max_steps": 2},
        }
        | LORA
        | (PACKED if DISTILS_PACKED_ROWS else {})
    )


@pytest.mark.skipif(not HAS_SHARDER, reason="shown by the next test")
@pytest.mark.capability("LoRA", "knowledge distillation")
def test_distillation_into_lora_at_cp_2_equals_one_rank(cut_and_whole, distillation):
    assert_same(*cut_and_whole("distilled", **distillation))


@pytest.mark.skipif(HAS_SHARDER, reason="shown by the test before")
@pytest.mark.capability("knowledge distillation", refused=True)
def test_distillation_is_refused_where_the_recipe_keeps_its_labels(launch, distillation):
    with pytest.raises(Failed, match=r"without labels.*distributed\.cp_size: 1"):
        launch("distilled", 2, **distillation)


@pytest.mark.skipif(HAS_SHARDER, reason="shown by distillation into LoRA")
@pytest.mark.capability("LoRA")
def test_lora_at_cp_2_equals_one_rank(cut_and_whole):
    assert_same(*cut_and_whole("lora", step_scheduler={"max_steps": 2}, **PACKED, **LORA))


@pytest.mark.capability("checkpoints, with the plugin and without")
def test_a_checkpoint_loads_without_the_plugin_and_back(
    trained, expert_parallel, launch, record_property
):
    (saved,) = expert_parallel.directory.glob("epoch_*/model/consolidated")
    assert json.loads((saved / "config.json").read_text())["architectures"] == [
        "DeepseekV4ForCausalLM"
    ]
    # The same two samples a step: one on each data-parallel rank, or both cut in two.
    changes = {
        "step_scheduler": {"max_steps": 1, "global_batch_size": 2},
        "dataset": {"tokenizer": None},
    }
    plain_model = {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
        "load_base_model": True,
        "config": {
            "_target_": "nemo_automodel.components.models.deepseek_v4.config."
            "DeepseekV4Config.from_pretrained",
            "pretrained_model_name_or_path": str(saved),
            "name_or_path": str(saved),
        },
    }
    on_either = {"ep_size": 2}  # without, 0.5 finds no mesh to cut the experts' weights by
    target = "nemo_dsv4_cp.DeepseekV4ContextParallelConfig.from_pretrained"
    our_model = plain_model | {"config": plain_model["config"] | {"_target_": target}}
    ours = launch("ours", 2, distributed=on_either, model=our_model, **changes)
    assert ours.losses[0] < trained[0].losses[0] - 0.2  # trained weights, not random ones
    if not HAS_SHARDER:
        record_property(
            "but", "only loading with the plugin: without it, this release cannot shard V4"
        )
        return
    plain = launch("plain", 2, distributed=on_either | {"cp_size": 1}, model=plain_model, **changes)
    assert ours.losses[0] == pytest.approx(plain.losses[0], abs=1e-5)


def test_transformers_own_model_reads_a_checkpoint_trained_at_cp_2_and_says_the_same(
    expert_parallel,
):
    deepseek_v4 = pytest.importorskip(
        "transformers.models.deepseek_v4", reason="this transformers has no V4 of its own"
    )
    (saved,) = expert_parallel.directory.glob("epoch_*/model/consolidated")
    theirs, found = deepseek_v4.DeepseekV4ForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found  # no key missing, none left over, no shape changed

    backend = cpu_backend()
    backend.enable_hf_state_dict_adapter = True
    config = DeepseekV4ContextParallelConfig.from_pretrained(saved)
    ours = DeepseekV4ContextParallelForCausalLM(config, backend=backend)
    weights = {k: v for file in saved.glob("*.safetensors") for k, v in load_file(file).items()}
    ours.load_state_dict(ours.state_dict_adapter.from_hf(weights))

    # More than 4 * index_topk tokens, so that indexers have to choose, and two windows of 128.
    ids = torch.randint(0, config.vocab_size, (1, 280), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = ours.eval()(ids)
        expected = theirs.eval()(ids, use_cache=False).logits
    assert worst(getattr(mine, "logits", mine), expected) < 1e-5


def test_a_mistake_in_the_block_ends_the_run_before_the_model_is_built(launch):
    config = tiny()["model"]["config"] | {"context_parallel": {"pad_multiple": 96}}
    with pytest.raises(Failed, match=r"pad_multiple=96 is not a multiple of 128"):
        launch("mistaken", 1, distributed={"cp_size": 1}, model={"config": config})
