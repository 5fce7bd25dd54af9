# SPDX-License-Identifier: Apache-2.0
"""What a comparison of two trainings must not let pass."""

import copy

import pytest
import torch

from tests.recipes.comparing import Record, idle, too_far


@pytest.fixture
def record():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    names = {"attn_hc.fn": (8, 16), "attn_hc.scale": (3,), "wq_a.weight": (4, 4)}
    steps = [{name: drawn(*shape) for name, shape in names.items()} for _ in range(2)]
    scales = [{name: drawn(*names[name]) for name in ("attn_hc.fn", "attn_hc.scale")}] * 2
    return Record("loss", [], [5.0, 4.0], [1.0, 1.0], [4.5], steps, scales)


def test_a_training_equals_itself(record):
    assert too_far(record, record) == ""


@pytest.mark.parametrize("key", ["losses", "norms", "validation"])
def test_a_number_that_differs_is_named(record, key):
    other = copy.deepcopy(record)
    getattr(other, key)[-1] += 1e-3
    assert {"losses": "loss", "norms": "norm", "validation": "validation"}[key] in too_far(
        other, record
    )


@pytest.mark.parametrize("step", [0, 1])
def test_one_entry_of_one_gradient_that_differs_is_named(record, step):
    other = copy.deepcopy(record)
    gradient = other.gradients[step]["wq_a.weight"]
    gradient[2, 3] += 1e-4 * gradient.abs().max()
    assert too_far(other, record).startswith(f"gradient of wq_a.weight at step {step}")


def test_a_gradient_that_is_no_number_is_too_far(record):
    other = copy.deepcopy(record)
    other.gradients[1]["wq_a.weight"][0, 0] = torch.nan
    assert "wq_a.weight" in too_far(other, record)


def test_a_parameter_that_never_learns_is_named_unless_it_may_rest(record):
    for step in record.gradients:
        step["wq_a.weight"].zero_()
    assert idle(record, None) == ["wq_a.weight"]
    assert idle(record, "wq") == []
    record.frozen_adapters.append("lora_A.weight")
    assert idle(record, "wq") == ["lora_A.weight"]
