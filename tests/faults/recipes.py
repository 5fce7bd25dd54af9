# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe with a fault in it; recipes name it and say which one under ``fault``."""

import os
import time
from pathlib import Path

from nemo_dsv4_cp.automodel.cpu import CpuFinetuneRecipe

REACHED = "reached"


class FaultyRecipe(CpuFinetuneRecipe):
    """Fails, or waits for what is done to it, on one rank, at one step and place.

    ``fault`` holds ``rank``, ``step`` (from 0), ``place`` (``layer``: the attention of layer 2;
    ``checkpoint``: after the weights, before the optimizer) and ``raises`` (else it waits). Each
    rank leaves its process id in the checkpoints' directory, and the one that came there a file.
    """

    def setup(self):
        super().setup()
        self._directory = Path(self.checkpointer.config.checkpoint_dir)
        rank = self.dist_env.rank
        (self._directory / f"pid_{rank}").write_text(str(os.getpid()))
        fault = self.cfg.fault
        if rank != fault.rank:
            return
        if fault.place == "layer":
            attention = self.model_parts[0].model.layers["2"].self_attn
            attention.register_forward_pre_hook(lambda *_: self._trip())
        else:
            write = self.checkpointer.save_optimizer

            def save_optimizer(*args, **kwargs):
                self._trip()
                return write(*args, **kwargs)

            self.checkpointer.save_optimizer = save_optimizer

    def _trip(self):
        if self.step_scheduler.step != self.cfg.fault.step:
            return
        (self._directory / REACHED).touch()
        if self.cfg.fault.raises:
            raise ValueError("a fault in layer 2")
        while True:
            time.sleep(1)
