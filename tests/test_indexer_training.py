# SPDX-License-Identifier: Apache-2.0
"""Whole models train their indexers in AutoModel's own step, on any ranks as on one."""

from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from nemo_automodel._transformers import infrastructure
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM

from nemo_dsv4_cp.automodel import training_step
from nemo_dsv4_cp.automodel.training_step import TrainingStep
from nemo_dsv4_cp.checks.difference import GRADIENT_LIMIT, OUTPUT_LIMIT, Difference
from nemo_dsv4_cp.exchange.collectives import all_reduce_sum, cp_size
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.tools import local_ranks
from nemo_dsv4_cp.tools.verification import gradient_limit, packed_batch
from tests.indexer_loss import INDEXER, indexer_loss
from tests.parity import cpu_backend, randomise, tiny_config, worst
from tests.ranks import fork_ranks

COEFFICIENT = 0.5
THETA = 160000.0
"""Of compressed layers, as the config has it."""
MICROBATCHES = ([[1, 20, 3, 17], [29]], [[35, 4], [2, 2, 30]])


@dataclass(frozen=True)
class Case:
    """One training step of two microbatches.

    Attributes:
        packed: Whether rows hold several documents; else the longest of each is its row's one.
        options: The ``context_parallel`` block but for the loss's coefficient.
        recipe: What names the activation checkpointing.
    """

    packed: bool
    mode: str
    options: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)

    def documents(self):
        if self.packed:
            return MICROBATCHES
        return [[[max(row)] for row in rows] for rows in MICROBATCHES]

    def batches(self):
        made = []
        for seed, documents in enumerate(self.documents()):
            batch = packed_batch(documents, max(map(sum, documents)), seed, vocab=97)
            if not self.packed:
                batch["attention_mask"] = (batch["labels"] != -100).long()
                batch = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
            made.append(batch)
        return made

    def config(self, coefficient):
        options = dict(self.options)
        if coefficient == 0:
            options.pop("train_only", None)
        loss = {"coefficient": coefficient, "mode": self.mode}
        return tiny_config(
            [0, 4],
            compress_ratios=[0, 4, 4],  # the last is that of MTP
            num_nextn_predict_layers=1,
            num_hash_layers=1,
            # All entries, whatever the rounding; in mode full the loss knows more than those.
            index_topk=512 if self.mode == "sparse" else 4,
            index_n_heads=8,
            sliding_window=16,
            context_parallel=options | {"indexer_loss": loss},
        )


def build(config):
    """Return a training model with drawn weights."""
    model = DeepseekV4ContextParallelForCausalLM(
        config, backend=cpu_backend(), moe_overrides={"aux_loss_coeff": 0.01}
    )
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    model.train()
    return model


def alone(model, case):
    """Return one rank's step, and what each attention with an indexer got: by name, in order."""
    infrastructure.freeze_deepseek_v4_indexer_params(model)
    got = {}

    def keep(name):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            got.setdefault(name, []).append(hidden.detach())

        return hook

    for name, module in model.named_modules():
        if name.endswith(".self_attn") and module.kind.has_indexer:
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
    loss = training_step.build_loss(case.recipe, torch.device("cpu"))
    return TrainingStep(model, loss.function, torch.device("cpu")).run(case.batches()), got


def by_definition(model, case, got):
    """Return each layer's mean loss of the microbatches, and the gradients of the step's loss."""
    losses, gradients, margins = {}, {}, []
    for name, hidden in got.items():
        attention = model.get_submodule(name)
        full = case.mode == "full"
        each = [
            indexer_loss(attention.state_dict(), model.config, x, documents, full=full, theta=THETA)
            for x, documents in zip(hidden, case.documents(), strict=True)
        ]
        losses[name] = sum(of_batch.loss for of_batch in each) / len(each)
        margins += [of_batch.margin for of_batch in each]
        for parameter in each[0].gradients:
            total = sum(of_batch.gradients[parameter] for of_batch in each)
            gradients[f"{name}.{parameter}"] = COEFFICIENT * total / len(each)
    return losses, gradients, min(margins)


def training_job(group, rank, cases):
    return [compare(group, case) for case in cases]


