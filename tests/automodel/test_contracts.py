# SPDX-License-Identifier: Apache-2.0
"""What we count on in AutoModel, by its signatures: who changed is named, by test and by error."""

import importlib
import json
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.automodel import contracts
from nemo_dsv4_cp.automodel.contracts import Signature, UnsupportedAutoModel


@pytest.mark.parametrize(
    "signature", list(contracts.signatures()), ids=lambda signature: signature.name
)
def test_automodel_takes_what_we_pass(signature):
    signature.check()


@pytest.mark.parametrize("body", contracts.RESTATED, ids=lambda body: body.name)
def test_automodels_body_is_one_that_we_restate(body):
    body.check()


def test_a_body_that_changed_is_refused_with_its_name_when_the_config_is_named(monkeypatch):
    model = importlib.import_module("nemo_automodel.components.models.deepseek_v4.model")

    def forward(self, input_ids=None, **kwargs):
        return self.embed_tokens(input_ids)

    monkeypatch.setattr(model.DeepseekV4Model, "forward", forward)
    contracts.check.cache_clear()  # it was found good before
    with pytest.raises(
        UnsupportedAutoModel,
        match=rf"model\.DeepseekV4Model\.forward differs .*automodel\.backbone restates.*{TESTED}",
    ):
        DeepseekV4ContextParallelConfig()
    DeepseekV4ContextParallelConfig(context_parallel={"enabled": False})


class Written:
    """One method, and others that differ from it or do not."""

    class Here:
        def add(self, x, y=1):
            return x + y

    class Annotated:
        def add(self, x: int, y: int = 1) -> int:
            """Add."""
            # Laid out otherwise.
            return (x) + y  # fmt: skip

    class OtherDefault:
        def add(self, x, y=2):
            return x + y

    class OtherStatement:
        def add(self, x, y=1):
            return x - y


def test_a_fingerprint_holds_arguments_and_statements_alone():
    here = contracts.fingerprint(Written.Here.add)
    assert contracts.fingerprint(Written.Annotated.add) == here
    assert contracts.fingerprint(Written.OtherDefault.add) != here
    assert contracts.fingerprint(Written.OtherStatement.add) != here


def test_the_adapter_is_that_of_the_contract_which_automodel_has():
    sharder = find_spec("nemo_automodel.components.distributed.context_parallel")
    expected = "ContextParallelSharder" if sharder else "cp_utils.make_cp_batch_and_ctx"
    assert expected == contracts.batch_contract().NAME


TESTED = r"tested with nemo_automodel 0\.7\.0, 0\.6\.0, 0\.5\.0; install one of these"


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (Signature("textwrap", "gone"), r"there is no textwrap\.gone"),
        (Signature("no_such_module", "gone"), r"there is no no_such_module\.gone"),
        (Signature("textwrap", "indent", ("text", "colour")), r"indent takes \(.*without colour"),
        (
            Signature("textwrap", "indent", ("prefix", "text"), in_order=True),
            r"indent takes \(text, prefix, .*not \(prefix, text\)",
        ),
    ],
)
def test_what_a_release_lacks_is_named_with_the_tested_releases(signature, message):
    with pytest.raises(UnsupportedAutoModel, match=f"{message}.*{TESTED}"):
        signature.check()


def test_a_release_that_changed_is_refused_when_the_config_is_named(monkeypatch):
    layers = importlib.import_module("nemo_automodel.components.models.deepseek_v4.layers")
    monkeypatch.delattr(layers, "_dsv4_kernel_backend")
    contracts.check.cache_clear()  # it was found good before
    with pytest.raises(UnsupportedAutoModel, match=r"no .*layers\._dsv4_kernel_backend"):
        DeepseekV4ContextParallelConfig()
    DeepseekV4ContextParallelConfig(context_parallel={"enabled": False})


