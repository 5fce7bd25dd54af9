# SPDX-License-Identifier: Apache-2.0
"""The distillation recipe for models of bytes, which have no tokenizer to compare."""

from nemo_automodel.recipes.llm import kd

from nemo_dsv4_cp.automodel.cpu import CpuDistillationRecipe

kd._verify_tokenizer_compatibility = lambda *args, **kwargs: None


class TokenizerlessDistillationRecipe(CpuDistillationRecipe):
    pass
