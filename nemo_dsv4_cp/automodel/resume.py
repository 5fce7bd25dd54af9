# SPDX-License-Identifier: Apache-2.0
"""Resuming a checkpoint on another number of ranks.

AutoModel stores one state of the dataloaders and one of the random numbers per rank. Data-parallel
rank d consists of the ranks d * cp_size to d * cp_size + cp_size - 1, which all load the same
samples. With another cp_size, a rank would look for a file that does not exist, or would read that
of another data-parallel rank. With another number of data-parallel ranks, the states do not fit at
all: each counts the samples of its own data-parallel rank, so training would silently repeat or
skip samples.

Nor does a checkpoint fit that lacks the optimizer's state of a parameter, such as the indexer's
before it had a loss: torch raises an error that says neither why nor what to do.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from nemo_dsv4_cp.automodel import patches

RECIPE = "nemo_automodel.recipes.base_recipe"
KEY = "data_ranks"
"""The recipe's attribute that holds :class:`DataRanks`, and the name of its file."""
RESUMES = "_resumes_on_other_ranks"
"""The attribute by which a class of models has its recipes resume on other ranks."""
_TRACKED = "__state_tracked"
_NO_STATE = re.compile(r"Missing key in checkpoint state_dict: optim\.state\.([\w.]+)\.\w+\.")
"""What torch raises where a checkpoint lacks the optimizer's state of a parameter, its name."""
_WEIGHTS_ALONE = (
    "model.config.pretrained_model_name_or_path={}, model.load_base_model: true, and another "
    "checkpoint.checkpoint_dir"
)


def install() -> None:
    """Let recipes that train our models resume on other ranks; calling it again changes nothing."""
    recipe: Any = importlib.import_module(RECIPE).BaseRecipe
    patches.wrap(recipe, "load_checkpoint", _loading)
    patches.wrap(recipe, "_load_checkpoint_tracked_state", _checking_ranks)


