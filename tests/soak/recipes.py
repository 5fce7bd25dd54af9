# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe that counts what its process holds, every so many steps."""

import dataclasses
import json
from pathlib import Path

from nemo_dsv4_cp.automodel.cpu import CpuFinetuneRecipe
from tests.held import Held


class WatchedRecipe(CpuFinetuneRecipe):
    """Writes a line of counts to ``held_RANK.jsonl`` after every ``watch.every_steps`` steps."""

    def _run_train_optim_step(self, batches, *args, **kwargs):
        result = super()._run_train_optim_step(batches, *args, **kwargs)
        batches.clear()  # else they count, and no two are alike
        done = self.step_scheduler.step + 1
        if done % self.cfg.watch.every_steps == 0:
            held = {"step": done} | dataclasses.asdict(Held.now())
            directory = Path(self.checkpointer.config.checkpoint_dir)
            with (directory / f"held_{self.dist_env.rank}.jsonl").open("a") as file:
                print(json.dumps(held), file=file)
        return result
