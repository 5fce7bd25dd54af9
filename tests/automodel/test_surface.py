# SPDX-License-Identifier: Apache-2.0
"""Our model answers AutoModel's recipes and components as AutoModel's own does.

They look at a model in many places: signatures, attributes, class names, predicates. Each test
takes what ours and AutoModel's differ in, and searches AutoModel's source for reads of it. A read
that a new release adds is found too.
"""

import ast
import copy
import functools
import importlib
import inspect
import textwrap
import types

import pytest
import torch
from nemo_automodel._transformers import capabilities
from nemo_automodel._transformers.registry import ModelRegistry
from nemo_automodel.components.distributed.activation_checkpointing import (
    apply_submodule_checkpointing,
)
from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from nemo_automodel.components.moe.layers import MoE
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PretrainedConfig

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.config import ARCHITECTURE
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.automodel import source_reads
from tests.parity import SIZES, cpu_backend, randomise, tiny_config

RATIOS = [0, 4, 128, 4]
# All entries are chosen: the indexer of 0.5.0 chooses others than later ones.
TEXT = {"num_nextn_predict_layers": 1, "compress_ratios": [*RATIOS, 4], "index_topk": 512}
VISION = {
    "vision_n_layers": 1,
    "vision_dim": 16,
    "vision_n_heads": 2,
    "vision_inter_dim": 32,
}
CONFIGS = {"text": TEXT, "vision": TEXT | VISION}

# What differs on purpose, and why no read of it in AutoModel is misled.
INTENDED = {
    "_owns_cp_attention": "AutoModel accepts cp_size > 1 with any attention backend",
    "_owns_packed_attention": "and packed rows",
    "supports_cp": "follows from _owns_cp_attention",
    "supports_cp_with_sequence_packing": "follows from _owns_packed_attention",
    "supports_sequence_packing": "follows from _owns_packed_attention",
    "supports_mtp_cp": "prepare_mtp_inputs_for_cp shifts the rows before they are sharded",
    "prepare_mtp_inputs_for_cp": "AutoModel calls it where supports_mtp_cp is true",
    "mtp_per_depth_input_ids": "AutoModel passes it where supports_mtp_cp is true",
    "mtp_per_depth_position_ids": "AutoModel passes it where supports_mtp_cp is true",
    "prepare_model_inputs_for_cp": "0.5.0 reads it in recipes of models that see images alone",
    "supports_thd": "a class attribute, since 0.5.0 does not attach it",
    "parallel_layer_groups": "AutoModel attaches it by exact class name, ours has it",
    "pixel_values": "AutoModel's model takes it since 0.7.0, ours in every release",
    "image_grid_hws": "AutoModel's model takes it since 0.7.0, ours in every release",
    "n_images_per_sample": "AutoModel's model takes it since 0.7.0, ours in every release",
    "vision_token_types": "AutoModel's model takes it since 0.7.0, ours in every release",
    "position_ids": "AutoModel's attention takes it since 0.6.0, ours in every release",
    "_cp_group": "the group of the last step; AutoModel's V4 attention has one of its own",
    "_compressed": "a method of our attention; in AutoModel an attribute of a dataset",
    "architectures": "names our class in AutoModel's registry",
    "context_parallel": "our options",
    "_context_parallel": "our options",
}


def build(cls, **changes):
    if cls is DeepseekV4ForCausalLM:
        config = DeepseekV4Config(
            **SIZES | {"num_hidden_layers": len(RATIOS), "compress_ratios": RATIOS} | changes
        )
    else:
        config = tiny_config(**{"ratios": RATIOS} | changes)
    model = cls(config, backend=cpu_backend())
    capabilities.attach_capabilities_and_validate(model, types.SimpleNamespace(cp_size=1))
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    return model


@pytest.fixture(scope="module", autouse=True)
def fast_on_small_tensors():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):  # AutoModel compiles an activation of experts
        yield
    torch.set_num_threads(threads)


SEES_IMAGES = hasattr(DeepseekV4Config(**SIZES), "vision_n_layers")


