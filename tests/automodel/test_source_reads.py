# SPDX-License-Identifier: Apache-2.0
"""Reads of a model are found in AutoModel's source however they are written."""

import textwrap

import pytest

from tests.automodel import source_reads

SOURCE = textwrap.dedent('''
    TABLE = {"DeepseekV4Model": 1}
    """DeepseekV4Attention stands here for readers alone."""

    def attributes(self, model):
        hasattr(model, "queried"), getattr(getattr(model, "config", None), "nested", 0)
        self.model_parts[0].attribute, type(model).of_the_class, schedule.of_another
        for name in ("looped",):
            getattr(model, name)
        return "parameter" in inspect.signature(model.forward).parameters

    def identity(module) -> "DeepseekV4Attention":
        return type(module) is DeepseekV4Attention or isinstance(module, DeepseekV4Block)

    def prefix(model):
        return type(model).__name__.startswith("DeepseekV4")

    def origin(model):
        return model.__class__.__module__.startswith(("nemo_automodel.", "transformers."))

    def own(model):
        return "own" in type(model).__dict__ or type(model).__dict__.get("looked_up")

    def is_large(model):
        return True
''')


@pytest.fixture(autouse=True)
def fake_source(monkeypatch):
    monkeypatch.setattr(source_reads, "sources", lambda: {"recipes/fake.py": SOURCE})


def test_reads_of_attributes_and_parameters_are_found():
    read = ["queried", "nested", "attribute", "of_the_class", "looped", "parameter"]
    found = source_reads.places_of([*read, "of_another", "never"])
    assert [name for name, places in found.items() if places] == read
    assert str(found["queried"][0]) == "recipes/fake.py:6 (attributes)"


def test_uses_of_class_names_are_found_by_table_and_function():
    names = {"DeepseekV4Model", "DeepseekV4Attention", "DeepseekV4Block"}
    assert source_reads.uses_of_classes(names) == {
        ("recipes/fake.py", "TABLE"): {"DeepseekV4Model"},
        ("recipes/fake.py", "identity"): {"DeepseekV4Attention"},
    }


def test_conditions_on_names_of_classes_and_modules_can_be_evaluated():
    by_scope = {test.place.scope: test for test in source_reads.name_tests.__wrapped__()}
    assert set(by_scope) == {"prefix", "origin"}
    assert by_scope["prefix"].holds("DeepseekV4Model")
    assert not by_scope["prefix"].holds("ContextParallelModel")
    assert by_scope["origin"].of_module
    assert not by_scope["origin"].holds("nemo_dsv4_cp.model")


def test_reads_of_a_classs_own_dictionary_are_found():
    assert source_reads.class_dict_reads.__wrapped__() == {"own", "looked_up"}


def test_functions_that_decide_by_a_model_are_found():
    assert list(source_reads.predicates()) == [("nemo_automodel.recipes.fake", "is_large", "model")]
