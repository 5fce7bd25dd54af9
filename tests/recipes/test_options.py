"""Each recipe option alone, and some pairs; ``make test-recipes`` runs every pair."""

import pytest

from tests.recipes import results
from tests.recipes.comparing import of_parameters, too_far
from tests.recipes.options import BY_NAME, FIXED_PAIRS, OPTIONS, refusal_of
from tests.recipes.trainings import assert_alike_or_refused


def test_the_recipe_without_options_trains_at_cp_2_as_at_cp_1(trainings):
    assert_alike_or_refused(trainings)


@pytest.mark.parametrize("name", BY_NAME)
def test_an_option_trains_at_cp_2_as_at_cp_1_or_is_refused(trainings, record_property, name):
    record_property(results.OPTIONS, [name])
    record_property(results.FOUND, assert_alike_or_refused(trainings, name))


@pytest.mark.parametrize("pair", FIXED_PAIRS, ids="+".join)
def test_a_pair_trains_at_cp_2_as_at_cp_1_or_is_refused(trainings, record_property, pair):
    record_property(results.OPTIONS, list(pair))
    record_property(results.FOUND, assert_alike_or_refused(trainings, *pair))


TRAINABLE = [option.name for option in OPTIONS if refusal_of(option.name) is None]


@pytest.mark.parametrize("name", TRAINABLE)
def test_an_option_changes_the_numbers_or_leaves_them_as_it_should(trainings, name):
    option = BY_NAME[name]
    like = [] if option.same_as in (None, "base") else [option.same_as]
    expected = trainings.record(*like, cp_size=1)
    found = trainings.record(name, cp_size=1)
    if option.same_as is None:
        assert (found.losses, found.norms) != (expected.losses, expected.norms)
    else:
        parameters = expected.gradients[0]
        beyond = too_far(of_parameters(found, parameters), of_parameters(expected, parameters))
        assert not beyond, f"the numbers are not those of {option.same_as}:\n{beyond}"