@pytest.fixture(scope="module")
def both():
    """AutoModel's model and ours, with the same weights, of each config."""

    @functools.cache
    def of_config(name):
        theirs = build(DeepseekV4ForCausalLM, **CONFIGS[name])
        ours = build(DeepseekV4ContextParallelForCausalLM, **CONFIGS[name])
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return of_config


@pytest.fixture
def models(both):
    """Those of the config with the most modules."""
    return both("vision" if SEES_IMAGES else "text")


@pytest.fixture(params=CONFIGS)
def each_models(both, request):
    if request.param == "vision" and not SEES_IMAGES:
        pytest.skip("this AutoModel has no images for V4")
    return both(request.param)


def duplicate(model):
    copied = copy.deepcopy(model)
    vars(copied).pop("_supports", None)  # refers to the first
    return copied


def pairs(theirs, ours):
    """Return modules and configs by path, AutoModel's and ours: one of each class.

    Of a class that ours replaces, all are returned: the attention of each compress ratio.
    """
    of_theirs, of_ours = dict(theirs.named_modules()), dict(ours.named_modules())
    assert list(of_ours) == list(of_theirs)
    found, seen = {"config": (theirs.config, ours.config)}, set()
    for path, module in of_theirs.items():
        classes = type(module), type(of_ours[path])
        if classes[0] is not classes[1] or classes not in seen:
            found[path] = module, of_ours[path]
        seen.add(classes)
    return found


def replaced(theirs, ours):
    """Return the classes that ours has in the place of AutoModel's."""
    classes = {(declared(a), declared(b)) for a, b in pairs(theirs, ours).values()}
    return sorted(
        {(a, b) for a, b in classes if a is not b}, key=lambda of_both: of_both[0].__name__
    )


def declared(instance):
    """Return the class of an instance, without what attach_capabilities_and_validate adds."""
    cls = type(instance)
    return cls.__mro__[1] if "supports" in vars(cls) else cls


ABSENT = object()


def value_of(instance, name):
    try:
        return getattr(instance, name)
    except Exception as error:
        return ABSENT if isinstance(error, AttributeError) else type(error)


