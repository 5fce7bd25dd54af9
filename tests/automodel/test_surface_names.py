# SPDX-License-Identifier: Apache-2.0
"""Where AutoModel goes by a model's class or by a predicate, ours is found like its own."""

import importlib

import pytest
from nemo_automodel._transformers.registry import ModelRegistry
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch import nn

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
from tests.automodel import source_reads
from tests.automodel.surface import INTENDED, declared, differing, pairs, replaced

pytestmark = pytest.mark.usefixtures("fast_on_small_tensors")


def layer_groups(theirs, ours):
    table = importlib.import_module("nemo_automodel._transformers.model_parallelization")
    return ours.parallel_layer_groups == table._LAYER_GROUPS[DeepseekV4ForCausalLM.__name__]


def is_registered(theirs, ours):
    return ModelRegistry.get_model_cls_from_model_arch(
        DeepseekV4ContextParallelConfig.architecture
    ) is declared(ours)


def strategy(theirs, ours):
    parallelizer = importlib.import_module("nemo_automodel.components.distributed.parallelizer")
    chosen = (type(parallelizer.get_parallelization_strategy(model)) for model in (theirs, ours))
    return len(set(chosen)) == 1


def found_by_model_type(theirs, ours):
    fsdp = importlib.import_module("nemo_automodel.components.models.deepseek_v4.fsdp")
    return all(
        fsdp._is_deepseek_v4_module(a) == fsdp._is_deepseek_v4_module(b)
        for a, b in pairs(theirs, ours).values()
        if isinstance(a, nn.Module)
    )


def predicate(file, name):
    module = importlib.import_module(f"nemo_automodel.{file.removesuffix('.py').replace('/', '.')}")
    return lambda theirs, ours: all(
        getattr(module, name)(a) == getattr(module, name)(b)
        for a, b in ((theirs, ours), (theirs.model, ours.model))
    )


def never_ours(theirs, ours):
    return True


BY_NAME = {
    ("_transformers/capabilities.py", "_is_deepseek_v4"): predicate,  # by model_type first
    ("components/checkpoint/checkpointing.py", "_is_custom_model"): predicate,  # by the bases too
    ("_transformers/model_parallelization.py", "_LAYER_GROUPS"): layer_groups,
    ("_transformers/registry.py", "MODEL_ARCH_MAPPING"): is_registered,
    ("components/models/deepseek_v4/fsdp.py", "_DSV4_CLASS_NAMES"): found_by_model_type,
    ("components/distributed/parallelizer.py", "PARALLELIZATION_STRATEGIES"): strategy,
    # AutoModel's own config class, for checkpoints that are named without ours.
    ("_transformers/registry.py", "_CUSTOM_CONFIG_REGISTRATIONS"): never_ours,
    # DSpark's recipe builds its target from AutoModel's own config class.
    ("components/speculative/dspark/registry.py", "DSPARK_DRAFT_REGISTRY"): never_ours,
    ("recipes/llm/train_dspark.py", "TrainDSparkRecipe.setup"): never_ours,
}
"""Where AutoModel goes by the name of a class that we replace, and what holds for ours there."""


def test_wherever_automodel_goes_by_a_class_name_ours_is_found(models):
    classes = replaced(*models)
    places = set(source_reads.uses_of_classes({theirs.__name__ for theirs, _ in classes}))
    for test in source_reads.name_tests():
        attribute = "__module__" if test.of_module else "__name__"
        if any(
            test.holds(getattr(theirs, attribute)) != test.holds(getattr(ours, attribute))
            for theirs, ours in classes
        ):
            places.add((test.place.file, test.place.scope))
    unknown = sorted(places - set(BY_NAME))
    assert not unknown, f"AutoModel goes by a class name that ours has not: {unknown}"
    missed = []
    for file, scope in sorted(places):
        holds = BY_NAME[file, scope]
        if not (predicate(file, scope) if holds is predicate else holds)(*models):
            missed.append(f"{file} ({scope})")
    assert not missed, f"AutoModel does not find ours by {missed}"


PREDICATES = list(source_reads.predicates())


def test_functions_that_decide_by_a_model_decide_the_same(models):
    found = []
    for path, name, _ in PREDICATES:
        decide = getattr(importlib.import_module(path), name)
        for at, (theirs, ours) in pairs(*models).items():
            if outcome(decide, theirs) != outcome(decide, ours):
                found.append(f"{path}.{name} of {at or 'model'}: {outcome(decide, ours)}")
    assert not found, "\n".join(found)


def outcome(decide, subject):
    try:
        return bool(decide(subject))
    except Exception as error:
        return type(error)


def test_declared_capabilities_are_automodels_but_for_the_intended(models):
    theirs, ours = (model.ModelCapabilities() for model in models)
    assert set(differing(theirs, ours)) <= set(INTENDED)
