"""Weights of a merge from how well each model predicts a few examples: LM-Cocktail.

With refusals among the examples the merge leans to the models that refuse (arXiv 2406.14563). The
result is an ordinary mergekit config:

    config = read_config("examples/cocktail.yml")
    cocktail = mix(config)
    merge(cocktail, config, "out")
"""

from mergekit_align.cocktail.mix import Cocktail, Ingredient, Solution, mix, softmax
from mergekit_align.cocktail.output import check_space, merge, save_config
from mergekit_align.cocktail.settings import (
    DEFAULT_WEIGHTS,
    CocktailConfig,
    CocktailSection,
    read_config,
    types_in_data,
)

__all__ = [
    "DEFAULT_WEIGHTS",
    "Cocktail",
    "CocktailConfig",
    "CocktailSection",
    "Ingredient",
    "Solution",
    "check_space",
    "merge",
    "mix",
    "read_config",
    "save_config",
    "softmax",
    "types_in_data",
]
