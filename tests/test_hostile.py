# SPDX-License-Identifier: Apache-2.0
"""Broken batches and configs on real ranks: all raise the documented error, or none differs."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from nemo_dsv4_cp import ContextParallelOptions
from nemo_dsv4_cp.batch import contiguous_shard
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.breaking import OPTIONS, VOCAB, WRONG_VALUES, Shape, case_of
from tests.examples import MANY
from tests.hostile import KINDS
from tests.parity import GroupMesh, cpu_backend, randomise, tiny_config
from tests.test_docs import holds

BY_NAME = {kind.what: kind for kind in KINDS}
FORWARDED = ("input_ids", "position_ids", "padding_mask", "seq_lens", "qkv_format")
GROUP = "_dsv4_cp_group"
A_HANG = 900.0
"""Seconds without an answer that are a hang: workers that start on a busy machine take minutes."""


@st.composite
def shapes(draw):
    packed = draw(st.booleans())
    most = st.integers(1, 4 if packed else 1)
    of_row = most.flatmap(lambda n: st.tuples(*[st.integers(1, 40 // n)] * n))
    documents = tuple(draw(of_row) for _ in range(draw(st.integers(1, 3))))
    spare, option = draw(st.sampled_from([0, 0, 3])), draw(st.sampled_from(OPTIONS))
    return Shape(documents, packed, spare, option, draw(st.integers(0, 99)))


@functools.lru_cache(maxsize=4)
def model_of(fields, block):
    """Return a model of YAML whose ranks compare their batches on every step."""
    block = yaml.safe_load(block)
    if isinstance(block, dict | None):
        block = {"compare_ranks": "every"} | (block or {})
    config = tiny_config([0, 4], **yaml.safe_load(fields), context_parallel=block)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    return model.eval()


@torch.no_grad()
def trained_on(case, group):
    """Return what a rank's model is given of a case, and this rank's part of the loss."""
    model = model_of(case.fields, case.block)
    cut_batch = model.prepare_model_inputs_for_cp({})["cp_sharder"].shard_batch
    if "pad_multiple" in case.arguments:  # else the model's own
        cut_batch = functools.partial(contiguous_shard, compare_ranks=True, vocab_size=VOCAB)
    _, cut, _ = cut_batch(GroupMesh(group), None, case.batch, **case.arguments)
    cut = dict(cut)
    logits = model(**{key: cut[key] for key in (*FORWARDED, GROUP) if key in cut}).logits
    loss = cross_entropy(logits.flatten(0, 1), cut["labels"].long().flatten(), reduction="sum")
    return {key: value for key, value in cut.items() if key != GROUP} | {"loss": loss}


def differing(expected, got):
    """Return the keys whose numbers are not the expected ones, in whatever dtype."""
    return [
        key
        for key, value in expected.items()
        if not (
            torch.allclose(value.double(), got[key].double(), atol=1e-6)
            if torch.is_tensor(value)
            else value == got[key]
        )
    ]


def hostile_job(group, rank, what, shape, alone):
    """Return what is raised, or what differs from the unbroken case."""
    kind = BY_NAME[what]
    unbroken, broken = case_of(shape), case_of(shape)
    for case in (unbroken, broken):
        kind.before(case)
    if rank == 1 or not alone:
        kind.change(broken)
    expected = None if kind.error else trained_on(unbroken, group)
    try:
        got = trained_on(broken, group)
    except Exception as error:  # which one it must be is known to the test
        return type(error).__name__, str(error)
    return "nothing raised" if expected is None else differing(expected, got)


@pytest.mark.parametrize("what", BY_NAME)
@settings(
    max_examples=60 if MANY else 2,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_it_is_refused_on_all_ranks_or_trained_on_as_it_is_meant(ranks, what, data):
    kind = BY_NAME[what]
    shape = data.draw(shapes().filter(kind.fits))
    alone = not kind.of_config and data.draw(st.booleans())  # on rank 1 of both
    answers = ranks.run(hostile_job, 2, what, shape, alone, within=A_HANG)
    if kind.error is None:
        assert answers == [[], []]
        return
    message = kind.message.replace("OPTION", shape.option)
    for rank, (error, text) in enumerate(answers):
        assert holds(text, message), text
        if alone and rank == 0:
            assert error == "ValueError"
            why = f"refuses its batch, so that all do: {kind.error.__name__}: "
            assert text.startswith(f"rank 1 of this CP group {why}")
        else:
            assert error == kind.error.__name__, text


@pytest.mark.parametrize("text", WRONG_VALUES)
@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_takes_yaml_of_another_kind(option, text):
    block = yaml.safe_load(f"{{{option}: {text}}}")
    with pytest.raises(ValueError, match=rf"^context_parallel\.{option}(\.a)?="):
        ContextParallelOptions.from_block(block)


def test_no_two_kinds_have_one_name():
    assert len(BY_NAME) == len(KINDS)


def test_the_page_lists_the_kinds():
    path = Path(__file__).parents[1] / "docs" / "hostile.py"
    spec = importlib.util.spec_from_file_location("hostile_page", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert script.written(page, KINDS) == page, "run make refusals"
