# SPDX-License-Identifier: Apache-2.0
"""Our model answers AutoModel's recipes and components as AutoModel's own does.

They look at a model in many places: signatures, attributes, class names, predicates. Each test
takes what ours and AutoModel's differ in, and searches AutoModel's source for reads of it. A read
that a new release adds is found too.
"""

import pytest
import torch
from nemo_automodel.components.distributed.activation_checkpointing import (
    apply_submodule_checkpointing,
)
from nemo_automodel.components.moe.layers import MoE
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.automodel import source_reads
from tests.automodel.surface import IDS, assert_same_reads, declared, duplicate, pairs, replaced

pytestmark = pytest.mark.usefixtures("fast_on_small_tensors")


def test_attributes_that_automodel_reads_are_the_same(models):
    assert_same_reads(*models)


def test_what_is_looked_up_in_a_class_without_its_bases_is_there(models):
    for theirs, ours in replaced(*models):
        # Of processors, a `from_pretrained` that AutoModel has patched is looked up so.
        read = source_reads.class_dict_reads() - {"from_pretrained"}
        own = {name for name in read if name in vars(theirs)}
        assert own <= set(vars(ours)), f"{ours.__name__} inherits {own - set(vars(ours))}"


def test_every_module_is_an_instance_of_automodels_class(models):
    for path, (theirs, ours) in pairs(*models).items():
        assert isinstance(ours, declared(theirs)), f"{path} is a {type(ours).__name__}"


# Activation checkpointing


def wrap_submodules(blocks):
    """What AutoModel does at ep_size 1."""
    apply_submodule_checkpointing(list(blocks.values()), has_kv_sharing=False)


def wrap_blocks(blocks):
    """What AutoModel does at ep_size > 1, and for selective checkpointing."""
    for number, block in list(blocks.items()):
        blocks[number] = checkpoint_wrapper(block)


WRAPPED = pytest.mark.parametrize("wrap", [wrap_submodules, wrap_blocks])


def checkpointed(model, wrap):
    model = duplicate(model)
    wrap(model.model.layers)
    return model


@WRAPPED
def test_under_activation_checkpointing_reads_are_the_same(models, wrap):
    theirs, ours = (checkpointed(model, wrap) for model in models)
    assert_same_reads(theirs, ours)
    for path, (a, b) in pairs(theirs, ours).items():
        assert isinstance(b, declared(a)), path


@WRAPPED
def test_under_activation_checkpointing_every_gates_bias_is_updated(each_models, wrap):
    plain, wrapped = duplicate(each_models[1]), checkpointed(each_models[1], wrap)
    for model in (plain, wrapped):
        with torch.no_grad():
            model.train()(IDS)
        model.update_moe_gate_bias()
    biases = [
        [module.gate.e_score_correction_bias for module in model.model.modules() if scored(module)]
        for model in (plain, wrapped)
    ]
    assert all(bias.any() for bias in biases[0])
    torch.testing.assert_close(*biases)


def scored(module):
    return isinstance(module, MoE) and hasattr(module.gate, "e_score_correction_bias")
