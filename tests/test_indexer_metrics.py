# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss among AutoModel's metrics: the same numbers on any mesh."""

import json
import logging
import types

import pytest
import torch

from nemo_dsv4_cp.attention.indexer_loss import IndexerLossSums, step_metrics
from nemo_dsv4_cp.automodel import indexer_metrics
from nemo_dsv4_cp.tools.recipes import compose
from tests.recipes import options

LAYERS = (1, 3)  # of ratio 4, in the tiny recipe
TWO_ROWS = {"max_steps": 2, "global_batch_size": 2}
MESHES = {
    "cp": (2, {"cp_size": 2}, 2),
    "dp": (2, {"cp_size": 1}, 1),
    "pp": (2, options.STAGES["distributed"] | {"cp_size": 1}, 2),
}
"""Processes, changes of ``distributed``, and rows of a microbatch."""


@pytest.fixture(scope="module")
def logged(tmp_path_factory, launcher):
    def run(name, processes, distributed, rows):
        """Train two steps of two rows and return the metrics of each."""
        recipe = compose("tiny_cpu").fields
        recipe["model"]["config"]["context_parallel"]["indexer_loss"] = {"coefficient": 0.1}
        training = launcher.train(
            tmp_path_factory.mktemp(name),
            recipe,
            processes,
            {
                "step_scheduler": TWO_ROWS | {"local_batch_size": rows},
                "distributed": distributed,
            },
        )
        assert "indexer loss" in (training.directory / "log").read_text()
        return [json.loads(step) for step in (training.directory / "training.jsonl").open()]

    return run


@pytest.fixture(scope="module")
def accumulated(logged):
    """The metrics of one rank that accumulates the gradients of two microbatches."""
    return logged("accumulated", 1, {"cp_size": 1}, 1)


@pytest.mark.parametrize(
    "mesh", ["cp", *(pytest.param(other, marks=pytest.mark.slow) for other in ("pp", "dp"))]
)
def test_every_mesh_logs_the_indexer_of_the_whole_batch(logged, accumulated, mesh):
    for found, expected in zip(logged(mesh, *MESHES[mesh]), accumulated, strict=True):
        names = [name for name in expected if name.startswith("indexer/")]
        assert names == [
            f"indexer/{of}{what}"
            for of in ("", *(f"layer_{layer}/" for layer in LAYERS))
            for what in ("loss", "captured")
        ]
        assert [found[name] for name in names] == pytest.approx(
            [expected[name] for name in names], rel=1e-4
        )
        for what in ("loss", "captured"):
            layers = [expected[f"indexer/layer_{layer}/{what}"] for layer in LAYERS]
            assert expected[f"indexer/{what}"] == pytest.approx(sum(layers) / len(layers))


def part(config, taken):
    """A model part whose layers of these indices noted these losses."""
    model = torch.nn.Linear(1, 1)
    model.config = config
    for layer, forwards in taken.items():
        module = torch.nn.Identity()
        module.layer_idx, module.indexer_losses = layer, IndexerLossSums()
        for both in forwards:
            module.indexer_losses.add(torch.tensor(both))
        model.add_module(str(layer), module)
    return model


def test_microbatches_are_averaged_and_mtp_layers_named_apart():
    config = types.SimpleNamespace(compress_ratios=[0, 4, 4], num_hidden_layers=2)
    model = part(config, {1: [(1.0, 0.5), (3.0, 0.7)], 2: [(4.0, 0.2)]})
    assert step_metrics([model], [None], 1) == pytest.approx(
        {
            "indexer/loss": 3.0,
            "indexer/captured": 0.4,
            "indexer/layer_1/loss": 2.0,
            "indexer/layer_1/captured": 0.6,
            "indexer/mtp_0/loss": 4.0,
            "indexer/mtp_0/captured": 0.2,
        }
    )
    assert step_metrics([model], [None], 1) == {}


def test_without_a_coefficient_nothing_is_summed_or_logged(caplog):
    recipe = types.SimpleNamespace(
        model_parts=[types.SimpleNamespace(config=None, take_indexer_metrics=pytest.fail)]
    )
    sample = types.SimpleNamespace(metrics={"loss": 1.0})
    with caplog.at_level(logging.INFO):
        log = indexer_metrics._with_indexer
        assert log(lambda recipe, sample: "logged", recipe, sample) == "logged"
    assert sample.metrics == {"loss": 1.0}
    assert not caplog.records
