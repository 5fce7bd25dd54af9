# SPDX-License-Identifier: Apache-2.0
"""Two trainings one after the other in each rank's process, and what is left of each.

Run it with torchrun and a recipe: each training writes to a folder of its own beside it.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from nemo_automodel.cli import app
from nemo_automodel.recipes.llm import kd, train_ft  # noqa: F401  all that a plugin could replace

from nemo_dsv4_cp.automodel import patches
from tests.automodel.names import changed, names
from tests.held import Held


def main() -> None:
    """Train twice, give AutoModel back, and write what was found to ``found_RANK.json``."""
    recipe = Path(sys.argv[1])
    directory = recipe.parent
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    before, left = names(), []
    for training in ("first", "second"):
        sys.argv[1:] = [str(recipe), f"--checkpoint.checkpoint_dir={directory / training}"]
        # Made here, so that it can be taken down here: AutoModel does that when the process ends.
        store = dist.FileStore(str(directory / f"store_{training}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        app.main()
        dist.destroy_process_group()
        left.append(dataclasses.asdict(Held.now()))
    patched = changed(before)
    patches.undo()
    found = {"left": left, "patched": patched, "not_given_back": changed(before)}
    (directory / f"found_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