def same(theirs, ours):
    if theirs is ABSENT or ours is ABSENT:
        return theirs is ours
    if isinstance(theirs, (nn.Module, PretrainedConfig, type)):  # see pairs for what they hold
        return issubclass(*(v if isinstance(v, type) else type(v) for v in (ours, theirs)))
    if inspect.isroutine(theirs) and inspect.isroutine(ours):
        return True  # calls are compared by signature
    if isinstance(theirs, torch.Tensor):
        return (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
    if type(theirs) is not type(ours):
        return False
    return type(theirs).__eq__ is object.__eq__ or bool(theirs == ours)


def differing(theirs, ours):
    """Return names that differ between two instances, with both values."""
    names = {name for name in {*dir(theirs), *dir(ours)} if not name.startswith("__")}
    names -= {"_modules", "_parameters", "_buffers"}  # compared one by one
    return {
        name: values
        for name in sorted(names)
        if not same(*(values := (value_of(theirs, name), value_of(ours, name))))
    }


def test_attributes_that_automodel_reads_are_the_same(models):
    assert_same_reads(*models)


def assert_same_reads(theirs, ours):
    found = {path: differing(a, b) for path, (a, b) in pairs(theirs, ours).items()}
    unexplained = {name for values in found.values() for name in values} - set(INTENDED)
    places = {name: at for name, at in source_reads.places_of(unexplained).items() if at}
    lines = [
        f"{path or 'model'}.{name} is {shown(values[name][1])}, AutoModel's "
        f"{shown(values[name][0])}; read in {', '.join(map(str, places[name][:3]))}"
        for path, values in found.items()
        for name in values.keys() & places.keys()
    ]
    assert not lines, "\n".join(lines)


def shown(value):
    if value is ABSENT:
        return "absent"
    return "a method" if inspect.isroutine(value) else repr(value)


def test_what_is_looked_up_in_a_class_without_its_bases_is_there(models):
    for theirs, ours in replaced(*models):
        # Of processors, a `from_pretrained` that AutoModel has patched is looked up so.
        read = source_reads.class_dict_reads() - {"from_pretrained"}
        own = {name for name in read if name in vars(theirs)}
        assert own <= set(vars(ours)), f"{ours.__name__} inherits {own - set(vars(ours))}"


def test_every_module_is_an_instance_of_automodels_class(models):
    for path, (theirs, ours) in pairs(*models).items():
        assert isinstance(ours, declared(theirs)), f"{path} is a {type(ours).__name__}"


# Calls


def problems(theirs, ours):
    """Return what AutoModel's function tells by its signature, or takes, and ours does not."""
    of_theirs, of_ours = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    places = {name: place for place, name in enumerate(of_ours)}
    for place, (name, parameter) in enumerate(of_theirs.items()):
        kind = parameter.kind
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if all(other.kind is not kind for other in of_ours.values()):
                yield f"takes no {'*' if kind is parameter.VAR_POSITIONAL else '**'}{name}"
            continue
        mine = of_ours.get(name)
        if mine is None:
            yield f"hides {name}"
            continue
        if parameter.default not in (parameter.empty, mine.default):
            yield f"{name} is {mine.default!r} by default, not {parameter.default!r}"
        by_place = kind is not parameter.KEYWORD_ONLY
        if by_place and (mine.kind is mine.KEYWORD_ONLY or places[name] != place):
            yield f"takes {name} at another place"
        if kind is not parameter.POSITIONAL_ONLY and mine.kind is mine.POSITIONAL_ONLY:
            yield f"takes no {name}="
    for name, mine in of_ours.items():
        var = mine.kind in (mine.VAR_POSITIONAL, mine.VAR_KEYWORD)
        if name not in of_theirs and not var and mine.default is mine.empty:
            yield f"needs {name}"


def overridden(theirs, ours):
    """Yield the methods of ours that AutoModel's class has too."""
    for name in dir(ours):
        static = inspect.getattr_static(ours, name)
        method = getattr(static, "__func__", static)
        base = inspect.getattr_static(theirs, name, None)
        if inspect.isfunction(method) and base is not None and base is not static:
            yield name, getattr(base, "__func__", base), method


def test_overridden_methods_show_and_take_all_that_automodels_take(models):
    found = [
        f"{ours.__name__}.{name} {problem}"
        for theirs, ours in replaced(*models)
        if issubclass(ours, nn.Module)  # configs are constructed by keyword
        for name, base, method in overridden(theirs, ours)
        for problem in problems(base, method)
    ]
    assert not found, "\n".join(found)


def test_parameters_that_only_ours_takes_are_not_what_automodel_tells_models_apart_by(models):
    for theirs, ours in replaced(*models):
        added = {
            parameter
            for name, base, method in overridden(theirs, ours)
            if issubclass(ours, nn.Module)
            for parameter, taken in inspect.signature(method).parameters.items()
            if parameter not in inspect.signature(base).parameters
            and taken.kind not in (taken.VAR_POSITIONAL, taken.VAR_KEYWORD)
        }
        read = {name for name, at in source_reads.places_of(added).items() if at}
        assert read <= set(INTENDED), f"{ours.__name__}: {read - set(INTENDED)}"


def test_functions_that_we_replace_take_what_automodels_take(models):
    for owner, name, original, new in patches._replaced:
        if inspect.isfunction(original) and inspect.isfunction(new):
            found = [
                *problems(original, new),
                *(p for p in problems(original, undisguised(new)) if not p.startswith("hides")),
            ]
            assert not found, f"{owner}.{name}: {found}"


def undisguised(function):
    """Return a function that shows its own signature, not that of what it wraps."""
    bare = types.FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    bare.__defaults__, bare.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return bare


IDS = torch.arange(2 * 150).view(2, 150) * 7 % 97
MASK = torch.ones_like(IDS).index_fill_(1, torch.arange(140, 150), 0)
CALLS = {
    "ids": {},
    "positions of one row": {"position_ids": torch.arange(150)[None]},
    "positions without rows": {"position_ids": torch.arange(150)},
    "attention mask": {"attention_mask": MASK},
    "boolean attention mask": {"attention_mask": MASK.bool()},
    "padding mask": {"padding_mask": ~MASK.bool()},
    "last logits": {"logits_to_keep": 3},
    "logits by index": {"logits_to_keep": torch.tensor([0, 5, 149])},
    "hidden states": {"output_hidden_states": True},
    "hidden states and last logits": {"output_hidden_states": True, "logits_to_keep": 1},
    "no hidden states": {"output_hidden_states": False},
    "text types": {"vision_token_types": torch.full_like(IDS, -1)},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_returns_what_automodels_model_returns(each_models, call, training):
    theirs, ours = each_models
    arguments = CALLS[call]
    if not arguments.keys() <= inspect.signature(DeepseekV4ForCausalLM.forward).parameters.keys():
        pytest.skip("this AutoModel has no such argument")
    with torch.no_grad():
        try:
            expected = theirs.train(training)(IDS, **arguments)
        except IndexError:
            pytest.skip("AutoModel's own model fails: MTP needs a position for each row")
        mine = ours.train(training)(IDS, **arguments)
    assert type(mine) is type(expected)
    assert mine.keys() == expected.keys()
    real = MASK[..., None].bool() if "mask" in call else torch.ones(())
    for key in expected:
        torch.testing.assert_close(
            tree(mine[key], real), tree(expected[key], real), atol=2e-5, rtol=0
        )


def tree(value, real):
    """Return tensors without what stands at padding, which is of no use."""
    if isinstance(value, (list, tuple)):
        return [tree(element, real) for element in value]
    return value * real if isinstance(value, torch.Tensor) else value


BARE = {
    "forward": lambda model: model.eval()(IDS).logits,
    "forward with MTP": lambda model: model.train()(IDS).mtp_per_depth_h[0],
    "update_moe_gate_bias": lambda model: (model.train()(IDS), model.update_moe_gate_bias())[1],
    "get_input_embeddings": lambda model: model.get_input_embeddings().weight,
    "stage metas": lambda model: model.get_pipeline_stage_metas(
        is_first=True, microbatch_size=1, seq_len=8, dtype=torch.float32
    )[1],
    "initialize_weights": lambda model: model.initialize_weights(
        torch.device("cpu"), torch.float32
    ),
}


@pytest.mark.parametrize("call", BARE)
def test_methods_work_on_a_model_made_without_its_constructor(each_models, call):
    theirs, ours = each_models
    bare = DeepseekV4ContextParallelForCausalLM.__new__(DeepseekV4ContextParallelForCausalLM)
    nn.Module.__init__(bare)
    reference = duplicate(ours)
    set_by_automodel = vars(theirs).keys() - {"_supports"}
    bare.__dict__.update({k: v for k, v in vars(duplicate(ours)).items() if k in set_by_automodel})
    with torch.no_grad():
        torch.manual_seed(0)
        expected = BARE[call](reference)
        torch.manual_seed(0)
        torch.testing.assert_close(BARE[call](bare), expected)


def test_methods_read_no_attribute_that_only_our_constructor_sets(models):
    theirs, _ = models
    for there, cls in ((theirs, DeepseekV4ContextParallelForCausalLM), (theirs.model, None)):
        cls = cls or next(b for a, b in replaced(*models) if a is type(theirs.model))
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        methods = [part for part in body if isinstance(part, ast.FunctionDef)]
        read = {
            node.attr
            for method in methods
            if method.name != "__init__"
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
            and isinstance(node.ctx, ast.Load)
        }
        lacks = sorted(name for name in read if not hasattr(cls, name) and not hasattr(there, name))
        assert not lacks, f"{cls.__name__} has no default for {lacks}"


# Class names and predicates


def layer_groups(theirs, ours):
    table = importlib.import_module("nemo_automodel._transformers.model_parallelization")
    return ours.parallel_layer_groups == table._LAYER_GROUPS[DeepseekV4ForCausalLM.__name__]


def is_registered(theirs, ours):
    return ModelRegistry.get_model_cls_from_model_arch(ARCHITECTURE) is declared(ours)


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
