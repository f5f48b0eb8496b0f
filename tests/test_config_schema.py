"""The published schema is the code's, takes the examples, and refuses what commands refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mergekit_align.align_section import AlignSection
from mergekit_align.cocktail.settings import CocktailSection
from mergekit_align.config_schema import config_schema
from mergekit_align.yaml_files import read_yaml_mapping

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").rglob("*.yml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return config_schema()


def test_the_published_file_is_of_this_code(schema: dict[str, Any]) -> None:
    """If not: python -m mergekit_align.config_schema > docs/align.schema.json"""
    assert json.loads((ROOT / "docs" / "align.schema.json").read_text("utf-8")) == schema


def test_it_is_a_schema_and_explains_every_key(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    for section in (AlignSection, CocktailSection):
        keys = schema["$defs"][section.__name__]["properties"]
        assert set(keys) == set(section.model_fields)
        assert all(key["description"] for key in keys.values())


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_it_takes_the_examples(file: Path, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema).validate(read_yaml_mapping(file))


@pytest.mark.parametrize(
    "content",
    [
        {"genome": {}, "align": {"batchsize": 3}},
        {"genome": {}, "align": {"max_fevals": 0}},
        {"genome": {}, "align": {"temperature": 1.0}},
        {"merge_method": "linear", "align": {"data": "x", "temperature": 0}},
        {"merge_method": "linear", "align": {"data": "x", "max_fevals": 3}},
        {"merge_method": "linear", "align": {"temperature": 1.0}},
    ],
)
def test_it_refuses_what_is_wrong(content: dict[str, Any], schema: dict[str, Any]) -> None:
    assert not Draft202012Validator(schema).is_valid(content)
