# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_dsv4_cp.tools import recipes
from nemo_dsv4_cp.tools.meshes import check_sizes, parallel_sizes

SCHEDULE = "+distributed.pipeline.pp_schedule=1f1b"


def check(name, *overrides):
    recipe = recipes.compose(name, overrides)
    check_sizes(recipe.fields, recipe.world_size)
    return recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_multiplies_out(name):
    check(name)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_sizes_that_divide_the_ranks_are_accepted(size):
    data = 128 // size
    check("flash_packed", f"distributed.cp_size={size}", f"step_scheduler.global_batch_size={data}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["distributed.cp_size=7"],
            r"cp_size=7 \* pp_size=1 \* tp_size=1 = 7 does not divide the 128 ranks; what works is "
            r"distributed.cp_size: 1, 2, 4, 8, 16, 32, 64, 128$",
        ),
        (
            ["distributed.cp_size=64", "distributed.pp_size=4", SCHEDULE],
            r"distributed.cp_size: 1, 2, 4, 8, 16, 32; or distributed.pp_size: 1, 2$",
        ),
        (["distributed.cp_size=8", "distributed.pp_size=3"], r"is distributed.pp_size: 1, 2, 4, 8"),
        (["distributed.cp_size=7", "distributed.pp_size=3"], r"sizes whose product divides 128"),
        (
            ["distributed.cp_size=0"],
            r"distributed.cp_size=0 is not a size; use an integer of 1 or more",
        ),
        (["distributed.cp_size=two"], r"distributed.cp_size='two' is not a size"),
        (["+distributed.dp_size=4"], r"distributed.dp_size=4 .* is not .* 128; use 16"),
        (["distributed.pp_size=2"], r"add \+distributed.pipeline.pp_schedule=1f1b"),
        (
            ["distributed.ep_size=128", "distributed.pp_size=2", SCHEDULE],
            r"ep_size=128 does not divide 64, .* use 1, 2, 4, 8, 16, 32, 64$",
        ),
        (
            ["model.config.n_routed_experts=96"],
            r"ep_size=64 does not divide model.config.n_routed_experts=96; use 1, 2, 4, 8, 16, 32$",
        ),
        (
            ["step_scheduler.global_batch_size=40"],
            r"global_batch_size=40 is not a multiple of 16, .* use 32 or 48$",
        ),
        (["cp=off"], r"global_batch_size=64 is not a multiple of 128, .* use 128$"),
    ],
)
def test_sizes_that_do_not_multiply_out_are_refused_with_ones_that_do(overrides, message):
    with pytest.raises(ValueError, match=message):
        check("flash_packed", *overrides)


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([], 2),
        (["distributed.cp_size=1"], 1),
        (["cp=off"], 1),
        (["distributed.pp_size=2", SCHEDULE], 4),
        (["distributed.cp_size=1", "distributed.pp_size=2", SCHEDULE], 2),
        (["vars.processes_per_node=4", "step_scheduler.global_batch_size=2"], 4),
    ],
)
def test_cpu_processes_are_as_many_as_the_sizes_multiply_to(overrides, processes):
    assert check("tiny_cpu", *overrides).processes_per_node == processes


def test_sizes_that_are_not_named_are_1():
    named = {"cp_size": 2, "pp_size": None}
    assert parallel_sizes({"distributed": named}) == {"cp_size": 2, "pp_size": 1, "tp_size": 1}
