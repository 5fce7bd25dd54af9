"""``verify`` through its installed entry point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nemo_dsv4_cp.cli.app import app
from nemo_dsv4_cp.tools import recipes

COMMAND = str(Path(sys.executable).with_name("nemo-dsv4-cp"))

BROKEN = """
import torch
from nemo_dsv4_cp.exchange.boundary import BoundaryTransport


class NoWindowBeforeTheCut(BoundaryTransport):
    def left_context(self, tensors, tokens):
        contexts = super().left_context(tensors, tokens)
        raw = contexts[0]
        if self.layout.cp_rank:  # the keys before the cut are lost
            own = raw.tensor[:, tokens[0] :]
            lost = torch.zeros_like(raw.tensor[:, : tokens[0]])
            contexts[0] = type(raw)(torch.cat((lost, own), dim=1), raw.first)
        return contexts
"""


@pytest.fixture
def recipe(tmp_path):
    def write(name, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipes.compose(name, overrides).fields))
        return path

    return write


def verify(path, *arguments, **environment):
    return subprocess.run(
        [COMMAND, "verify", str(path), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=1800,
        check=False,
    )


def test_a_packed_flash_recipe_is_the_same_under_cp(recipe, tmp_path):
    figures = tmp_path / "figures.json"
    path = recipe("flash_packed", "model.config.num_nextn_predict_layers=1")
    done = verify(path, "--ranks", "2", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The same" in done.stdout
    named = {figure["name"]: figure for figure in json.loads(figures.read_text())}
    assert all(figure["passes"] for figure in named.values())
    assert {"loss", "logits", "gradient of mtp.layers.0.e_proj.weight"} <= set(named)
    assert "gradient of model.layers.2.self_attn.compressor.wkv.weight" in named


def test_a_lost_term_of_attention_is_found_and_named(recipe, tmp_path):
    """A transport of another distribution, which loses the keys before the cut."""
    (tmp_path / "broken.py").write_text(BROKEN)
    metadata = tmp_path / "broken-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[nemo_dsv4_cp.transports]\nbroken = broken:NoWindowBeforeTheCut\n"
    )
    path = recipe("tiny_cpu")
    fields = yaml.safe_load(path.read_text())
    fields["model"]["config"]["context_parallel"]["transport"] = "broken"
    path.write_text(yaml.safe_dump(fields))
    done = verify(path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "Differs:" in said
    assert "gradient of model.layers." in said
    assert "above all logits" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("model: {}", "no recipe with a model.config section"),
        ("{model: {config: {_target_: other.Config}}}", "the one changed line is"),
        (
            "{model: {config: {_target_: nemo_dsv4_cp.DeepseekV4ContextParallelConfig}}}",
            "no compress_ratios; name them there",
        ),
        (
            "{model: {config: {_target_: nemo_dsv4_cp.DeepseekV4ContextParallelConfig, "
            "compress_ratios: [4], context_parallel: {transport: none}}}}",
            "transport='none' is not installed",
        ),
    ],
)
def test_a_mistake_ends_with_a_line_that_says_what_works(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output
