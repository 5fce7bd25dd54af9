# SPDX-License-Identifier: Apache-2.0
"""AutoModel's model and ours with the same weights, and what differs between them."""

import copy
import inspect
import types

import torch
from nemo_automodel._transformers import capabilities
from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch import nn
from transformers import PretrainedConfig

from tests.automodel import source_reads
from tests.parity import SIZES, cpu_backend, randomise, tiny_config

RATIOS = [0, 4, 128, 4]
# The indexer selects all entries: that of 0.5.0 would select others than later ones.
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


SEES_IMAGES = hasattr(DeepseekV4Config(**SIZES), "vision_n_layers")


IDS = torch.arange(2 * 150).view(2, 150) * 7 % 97
MASK = torch.ones_like(IDS).index_fill_(1, torch.arange(140, 150), 0)


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
