# SPDX-License-Identifier: Apache-2.0
"""Dataloaders and random numbers of a checkpoint that is resumed on other ranks."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.training.rng import StatefulRNG
from nemo_automodel.recipes.base_recipe import BaseRecipe
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from nemo_dsv4_cp.automodel import patches, resume

SAMPLES = range(24)
TAKEN = 8  # of the epoch, when the checkpoint is written


class Ours:
    """Stands for a model class that the patches are made for."""

    _resumes_on_other_ranks = True


class Recipe(BaseRecipe):
    """One rank of AutoModel's recipe, as far as its dataloader goes."""

    def __init__(self, rank, dp_size, cp_size, model=Ours, workers=0):
        self.model_parts = [model()]
        self._sizes, self._rank = (dp_size, cp_size), rank
        sampler = StatefulDistributedSampler(
            SAMPLES, num_replicas=dp_size, rank=rank // cp_size, seed=3, drop_last=True
        )
        self.dataloader = StatefulDataLoader(SAMPLES, sampler=sampler, num_workers=workers)
        self.checkpointer = Checkpointer(
            CheckpointingConfig(enabled=False), dp_rank=rank, tp_rank=0, pp_rank=0
        )

    def _get_dp_rank(self, include_cp=False):
        return self._rank if include_cp else self._rank // self._sizes[1]

    def _get_dp_group_size(self, include_cp=False):
        return self._sizes[0] * (self._sizes[1] if include_cp else 1)

    def take(self, count):
        """Return the next samples."""
        return [int(batch) for batch in itertools.islice(self.dataloader, count)]

    def resume(self, directory):
        self.load_checkpoint()  # disabled: it notes the ranks, and loads nothing
        self._load_checkpoint_tracked_state(str(directory))
        return self


@pytest.fixture(autouse=True)
def installed():
    patches.undo()
    resume.install()
    yield
    patches.undo()


def save(directory, dp_size, cp_size, *, takes=None, noted=True):
    """Write the parts of a checkpoint that count, and return the samples that were taken.

    Args:
        directory: The checkpoint's.
        dp_size: Data-parallel ranks.
        cp_size: CP ranks of each.
        takes: How many samples each data-parallel rank takes; by default TAKEN together.
        noted: Whether this package was there.
    """
    takes = takes or [TAKEN // dp_size] * dp_size
    taken = []
    for rank in range(dp_size * cp_size):
        recipe = Recipe(rank, dp_size, cp_size)
        recipe.load_checkpoint()
        loader = iter(recipe.dataloader)  # kept, as the recipe's loop keeps it
        samples = [int(next(loader)) for _ in range(takes[rank // cp_size])]
        taken += samples if rank % cp_size == 0 else []
        recipe.checkpointer.save_on_dp_ranks(recipe.dataloader, "dataloader", str(directory))
        if noted and rank == 0:  # as AutoModel does on rank 0
            torch.save(recipe.data_ranks.state_dict(), directory / "data_ranks.pt")
    (directory / "config.yaml").write_text(yaml.safe_dump({"distributed": {"cp_size": cp_size}}))
    return taken


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "by a plain AutoModel"])
@pytest.mark.parametrize(("before", "now"), list(itertools.product([1, 2, 4], repeat=2)))
def test_another_cp_size_goes_on_with_each_data_ranks_own_next_samples(
    tmp_path, before, now, noted
):
    save(tmp_path, 2, before, takes=[3, 5], noted=noted)
    orders = [Recipe(rank, 2, 1).take(12) for rank in range(2)]
    for rank in range(2 * now):
        left = Recipe(rank, 2, now).resume(tmp_path).take(20)
        assert left == (orders[0][3:] if rank < now else orders[1][5:])


@pytest.mark.parametrize(
    ("before", "now"),
    [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((4, 1), (2, 4)), ((1, 4), (4, 1)), ((2, 2), (1, 1))],
)
def test_other_data_ranks_take_every_sample_that_is_left_and_no_other(tmp_path, before, now):
    taken = save(tmp_path, *before)
    dp_size, cp_size = now
    left = [
        Recipe(rank, dp_size, cp_size).resume(tmp_path).take(20)
        for rank in range(dp_size * cp_size)
    ]
    for rank, samples in enumerate(left):
        assert samples == left[rank // cp_size * cp_size]  # one group, the same samples
    assert sorted(itertools.chain(taken, *left[::cp_size])) == list(SAMPLES)


def refusal(directory, *sizes, **kwargs):
    """Return the error of all ranks, which is the same."""
    errors = set()
    for rank in range(sizes[0] * sizes[1]):
        recipe = Recipe(rank, *sizes, **kwargs)
        with pytest.raises(ValueError) as error:
            recipe.resume(directory)
        assert recipe.take(30) == Recipe(rank, *sizes).take(30)  # nothing was loaded
        errors.add(str(error.value))
    (only,) = errors
    return only


def test_other_data_ranks_are_refused_where_samples_are_not_dealt_in_turn(tmp_path):
    save(tmp_path, 2, 1, noted=False)
    errors = refusal(tmp_path, 1, 2)
    assert "distributed.cp_size=2 leaves 1 data-parallel ranks" in errors
    assert "was written by 2 (cp_size=1)" in errors
    assert "Keep 2 of them: start 2 * cp_size processes" in errors
    assert "does not hold which samples the others have read" in errors


def test_worker_processes_run_ahead_so_other_data_ranks_are_refused(tmp_path):
    save(tmp_path, 2, 1)
    recipe = Recipe(0, 1, 2, workers=1)
    with pytest.raises(ValueError, match="does not hold which samples"):
        recipe.resume(tmp_path)
    recipe.load_checkpoint()
    assert recipe.data_ranks.state_dict()["yielded"] == {}


def test_other_data_ranks_are_refused_where_what_is_taken_does_not_divide(tmp_path):
    save(tmp_path, 1, 2, takes=[3])
    assert "the 3 samples read in this epoch are no multiple of 2" in refusal(tmp_path, 2, 1)


@pytest.mark.parametrize("cp_size", [4, "${CP}"])
def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path, cp_size):
    save(tmp_path, 2, 1, noted=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"distributed": {"cp_size": cp_size}}))
    assert "2 ranks stored the state of their dataloaders beside it" in refusal(tmp_path, 1, 2)


def test_random_numbers_go_on_where_the_rank_was_there_and_start_where_it_was_not(tmp_path):
    save(tmp_path, 1, 2)

    def draw():
        recipe = Recipe(0, 1, 4)
        recipe.rng = StatefulRNG(seed=5)
        recipe.resume(tmp_path)
        return random.random(), torch.rand(()).item()

    fresh = draw()
    StatefulRNG(seed=6)
    checkpointer = Recipe(0, 1, 2).checkpointer
    # The releases' own ways: by global rank, and before 0.6 as dataloaders.
    write = getattr(checkpointer, "save_on_global_ranks", checkpointer.save_on_dp_ranks)
    write(StatefulRNG(seed=6), "rng", str(tmp_path))
    expected = random.random(), torch.rand(()).item()
    assert draw() == expected != fresh


def test_models_of_others_resume_as_automodel_has_it(tmp_path):
    save(tmp_path, 1, 2)
    theirs = Recipe(2, 1, 4, model=SimpleNamespace)
    with pytest.raises(FileNotFoundError, match="dataloader_dp_rank_2"):
        theirs.resume(tmp_path)
    assert not hasattr(theirs, resume.KEY)
    patches.undo()
    with pytest.raises(FileNotFoundError, match="dataloader_dp_rank_2"):
        Recipe(2, 1, 4).resume(tmp_path)
