# SPDX-License-Identifier: Apache-2.0
"""A whole model through the Triton kernels against AutoModel's own at one rank."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

pytest.importorskip("nemo_automodel", reason="the kernels run where AutoModel is not installed")

from nemo_dsv4_cp.cli.app import app
from nemo_dsv4_cp.tools.recipes import compose
from tests.examples import MANY
from tests.kernels.triton.device import INTERPRETED
from tests.packed_parity import packed_model_job
from tests.parity import assert_parity, model_job

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="gloo and the oracle are on the CPU")
OPTIONS = {"kernels": "triton", "balance": "on"}
RATIOS = [0, 4, 128]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3] if MANY else [2])
def test_a_moe_model_equals_automodels_at_one_rank(ranks, size):
    arguments = (RATIOS, 1, 128 * size - 5, OPTIONS, False, 0, 24)
    assert_parity(ranks.run(model_job, size, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_moe_model_keeps_documents_apart(ranks, size):
    documents = [[150, 128 * size - 157]]
    assert_parity(ranks.run(packed_model_job, size, RATIOS, documents, OPTIONS, 0))


@pytest.mark.slow
@pytest.mark.parametrize("documents", [[61], [[1, 30, 7, 24], [55, 4]]])
def test_a_model_of_deepseek_v41_equals_automodels_at_one_rank(ranks, documents):
    pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
    from tests.parity_v41 import model_job as v41_job

    assert_parity(ranks.run(v41_job, 2, documents, OPTIONS))


@pytest.mark.slow
def test_balanced_selection_of_deepseek_v41_selects_the_same(ranks):
    pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
    from tests.parity_v41 import balance_job

    for off, on in ranks.run(balance_job, 2, [[1, 30, 7, 24]], {"kernels": "triton"}):
        assert all(map(torch.equal, on.chosen, off.chosen))
        torch.testing.assert_close(on.logits, off.logits, rtol=0, atol=0)


def test_verification_passes_them(tmp_path):
    fields = compose("tiny_cpu").fields
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    done = CliRunner().invoke(app, ["verify", str(path), "--kernels"])
    assert done.exit_code == 0, done.output
    assert "The same" in done.output