def compare(group, case):
    """Return the differences of this group's step from one rank's, and of that from others."""
    reference = build(case.config(COEFFICIENT))
    expected, got = alone(reference, case)
    losses, gradients, margin = by_definition(reference, case, got)
    assert margin > 1e-6, margin
    found = [
        Difference(f"defined {name}", worst(expected.gradients[name], theirs), GRADIENT_LIMIT)
        for name, theirs in gradients.items()
    ]
    without, _ = alone(build(case.config(0.0)), case)
    trains_all = case.options.get("train_only") != "indexer"
    others = {n: g for n, g in expected.gradients.items() if INDEXER not in n}
    assert others.keys() == (without.gradients.keys() if trains_all else set())
    assert expected.loss == without.loss
    found += [
        Difference(f"{name} without", worst(mine, without.gradients[name]), 0.0)
        for name, mine in others.items()
    ]

    device = torch.device("cpu")
    model, setup = training_step.parallelize(
        build(case.config(COEFFICIENT)), case.recipe, cp_size=cp_size(group), device=device
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains_all or all(INDEXER in name for name in trained)
    loss = training_step.build_loss(case.recipe, device).for_model(model)
    step = TrainingStep(model, loss.function, device, setup, packed=case.packed).run(case.batches())
    found.append(Difference("loss", abs(step.loss - expected.loss), OUTPUT_LIMIT))
    for name, theirs in expected.auxiliary_losses.items():
        gap = float((step.auxiliary_losses[name] - theirs).abs().max())
        found.append(Difference(f"auxiliary loss of {name}", gap, OUTPUT_LIMIT))
    assert step.gradients.keys() == expected.gradients.keys()
    parameters = dict(reference.named_parameters())
    for name, theirs in expected.gradients.items():
        limit = gradient_limit(name, parameters)
        found.append(Difference(name, worst(step.gradients[name], theirs), limit))
    modules = {n.replace("_checkpoint_wrapped_module.", ""): m for n, m in model.named_modules()}
    for name, theirs in losses.items():
        mine, _ = all_reduce_sum(modules[name].indexer_losses.take(), [group]).tolist()
        found.append(Difference(f"indexer loss of {name}", abs(mine - theirs), OUTPUT_LIMIT))
    return [(each.name, each.value, each.limit) for each in found if not each.passes]


FULL, SELECTIVE = (
    {"distributed": {"activation_checkpointing": how}} for how in (True, "selective")
)
CASES = {
    "packed, full checkpointing": Case(True, "sparse", {"balance": "on"}, FULL),
    "padded, the indexer alone": Case(False, "full", {"train_only": "indexer"}, SELECTIVE),
    "packed, the indexer alone": Case(
        True, "full", {"train_only": "indexer", "balance": "on"}, FULL
    ),
    "padded, all-gather": Case(False, "sparse", {"transport": "all_gather"}),
}


PACKED, PADDED = (
    [name for name in CASES if name.startswith(start)] for start in ("packed", "padded")
)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, PACKED),
        pytest.param(3, PADDED, marks=SLOW),
        pytest.param(2, PADDED, marks=SLOW),
        pytest.param(3, PACKED, marks=SLOW),
    ],
)
def test_a_step_on_ranks_is_that_of_one_rank_and_of_the_definition(size, names):
    with patch.object(local_ranks, "spawn", fork_ranks):
        found = local_ranks.run(training_job, size, [CASES[name] for name in names])
    assert dict(zip(names, found, strict=True)) == {name: [] for name in names}


def trained(**options):
    """Return the parameters that train after AutoModel's last word on it: all, the indexers'."""
    config = tiny_config([0, 4], context_parallel=options)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    for _ in range(2):  # after sharding, and after loading
        infrastructure.freeze_deepseek_v4_indexer_params(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_indexer = {name for name, _ in model.named_parameters() if INDEXER in name}
    assert len(of_indexer) == 6
    return names - of_indexer, names & of_indexer, of_indexer


def test_what_trains_is_what_the_block_says():
    loss = {"coefficient": 0.1}
    others, none, of_indexer = trained()
    assert others and not none
    assert trained(indexer_loss=loss) == (others, of_indexer, of_indexer)
    assert trained(indexer_loss=loss, train_only="indexer") == (set(), of_indexer, of_indexer)
    assert trained(indexer_loss={"coefficient": 0.0, "mode": "full"})[:2] == (others, set())


def test_a_stage_without_an_indexer_is_refused_where_nothing_else_trains():
    loss = {"coefficient": 0.1}
    for options in ({}, {"train_only": "indexer"}):
        config = tiny_config([0, 4], context_parallel={"indexer_loss": loss} | options)
        stage = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
        del stage.model.layers["1"]
        if not options:
            infrastructure.freeze_deepseek_v4_indexer_params(stage)
            continue
        with pytest.raises(ValueError, match=r"stage that has no layer .*smaller distributed\.pp_"):
            infrastructure.freeze_deepseek_v4_indexer_params(stage)


def test_a_model_of_automodels_keeps_its_indexer_frozen():
    DeepseekV4ContextParallelForCausalLM(tiny_config([4]), backend=cpu_backend())  # patched now
    model = DeepseekV4ForCausalLM(tiny_config([4]), backend=cpu_backend())
    infrastructure.freeze_deepseek_v4_indexer_params(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if INDEXER in name)


def test_the_state_dict_is_automodels():
    case = Case(True, "sparse")
    mine = build(case.config(COEFFICIENT))
    theirs = DeepseekV4ForCausalLM(case.config(COEFFICIENT), backend=cpu_backend())
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
