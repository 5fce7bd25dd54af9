# SPDX-License-Identifier: Apache-2.0
"""The recipe options that are combined, and the combinations that are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nemo_dsv4_cp.tools.recipes import compose


@dataclass(frozen=True)
class Option:
    """One thing that a recipe may ask for.

    Attributes:
        name: As tests and tables spell it.
        meaning: One line for the table's legend.
        factor: What it is a value of; two values of one factor are no pair.
        fields: What it changes in the recipe, nested.
        microbatches: How many it trains per optimizer step and data-parallel rank.
        same_as: The option whose numbers it must have at cp_size 1, "base" for the recipe without
            any option. None: its numbers must differ from those of the recipe without it.
        loss_fn: The class of the loss that must run, if it is not the recipe's own.
        idle: Regular expression of parameters that may have a gradient of zero on both steps.
    """

    name: str
    meaning: str
    factor: str
    fields: Mapping[str, Any]
    microbatches: int = 1
    same_as: str | None = None
    loss_fn: str | None = None
    idle: str | None = None


def _loss(name: str, **arguments: Any) -> dict[str, Any]:
    return {"loss_fn": {"_target_": f"nemo_automodel.components.loss.{name}", **arguments}}


def _config(**changes: Any) -> dict[str, Any]:
    return {"model": {"config": changes}}


def _experts(**changes: Any) -> dict[str, Any]:
    return {"model": {"moe_overrides": changes}}


def _yarn(key: str) -> dict[str, Any]:
    scaling = {
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    return _config(rope_scaling={key: "yarn", **scaling})


def _lora(*modules: str) -> dict[str, Any]:
    return {
        "peft": {
            "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
            "target_modules": list(modules),
            "dim": 4,
            "alpha": 8,
        }
    }


PACKED = {
    "dataset": {"seq_length": 300, "shortest": 5, "num_samples": 120, "split": "train"},
    "packed_sequence": {"packed_sequence_size": 400},
    "dataloader": {
        "collate_fn": "nemo_automodel.components.datasets.utils.packed_sequence_thd_collater"
    },
}
# Two stages, a microbatch per row. Patched, the stages would run AutoModel's generic forward, which
# has no hyper-connections.
STAGES = {
    "distributed": {
        "pp_size": 2,
        "pipeline": {
            "pp_schedule": "1f1b",
            "pp_microbatch_size": 1,
            "patch_inner_model": False,
            "patch_causal_lm_model": False,
        },
    }
}
_VALIDATION = {
    "validation_dataset": {
        "_target_": "nemo_dsv4_cp.tools.stdlib_bytes.StandardLibraryBytes",
        "seq_length": 200,
        "num_samples": 16,
    },
    "validation_dataloader": {
        "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
        "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
        "batch_size": 2,
    },
    "step_scheduler": {"val_every_steps": 1},
}

OPTIONS = (
    Option(
        "chunked",
        "`loss_fn`: `ChunkedCrossEntropy`",
        "loss",
        _loss("chunked_ce.ChunkedCrossEntropy", compile=False),
        same_as="base",
        loss_fn="ChunkedCrossEntropy",
    ),
    Option(
        "fused",
        "`loss_fn`: `FusedLinearCrossEntropy`, with a stand-in for its GPU kernel",
        "loss",
        _loss("linear_ce.FusedLinearCrossEntropy"),
        same_as="base",
        loss_fn="FusedLinearCrossEntropy",
    ),
    Option(
        "ac-full",
        "`distributed.activation_checkpointing: true`",
        "recomputation",
        {"distributed": {"activation_checkpointing": True}},
        same_as="base",
    ),
    Option(
        "ac-selective",
        "`distributed.activation_checkpointing: selective`",
        "recomputation",
        {"distributed": {"activation_checkpointing": "selective"}},
        same_as="base",
    ),
    Option("mtp-1", "`num_nextn_predict_layers: 1`", "mtp", _config(num_nextn_predict_layers=1)),
    Option("mtp-2", "`num_nextn_predict_layers: 2`", "mtp", _config(num_nextn_predict_layers=2)),
    Option("packed", "packed documents", "packing", PACKED),
    Option("aux-loss", "`moe_overrides.aux_loss_coeff: 1`", "aux", _experts(aux_loss_coeff=1.0)),
    Option(
        "gate-bias",
        "`moe_overrides.gate_bias_update_factor: 0.1`",
        "bias",
        _experts(gate_bias_update_factor=0.1),
    ),
    Option(
        "gate-bias-off",
        "`moe_overrides.gate_bias_update_factor: 0`",
        "bias",
        _experts(gate_bias_update_factor=0.0),
    ),
    Option("yarn", "`rope_scaling.type: yarn`", "yarn", _yarn("type")),
    Option(
        "yarn-rope-type",
        "`rope_scaling.rope_type: yarn`",
        "yarn",
        _yarn("rope_type"),
        same_as="yarn",
    ),
    Option(
        "lora",
        "`peft` on `*self_attn.wq_a`, `*self_attn.wq_b`, `*wo_b`",
        "lora",
        _lora("*self_attn.wq_a", "*self_attn.wq_b", "*wo_b"),
    ),
    Option(
        "lora-indexer",
        "`peft` on `*wkv`, `*wq_b`: the frozen indexer has modules of these names too",
        "lora",
        _lora("*wkv", "*wq_b"),
    ),
    Option("lora-all", "`peft` on `*`", "lora", _lora("*")),
    Option(
        "vision",
        "a config with a vision tower; batches contain only text",
        "vision",
        _config(vision_n_layers=1, vision_dim=64, vision_n_heads=4, vision_inter_dim=64),
        same_as="base",
        idle="vision|image_|aligner",
    ),
    Option(
        "hsdp",
        "`dp_replicate_size: 2` with 4 data-parallel ranks",
        "hsdp",
        {"distributed": {"dp_replicate_size": 2}},
    ),
    Option("ep", "`ep_size: 2`", "ep", {"distributed": {"ep_size": 2}}, same_as="base"),
    Option("pp", "`pp_size: 2`", "pp", STAGES, same_as="base"),
    Option("validation", "validation after each step", "validation", _VALIDATION, same_as="base"),
    Option("accumulation", "two microbatches per step", "accumulation", {}, microbatches=2),
    Option(
        "clipping", "`clip_grad_norm.max_norm: 0.1`", "norm", {"clip_grad_norm": {"max_norm": 0.1}}
    ),
    Option("decay", "`optimizer.weight_decay: 0.5`", "decay", {"optimizer": {"weight_decay": 0.5}}),
    Option(
        "indexer-loss",
        "`context_parallel.indexer_loss.coefficient: 1`",
        "indexer",
        _config(context_parallel={"indexer_loss": {"coefficient": 1.0}}),
    ),
)
BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class Refusal:
    """A combination that ends before the first step.

    Attributes:
        options: Their names.
        message: Regular expression that the error must match.
        why: For the table, in a line.
    """

    options: frozenset[str]
    message: str
    why: str


def _refused(*pairs: str, message: str, why: str) -> tuple[Refusal, ...]:
    return tuple(Refusal(frozenset(pair.split("+")), message, why) for pair in pairs)


REFUSALS = (
    *_refused(
        "indexer-loss+lora",
        "indexer-loss+lora-indexer",
        "indexer-loss+lora-all",
        message="LoRA freezes the indexer that the loss trains",
        why="LoRA freezes the indexer, which the loss would train; train without `peft`",
    ),
    *_refused(
        "lora-all",
        message=r"peft\.target_modules=\['\*'\] selects .*wo_a",
        why="the pattern selects the grouped projection `wo_a`, which LoRA does not support; the "
        "error names patterns that work",
    ),
    *_refused(
        "mtp-1+pp",
        "mtp-2+pp",
        message="MTP with context and pipeline parallelism is not supported",
        why="AutoModel refuses them together at `cp_size` above 1; use `pp_size: 1`",
    ),
    *_refused(
        "chunked+pp",
        message="ChunkedCrossEntropy requires pipeline stages that can return hidden states",
        why="AutoModel refuses them together at any `cp_size`, because its pipeline stages return "
        "no hidden states for this model",
    ),
    *_refused(
        "ac-selective+lora",
        "ac-selective+lora-indexer",
        message="Tensor cached during selective activation checkpoint has been mutated",
        why="torch raises an error on the first backward pass, at any `cp_size`, also without this "
        "package: AutoModel's LoRA modifies a saved tensor in place; use "
        "`peft.use_memory_efficient_lora: false`",
    ),
)


@dataclass(frozen=True)
class Replacement:
    """A combination for which AutoModel warns and takes another loss.

    Attributes:
        options: Their names.
        loss_fn: The loss that runs.
        why: For the table, in a line.
    """

    options: frozenset[str]
    loss_fn: str
    why: str


REPLACEMENTS = (
    Replacement(
        frozenset({"fused", "pp"}),
        "MaskedCrossEntropy",
        "AutoModel's pipeline stages return no hidden states for this model, so AutoModel warns "
        "and uses `MaskedCrossEntropy`",
    ),
)


def loss_fn_of(*names: str) -> str:
    """Return the class name of the loss that these options must run."""
    for replacement in REPLACEMENTS:
        if replacement.options <= set(names):
            return replacement.loss_fn
    return next((loss for name in names if (loss := BY_NAME[name].loss_fn)), "MaskedCrossEntropy")


def refusal_of(*names: str) -> Refusal | None:
    """Return why these options together are refused, None if they train."""
    found = [refusal for refusal in REFUSALS if refusal.options <= set(names)]
    return found[0] if found else None


SLOW = ("hsdp",)
"""Options whose launches need 8 processes, left to ``make test-recipes``."""

FIXED_PAIRS = (
    ("mtp-1", "vision"),
    ("packed", "gate-bias"),
    ("ac-full", "packed"),
    ("chunked", "mtp-1"),
    ("fused", "packed"),
    ("ep", "aux-loss"),
)
"""Pairs for every run of the tests: combinations that were wrong once, and one that was right."""


def pairs() -> list[tuple[str, str]]:
    """Return the names of every two options that go together."""
    return [(a.name, b.name) for a, b in combinations(OPTIONS, 2) if a.factor != b.factor]


@dataclass(frozen=True)
class Launch:
    """A recipe, and the processes that it needs."""

    recipe: dict[str, Any]
    processes: int


ROWS = 2
"""Rows per microbatch and data-parallel rank: pipeline stages take one at a time."""

_TINY: dict[str, Any] = {
    "recipe": "tests.recipes.recording.RecordingRecipe",
    "model": {
        "config": {
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "compress_ratios": [0, 4, 128],
            "num_attention_heads": 4,
            "q_lora_rank": 32,
            "o_lora_rank": 16,
            "index_topk": 48,
            # Rows are too short for `auto` to move queries.
            "context_parallel": {"balance": "on", "pad_multiple": 128},
        }
    },
    "dist_env": {"timeout_minutes": 15},  # of one rank for another, on a busy machine
    "dataset": {"seq_length": 300},
    "step_scheduler": {"max_steps": 2, "local_batch_size": ROWS},
    "clip_grad_norm": {"max_norm": 1e6},
    # Linear in small gradients: without a large eps, Adam's first step is their sign alone, and
    # the second step would start from roundings.
    "optimizer": {"lr": 1e-2, "eps": 1e-2},
}


def launch_of(*names: str, cp_size: int, draw: int = 0) -> Launch:
    """Return the launch of a combination of options.

    The reference, at cp_size 1, has no expert parallelism: its ranks would be those of CP.

    Args:
        *names: The options.
        cp_size: CP ranks.
        draw: Which weights to start from.
    """
    fields = copy.deepcopy(compose("tiny_cpu").fields)
    options = [BY_NAME[name] for name in names]
    for changes in (_TINY, *(option.fields for option in options)):
        _merge(fields, changes)
    fields["draw"] = draw
    distributed = fields["distributed"]
    distributed["cp_size"] = cp_size
    if cp_size == 1:
        distributed["ep_size"] = 1
    replicas = distributed.get("dp_replicate_size", 1)
    data_ranks = 1 if replicas == 1 else 2 * replicas  # AutoModel wants shards in each replica
    microbatches = max([1, *(option.microbatches for option in options)])
    fields["step_scheduler"]["global_batch_size"] = ROWS * data_ranks * microbatches
    return Launch(fields, data_ranks * cp_size * distributed["pp_size"])


def _merge(fields: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change nested fields in place."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(fields.get(key), dict):
            if "_target_" in value and value["_target_"] != fields[key].get("_target_"):
                fields[key] = copy.deepcopy(dict(value))
            else:
                _merge(fields[key], value)
        else:
            fields[key] = copy.deepcopy(value)
