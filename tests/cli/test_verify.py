# SPDX-License-Identifier: Apache-2.0
"""``verify``, its installed entry point included."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from typer.testing import CliRunner

from nemo_dsv4_cp.automodel.contracts import has_v41
from nemo_dsv4_cp.cli.app import app
from nemo_dsv4_cp.tools import local_ranks, recipes
from nemo_dsv4_cp.tools.verification import Verification
from tests.ranks import fork_ranks

NAMED = ["+model.config.context_parallel.kernels=triton"]
TORCH = ["+model.config.context_parallel.kernels=torch"]
HAS_V41 = has_v41()
COMMAND = str(Path(sys.executable).with_name("nemo-dsv4-cp"))

BROKEN = """
import torch
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.exchange.collectives import cp_rank
from nemo_dsv4_cp.exchange.collectives import Pending


class NoWindowBeforeTheCut(Transport):
    def fetch(self, tensors, plans):
        answers = super().fetch(tensors, plans)

        def wait():
            rows = answers.wait()
            if cp_rank(self.cp_group):  # the keys before the cut are lost
                raw = rows["keys"]
                before = raw.shape[1] - tensors["keys"].shape[1]
                raw = torch.cat((torch.zeros_like(raw[:, :before]), raw[:, before:]), dim=1)
                rows["keys"] = raw
            return rows

        return Pending(wait)
"""


RAISING = """
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.exchange.collectives import cp_rank


class Raises(Transport):
    def fetch(self, tensors, plans):
        if cp_rank(self.cp_group):
            raise ArithmeticError("no left [context] here")
        return super().fetch(tensors, plans)
"""


def install(source, name, directory, monkeypatch):
    """Install a transport as a distribution of its own, found through ``sys.path``."""
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    (directory / "broken.py").write_text(source)
    metadata = directory / "broken-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[nemo_dsv4_cp.transports]\nbroken = broken:{name}\n"
    )


@pytest.fixture
def recipe(tmp_path):
    def write(name, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipes.compose(name, overrides).fields))
        return path

    return write


def installed(arguments):
    """Run ``verify`` in a process of its own, whose ranks import AutoModel again."""
    done = subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=1800,  # a loaded machine takes minutes
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def forked(arguments):
    """Run ``verify`` in this process, with ranks that are forks."""
    with patch.object(local_ranks, "spawn", fork_ranks):
        done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("run", [forked, pytest.param(installed, marks=pytest.mark.slow)])
def test_a_packed_flash_recipe_is_the_same_under_cp(run, recipe, tmp_path):
    figures = tmp_path / "figures.json"
    path = recipe("flash_packed", "model.config.num_nextn_predict_layers=1")
    status, output, errors = run(["verify", str(path), "--ranks", "2", "--json", str(figures)])
    assert status == 0, output + errors
    assert "The same" in output
    (left_out,) = [line for line in output.splitlines() if line.startswith("Left out")]
    assert "expert parallelism (distributed.ep_size: 64), activation checkpointing as" in left_out
    named = {figure["name"]: figure for figure in json.loads(figures.read_text())}
    assert all(figure["passes"] for figure in named.values())
    assert {"loss", "logits", "gradient of mtp.layers.0.e_proj.weight"} <= set(named)
    assert "expert load of model.layers.1.mlp.gate" in named
    assert "correction bias of model.layers.1.mlp.gate after the step" in named
    assert "gradient of model.layers.2.self_attn.compressor.wkv.weight" in named


@pytest.fixture
def verify_broken(recipe):
    """Verify the tiny recipe with the transport ``broken``."""

    def run():
        path = recipe("tiny_cpu")
        fields = yaml.safe_load(path.read_text())
        fields["model"]["config"]["context_parallel"]["transport"] = "broken"
        path.write_text(yaml.safe_dump(fields))
        return forked(["verify", str(path)])

    return run


def test_a_lost_term_of_attention_is_found_and_named(verify_broken, tmp_path, monkeypatch):
    """A transport of another distribution, which loses the keys before the cut."""
    install(BROKEN, "NoWindowBeforeTheCut", tmp_path, monkeypatch)
    status, output, errors = verify_broken()
    assert status == 1, output + errors
    printed = " ".join(output.split())
    assert "Differs:" in printed
    assert "gradient of model.layers." in printed
    assert "above all logits" in printed


def test_a_rank_that_fails_is_a_line_and_a_log(verify_broken, tmp_path, monkeypatch):
    install(RAISING, "Raises", tmp_path, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, output, errors = verify_broken()
    assert status == 1, output + errors
    assert output == ""
    (log,) = tmp_path.glob("nemo-dsv4-cp-*.log")
    expected = f"rank 1 failed: ArithmeticError: no left [context] here (log: {log})"
    assert errors.strip() == expected
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_model_of_the_hub_is_verified_with_packaged_sizes_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    seen = []
    monkeypatch.setattr(
        "nemo_dsv4_cp.tools.verification.verify",
        lambda recipe, config, **_: seen.append(config) or Verification([], []),
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
        model:
          config:
            _target_: nemo_dsv4_cp.DeepseekV4ContextParallelConfig.from_pretrained
            pretrained_model_name_or_path: deepseek-ai/DeepSeek-V4-Flash
        """
    )
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert done.exit_code == 0, done.output
    assert len(seen[0]["compress_ratios"]) == 44
    assert "the package's sizes of v4_flash stand in" in done.stderr


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
        (
            "{context_parallel: {overlap: false}, model: {config: {compress_ratios: [4], "
            "_target_: nemo_dsv4_cp.DeepseekV4ContextParallelConfig}}}",
            "context_parallel belongs under model.config",
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], ["--kernels"], "--kernels compares triton (kernels: auto), which needs a GPU; on a"),
        (NAMED, ["--kernels"], "kernels='triton' needs a CUDA device"),
        (NAMED, [], "kernels='triton' needs a CUDA device"),
    ],
)
def test_kernels_that_cannot_run_here_are_refused_before_ranks_start(
    recipe, monkeypatch, overrides, options, message
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(local_ranks, "run", lambda *_: pytest.fail("ranks started"))
    done = CliRunner().invoke(app, ["verify", str(recipe("tiny_cpu", *overrides)), *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.skipif(not HAS_V41, reason="this AutoModel has no V4.1")
def test_kernels_are_compared_at_the_sizes_of_v41(recipe, tmp_path):
    path, found = recipe("tiny_v41_cpu", *TORCH), tmp_path / "found.json"
    done = CliRunner().invoke(app, ["verify", str(path), "--kernels", "--json", str(found)])
    assert done.exit_code == 0, done.output
    assert "kernels: torch against the torch path, float32" in " ".join(done.output.split())
    names = {each["name"] for each in json.loads(found.read_text())}
    assert {"ratio 2: top-k selection, all entries", "ratio 1: candidates"} <= names
