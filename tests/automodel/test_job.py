# SPDX-License-Identifier: Apache-2.0
"""The number of CP ranks, as AutoModel's own builder hands it to a model."""

import copy
from types import SimpleNamespace

import torch
from nemo_automodel._transformers import capabilities

from nemo_dsv4_cp.automodel import job, patches


def test_a_model_and_its_copies_know_once_it_is_checked_against_the_mesh(monkeypatch):
    monkeypatch.setattr(capabilities, job.FUNCTION, lambda model, mesh: model)
    job.install()
    model = torch.nn.Linear(1, 1)
    assert job.cp_size_of(model) == 1
    assert capabilities.attach_capabilities_and_validate(model, SimpleNamespace(cp_size=4)) is model
    assert job.cp_size_of(copy.deepcopy(model)) == 4
    capabilities.attach_capabilities_and_validate(model, None)
    assert job.cp_size_of(model) == 1
    patches.undo()
