"""The `align:` section as a JSON schema, by which editors complete and check configs.

    python -m mergekit_align.config_schema > align.schema.json

It is `docs/align.schema.json`. A config names it in its first line:

    # yaml-language-server: $schema=PATH/TO/align.schema.json

All outside the section is mergekit's own, and left alone.
"""

from __future__ import annotations

import json
from typing import Any


def config_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12): one section in a genome config, another in a merge config."""
    from pydantic.json_schema import models_json_schema

    from mergekit_align.align_section import AlignSection
    from mergekit_align.cocktail.settings import CocktailSection

    sections, definitions = models_json_schema(
        [(AlignSection, "validation"), (CocktailSection, "validation")]
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergekit config with an align: section",
        "type": "object",
        "if": {"required": ["genome"]},
        "then": {"properties": {"align": sections[AlignSection, "validation"]}},
        "else": {"properties": {"align": sections[CocktailSection, "validation"]}},
        **definitions,
    }


def main() -> None:
    print(json.dumps(config_schema(), indent=1))


if __name__ == "__main__":
    main()