def test_a_release_is_looked_at_once(monkeypatch):
    DeepseekV4ContextParallelConfig()
    monkeypatch.setattr(contracts, "signatures", lambda: pytest.fail("looked at again"))
    DeepseekV4ContextParallelConfig()


def test_a_release_without_any_contract_for_batches_is_refused(monkeypatch):
    monkeypatch.setattr(contracts, "find_spec", lambda place: None)
    monkeypatch.setattr(contracts.sharding, "HAS_SHARDER", False)
    with pytest.raises(
        UnsupportedAutoModel, match=rf"neither .*context_parallel nor .*cp_utils.*{TESTED}"
    ):
        contracts.batch_contract()


def test_a_release_without_deepseek_v4_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_automodel.components.models.deepseek_v4.config", None)
    with pytest.raises(UnsupportedAutoModel, match=rf"deepseek_v4\.config.*{TESTED}"):
        contracts.check_v4()


def test_a_release_without_deepseek_v41_is_not_sent_to_others_without_it(monkeypatch):
    module = "nemo_automodel.components.models.deepseek_v41.attention"
    monkeypatch.setitem(sys.modules, module, None)
    contracts.check_v41.cache_clear()  # it was found good before
    text = (
        r"deepseek_v41\.attention.* DeepSeek-V4\.1 .* tested with nemo_automodel 0\.7\.0; install"
    )
    with pytest.raises(UnsupportedAutoModel, match=text):
        contracts.check_v41()
    names = {}
    exec("from nemo_dsv4_cp import *", names)
    assert "DeepseekV4ContextParallelConfig" in names
    assert "DeepseekV41ContextParallelConfig" not in names


@pytest.mark.skipif(not contracts.has_v41(), reason="needs an AutoModel with V4.1")
def test_import_star_takes_v41_where_automodel_has_it():
    contracts.check_v41.cache_clear()
    names = {}
    exec("from nemo_dsv4_cp import *", names)
    assert "DeepseekV41ContextParallelConfig" in names


# Every name in AutoModel's modules and classes, and the process's excepthook: before a config is
# made, after, and after a model is. A config is also saved, loaded and printed. Each block has a
# process of its own, forked when all is imported.
PATCHED = textwrap.dedent("""
    import json, os, sys, tempfile
    import torch
    from nemo_automodel.components.models.deepseek_v4 import model as automodel
    from nemo_automodel.recipes.llm import kd, train_ft
    from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
    from nemo_dsv4_cp.automodel import patches
    from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
    from tests.automodel.names import changed, names
    from tests.parity import cpu_backend, tiny_config

    for block in json.loads(sys.argv[1]):
        if not os.fork():
            break
        if os.wait()[1]:
            sys.exit(1)
    else:
        sys.exit()
    before, hook = names(), sys.excepthook
    config = tiny_config([4], context_parallel=block)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        config = type(config).from_pretrained(folder, context_parallel=block)
    print(config)
    registered = changed(before)
    enabled = config.context_parallel.enabled
    ours = DeepseekV4ContextParallelForCausalLM if enabled else automodel.DeepseekV4ForCausalLM
    ours(config, backend=cpu_backend())
    constructed = changed(before)
    hooked = sys.excepthook is not hook
    patches.undo()
    left = changed(before) + ["sys.excepthook"] * (sys.excepthook is not hook)
    print(json.dumps([registered, constructed, hooked, left]))
""")


def test_the_config_patches_all_and_a_disabled_one_nothing_and_all_is_given_back():
    blocks = [
        ({}, True, False),
        ({"failure_attribution": True}, True, True),
        ({"enabled": False, "failure_attribution": True}, False, False),
    ]
    command = [sys.executable, "-c", PATCHED, json.dumps([block for block, _, _ in blocks])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    for (block, patches, hooks), answer in zip(blocks, answers, strict=True):
        registered, constructed, hooked, left = json.loads(answer)
        assert bool(registered) is patches, (block, registered)
        assert constructed == registered, block
        assert hooked is hooks, block
        assert left == [], block
