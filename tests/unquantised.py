# SPDX-License-Identifier: Apache-2.0
"""AutoModel's fine-tuning recipe on a V4.1 that keeps its keys as it computes them."""

from nemo_dsv4_cp.automodel.cpu import CpuFinetuneRecipe
from nemo_dsv4_cp.tools.verified_models import unquantized


class UnquantisedRecipe(CpuFinetuneRecipe):
    """Rounding to caches' formats turns a last digit into a step; here there is none."""

    def run_train_validation_loop(self) -> None:
        with unquantized():
            super().run_train_validation_loop()