class DataRanks:
    """How many ranks load samples, and how many samples each has read.

    It is the recipe's attribute :data:`KEY`. AutoModel stores in every checkpoint all attributes of
    the recipe that have ``state_dict`` and ``load_state_dict``, and so this one. Without this
    package, AutoModel does not read its file.
    """

    def __init__(self, recipe: Any) -> None:
        self._recipe = recipe
        self.dp_size: int = recipe._get_dp_group_size()
        self.cp_size: int = recipe._get_dp_group_size(include_cp=True) // self.dp_size

    def state_dict(self) -> dict[str, Any]:
        """Return the sizes, and by dataloader what its sampler has yielded in this epoch."""
        return {
            "dp_size": self.dp_size,
            "cp_size": self.cp_size,
            "yielded": {
                key: loader.sampler.state_dict()["yielded"]
                for key, loader in _tracked(self._recipe, _loader_type()).items()
                if self.deals_in_turn(loader)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: what there is to do needs the whole checkpoint (:func:`_checking_ranks`)."""

    def deals_in_turn(self, loader: Any) -> bool:
        """Return whether the ranks read the samples of one order in turn, as cards are dealt.

        What they have read together is then the order's beginning, however many they are. Worker
        processes run ahead of what was trained on.
        """
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        sampler = loader.sampler
        return (
            type(sampler) is StatefulDistributedSampler
            and sampler.num_replicas == self.dp_size
            and loader.num_workers == 0
        )


def _loading(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if not _trains_ours(self):
        return original(self, *args, **kwargs)
    if KEY not in self.__dict__:
        setattr(self, KEY, DataRanks(self))
    try:
        return original(self, *args, **kwargs)
    except CheckpointException as error:  # all ranks raise it, whichever lacks a state
        untrained = _NO_STATE.search(str(error))
        if untrained is None:
            raise
        raise ValueError(
            "the checkpoint that this run resumes holds no optimizer state of "
            f"{untrained[1]}, which the run that wrote it did not train: it had another "
            "context_parallel.indexer_loss or train_only, or froze other parts. Resume with the "
            "settings of that run. Or start a new run from the weights alone: "
            f"{_WEIGHTS_ALONE.format('<checkpoint>/model/consolidated')}"
        ) from error


def _trains_ours(recipe: Any) -> bool:
    parts = getattr(recipe, "model_parts", None) or []
    return any(getattr(getattr(part, "module", part), RESUMES, False) for part in parts)


def _checking_ranks(original: Any, self: Any, ckpt_dir: str) -> Any:
    now = self.__dict__.get(KEY)
    if now is None:
        return original(self, ckpt_dir)
    loaders = _tracked(self, _loader_type())
    saved = _saved(ckpt_dir, loaders)
    if saved is None or (saved["dp_size"], saved["cp_size"]) == (now.dp_size, now.cp_size):
        with _left_out(self, {KEY}):
            return original(self, ckpt_dir)
    skips = {key: _skip(ckpt_dir, key, loader, saved, now) for key, loader in loaders.items()}
    streams = _tracked(self, sys.modules[RECIPE].StatefulRNG)
    with _left_out(self, {KEY, *loaders, *streams}):
        loaded = original(self, ckpt_dir)
    checkpointer = self.checkpointer
    for key, loader in loaders.items():
        skip = skips[key]
        if skip is None:
            with _as_dp_rank(checkpointer, self._get_dp_rank() * saved["cp_size"]):
                checkpointer.load_on_dp_ranks(loader, key, ckpt_dir)
        else:
            loader.sampler.load_state_dict({"yielded": skip})
    # AutoModel 0.5 numbers these as it does dataloaders, later releases by global rank.
    load = getattr(checkpointer, "load_on_global_ranks", checkpointer.load_on_dp_ranks)
    for key, stream in streams.items():
        with suppress(FileNotFoundError):  # of an additional rank: its seed's stream stays
            load(stream, key, ckpt_dir)
    return loaded


def _loader_type() -> Any:
    return sys.modules[RECIPE].StatefulDataLoader


def _tracked(recipe: Any, kind: type) -> dict[str, Any]:
    """Return what the recipe stores in checkpoints of one type, by name."""
    states = {key: getattr(recipe, key) for key in sorted(recipe.__dict__[_TRACKED])}
    return {key: state for key, state in states.items() if isinstance(state, kind)}


def _saved(ckpt_dir: str, loaders: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of :class:`DataRanks` in a checkpoint; None if it is unknown.

    Raises:
        ValueError: If a checkpoint that was written without this package contradicts itself.
    """
    path = os.path.join(ckpt_dir, f"{KEY}.pt")
    if os.path.exists(path):
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return state
    path = os.path.join(ckpt_dir, "config.yaml")
    folder = glob.escape(ckpt_dir)
    of_loaders = [glob.glob(f"{folder}/{key}/{key}_dp_rank_*.pt") for key in loaders]
    states = max(map(len, of_loaders), default=0)
    if not states or not os.path.exists(path):
        return None
    with open(path) as file:
        cp_size = ((yaml.safe_load(file) or {}).get("distributed") or {}).get("cp_size") or 1
    if not isinstance(cp_size, int) or states % cp_size:
        raise ValueError(
            f"{path} holds distributed.cp_size={cp_size!r}, and {states} ranks stored the state of "
            "their dataloaders beside it; write the cp_size of that run into the file, a divisor "
            f"of {states}"
        )
    return {"dp_size": states // cp_size, "cp_size": cp_size, "yielded": {}}


def _skip(
    ckpt_dir: str, key: str, loader: Any, saved: dict[str, Any], now: DataRanks
) -> int | None:
    """Return how many samples of its own each data-parallel rank has to skip.

    None where there are as many of these ranks as before, whose states hold.

    Raises:
        ValueError: If samples would be lost or seen twice.
    """
    before = saved["dp_size"]
    if before == now.dp_size:
        return None
    yielded = saved["yielded"].get(key)
    if yielded is None or not now.deals_in_turn(loader):
        why = f"the {key}'s state does not hold which samples the others have read"
    elif yielded * before % now.dp_size:
        why = f"the {yielded * before} samples read in this epoch are no multiple of {now.dp_size}"
    else:
        return int(yielded * before // now.dp_size)
    raise ValueError(
        f"distributed.cp_size={now.cp_size} leaves {now.dp_size} data-parallel ranks, {ckpt_dir} "
        f"was written by {before} (cp_size={saved['cp_size']}), and samples would be lost or seen "
        f"twice: {why}. Keep {before} of them: start {before} * cp_size processes, of any cp_size "
        "(times pp_size and tp_size). Or start a new run from the weights alone: "
        + _WEIGHTS_ALONE.format(os.path.join(ckpt_dir, "model/consolidated"))
    )


@contextmanager
def _left_out(recipe: Any, keys: set[str]) -> Iterator[None]:
    """Keep AutoModel from loading some of what it stored."""
    tracked: set[str] = recipe.__dict__[_TRACKED]
    left_out = tracked & keys
    tracked -= left_out
    try:
        yield
    finally:
        tracked |= left_out


@contextmanager
def _as_dp_rank(checkpointer: Any, rank: int) -> Iterator[None]:
    """Have AutoModel read the state of another rank's dataloader."""
    own = checkpointer.dp_rank
    checkpointer.dp_rank = rank
    try:
        yield
    finally:
        checkpointer.dp_rank = own
