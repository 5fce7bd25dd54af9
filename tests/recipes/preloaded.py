"""Imports what every launch imports, so that forked ranks find it."""

from nemo_automodel.cli import app
from nemo_automodel.components.datasets import llm
from nemo_automodel.components.distributed.pipelining import autopipeline
from nemo_automodel.components.launcher import interactive
from nemo_automodel.components.models.deepseek_v4 import mtp
from nemo_automodel.recipes.llm import train_ft
from torch.distributed import run

from nemo_dsv4_cp import model
from nemo_dsv4_cp.tools import stdlib_bytes
from tests.recipes import recording

__all__ = [
    "app",
    "autopipeline",
    "interactive",
    "llm",
    "model",
    "mtp",
    "recording",
    "run",
    "stdlib_bytes",
    "train_ft",
]
