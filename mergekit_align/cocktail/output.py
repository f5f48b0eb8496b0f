"""What a cocktail leaves behind: the finished config, the merged model, and a card that tells how."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_align import markdown
from mergekit_align.cocktail.losses import with_lora_cache
from mergekit_align.cocktail.mix import Cocktail
from mergekit_align.cocktail.settings import CocktailConfig
from mergekit_align.errors import InputError
from mergekit_align.files import write_text


def check_space(config: CocktailConfig, out_path: str | os.PathLike[str]) -> None:
    """That a merged model, as large as the largest input, fits where it is to be written.

    Raises:
        InputError: it does not. A model of the hub is not counted.
    """
    sizes = [
        sum(file.stat().st_size for file in Path(model.model.path).glob(f"*{suffix}"))
        for model in config.models
        for suffix in (".safetensors", ".bin")
    ]
    place = Path(out_path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < max(sizes):
        raise InputError(
            f"{out_path}: found {free // 2**20} MiB of free space; expected {max(sizes) // 2**20}"
        )


def save_config(cocktail: Cocktail, path: str | os.PathLike[str]) -> None:
    """Write the finished config, which `mergekit-yaml` reads."""
    write_text(path, _yaml(cocktail))


def merge(
    cocktail: Cocktail,
    config: CocktailConfig,
    out_path: str | os.PathLike[str],
    options: MergeOptions | None = None,
) -> None:
    """Write the merged model as `mergekit-yaml` does, and to its card how the weights came about."""
    options = with_lora_cache(options or MergeOptions(), config.merge)
    text = _yaml(cocktail)
    merged = MergeConfiguration.model_validate(cocktail.config)
    run_merge(merged, os.fspath(out_path), options=options, config_source=text)
    if options.write_model_card:
        card = Path(out_path) / "README.md"
        write_text(card, card.read_text(encoding="utf-8") + "\n" + _account(cocktail, config))


def _yaml(cocktail: Cocktail) -> str:
    return yaml.safe_dump(cocktail.config, sort_keys=False, allow_unicode=True)


def _account(cocktail: Cocktail, config: CocktailConfig) -> str:
    """A section of a model card, in Markdown."""
    section = config.section
    kinds = list(cocktail.samples)
    rule = f"softmax(-loss / {section.temperature}) (LM-Cocktail, arXiv 2311.13534)"
    if cocktail.solution is not None:
        rule = (
            "those found, from LM-Cocktail's (arXiv 2311.13534) on, to minimise the merged model's "
            f"loss in at most {section.max_steps} gradient steps"
        )
    data = section.data if isinstance(section.data, str) else ", ".join(section.data.values())
    read = ", ".join(
        f"{cocktail.samples[kind]} {kind} (weight {section.weights.get(kind, 0.0)})"
        for kind in kinds
    )
    head = ["model", *(f"{kind} loss" for kind in kinds), "loss", "weight"]
    rows = []
    for each in cocktail.ingredients:
        losses = [f"{each.losses[kind]:.4f}" for kind in kinds]
        rows.append([each.model, *losses, f"{each.loss:.4f}", f"{each.weight:.4f}"])
    if cocktail.solution is not None:
        for rule_name, by_type, loss in cocktail.solution.rows():
            losses = [f"{by_type[kind]:.4f}" for kind in kinds]
            rows.append([f"merged, {rule_name}", *losses, f"{loss:.4f}", ""])
    return "\n".join(
        [
            "### How the weights came about",
            "",
            f"By `mergekit-align-cocktail` (mergekit-align {version('mergekit-align')}) from how well "
            f"each model predicts a few responses. The weights are {rule}. Losses are nats a "
            f"{cocktail.unit}, in {cocktail.precision.dtype}; samples: {read}, drawn with seed "
            f"{section.seed} from {data}.",
            "",
            markdown.table(head, rows),
        ]
    )
