# SPDX-License-Identifier: Apache-2.0
"""A distribution of kernel backends, most of them made wrong on purpose, for child processes."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.checks.certificate import Subject

SIZES = SimpleNamespace(
    compress_ratios=[0, 4],
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=4,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=8,
    o_groups=1,
    sliding_window=4,
    rms_norm_eps=1e-6,
)

SIZES_V41 = SimpleNamespace(
    **{name: value for name, value in vars(SIZES).items() if name != "rms_norm_eps"}
    | {
        # Window, source, reuse, source that chooses candidates, inside candidates; a draft layer.
        "compress_ratios": [0, 2, 2, 1, 1, 0],
        "num_hidden_layers": 5,
        "index_n_heads": 4,
        "index_source_layer_ids": [1, 3, 4],
        "candidate_source_layer_id": 3,
        "candidate_topk_blocks": 6,
        "candidate_block_size": 4,
    }
)

SOURCE = """
import errno, os, signal, subprocess, sys, time
import torch
from nemo_dsv4_cp.kernels.reference import TorchKernels

with open(os.environ["EXAMINED"], "a") as counted:
    counted.write(f"{os.getpid()}\\n")

class Right(TorchKernels):
    pass

class WrongGradient(TorchKernels):
    def attend(self, queries, keys, constants):
        out = super().attend(queries, keys, constants)
        return out + 0.1 * (out - out.detach())

class LeavesCandidates(TorchKernels):
    def select_shared(self, queries, keys, *, topk, blocks, candidates_BLM):
        if candidates_BLM is not None:
            blocks = candidates_BLM = None
        return super().select_shared(
            queries, keys, topk=topk, blocks=blocks, candidates_BLM=candidates_BLM
        )

class Raises(TorchKernels):
    def attend(self, queries, keys, constants):
        raise RuntimeError("no kernel image is available")

class Exits(TorchKernels):
    def attend(self, queries, keys, constants):
        os._exit(3)

class Crashes(TorchKernels):
    def attend(self, queries, keys, constants):
        os.kill(os.getpid(), signal.SIGSEGV)

class Hangs(TorchKernels):
    def attend(self, queries, keys, constants):
        time.sleep(3600)

class OutOfMemory(TorchKernels):
    def attend(self, queries, keys, constants):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

class Ends(TorchKernels):
    def attend(self, queries, keys, constants):
        os._exit(0)

class NoHeaders(TorchKernels):
    def attend(self, queries, keys, constants):
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

class NoSpace(TorchKernels):
    def attend(self, queries, keys, constants):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")
        sys.modules["__main__"]._write = full
        return super().attend(queries, keys, constants)

class Killed(TorchKernels):
    def attend(self, queries, keys, constants):
        os.kill(os.getpid(), signal.SIGKILL)
"""

_NAMES = {
    "right": "Right",
    "wrong_gradient": "WrongGradient",
    "leaves_candidates": "LeavesCandidates",
    "raises": "Raises",
    "exits": "Exits",
    "crashes": "Crashes",
    "hangs": "Hangs",
    "out_of_memory": "OutOfMemory",
    "killed": "Killed",
    "ends": "Ends",
    "no_headers": "NoHeaders",
    "no_space": "NoSpace",
}


def write_distribution(folder: Path) -> None:
    """Write the distribution as pip would install it."""
    metadata = folder / "backends_on_trial-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: backends-on-trial\nVersion: 1.0\n"
    )
    points = "".join(f"{name} = backends_on_trial:{cls}\n" for name, cls in _NAMES.items())
    (metadata / "entry_points.txt").write_text(f"[{plugins.KERNELS}]\n{points}")
    (folder / "backends_on_trial.py").write_text(SOURCE)


@contextmanager
def installed(folder: Path):
    """Have this process and its children find the distribution, and keep certificates there."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    changed = {
        "PYTHONPATH": path,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "EXAMINED": str(folder / "examined"),
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def subject(name: str, sizes: SimpleNamespace = SIZES) -> Subject:
    """Return what is examined of a backend."""
    dtype = str(torch.float32).split(".")[-1]
    return Subject.of(name, sizes, dtype=dtype, workspace_bytes=1 << 26)


def examinations(folder: Path) -> int:
    """Return how many child processes have loaded a backend."""
    return len(children(folder))


def children(folder: Path) -> list[int]:
    """Return the numbers of the child processes that have loaded a backend."""
    counted = folder / "examined"
    return [int(line) for line in counted.read_text().splitlines()] if counted.exists() else []
