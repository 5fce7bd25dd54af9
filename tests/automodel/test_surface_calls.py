# SPDX-License-Identifier: Apache-2.0
"""Our model takes what AutoModel's own takes, and returns what it returns."""

import ast
import functools
import inspect
import textwrap
import types

import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch import nn

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.automodel import source_reads
from tests.automodel.surface import IDS, INTENDED, MASK, duplicate, replaced

pytestmark = pytest.mark.usefixtures("fast_on_small_tensors")


def problems(theirs, ours):
    """Return what AutoModel's signature shows or accepts, and ours does not."""
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
    around = inspect.getclosurevars(function).nonlocals.get("around")
    if around is not None:
        return functools.partial(around, None)  # it gets the original first
    bare = types.FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    bare.__defaults__, bare.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return bare


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
