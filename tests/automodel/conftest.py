# SPDX-License-Identifier: Apache-2.0
"""AutoModel's model and ours, for tests of what AutoModel reads of a model."""

import functools

import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM

from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.automodel.surface import CONFIGS, SEES_IMAGES, build


@pytest.fixture(scope="module")
def fast_on_small_tensors():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):  # AutoModel compiles an activation of experts
        yield
    torch.set_num_threads(threads)


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
