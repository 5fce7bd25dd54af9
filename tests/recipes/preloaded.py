# SPDX-License-Identifier: Apache-2.0
"""Imports what launches import, so that forked ranks find it; not every release has all of it."""

from contextlib import suppress
from importlib import import_module

for name in (
    "nemo_automodel._transformers.mfu",
    "nemo_automodel.cli.app",
    "nemo_automodel.components._peft.lora_mlp",
    "nemo_automodel.components.datasets.llm.packed_sequence",
    "nemo_automodel.components.datasets.utils",
    "nemo_automodel.components.distributed.fsdp2",
    "nemo_automodel.components.distributed.pipelining.autopipeline",
    "nemo_automodel.components.launcher.interactive",
    "nemo_automodel.components.models.deepseek_v4.mtp",
    "nemo_automodel.components.training.prewarm",
    "nemo_automodel.recipes.llm.kd",
    "nemo_automodel.recipes.llm.train_ft",
    "nemo_dsv4_cp.exchange.transport",
    "nemo_dsv4_cp.kernels.reference",
    "nemo_dsv4_cp.model",
    "nemo_dsv4_cp.model_v41",
    "nemo_dsv4_cp.tools.byte_tokenizer",
    "nemo_dsv4_cp.tools.stdlib_bytes",
    "tests.recipes.recording",
    "torch.distributed.run",
    "transformers.models.qwen3.modeling_qwen3",
):
    with suppress(ModuleNotFoundError):
        import_module(name)
