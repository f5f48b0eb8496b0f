"""`mergekit-align-cocktail`: weights from a few examples, then mergekit's own merge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_align.cli.common import InputErrorAsUsage
from mergekit_align.errors import InputError

if TYPE_CHECKING:
    from mergekit_align.cocktail import Cocktail


class MergeCommand(InputErrorAsUsage, PrettyPrintHelp):  # type: ignore[misc]
    """A command with mergekit's merge options, listed as mergekit lists them."""


@click.command("mergekit-align-cocktail", cls=MergeCommand)
@click.argument("config_file")
@click.argument("out_path", required=False)
@click.option(
    "--all-types", is_flag=True, help="Every sample type counts, each as the config says or 1."
)
@click.option("--temp", type=float, help="Temperature of the softmax, in place of the config's.")
@click.option("--max-per-task", type=int, help="Samples of a type, in place of the config's.")
@click.option(
    "--config-out", help="Where the finished config goes.  [default: CONFIG-cocktail.yml]"
)
@click.option("--dry-run", is_flag=True, help="Stop after the table.")
@add_merge_options  # type: ignore[untyped-decorator]
def main(
    merge_options: MergeOptions,
    config_file: str,
    out_path: str | None,
    all_types: bool,
    temp: float | None,
    max_per_task: int | None,
    config_out: str | None,
    dry_run: bool,
) -> None:
    """Weigh the models of CONFIG_FILE by how well they predict its `align: data:`, and merge them.

    CONFIG_FILE is an ordinary mergekit config without weights. What is written is one with weights,
    which `mergekit-yaml` reads, and with OUT_PATH the merged model.
    """
    from transformers.utils.logging import disable_progress_bar

    from mergekit_align.cocktail import DEFAULT_WEIGHTS, mix, read_config

    disable_progress_bar()
    overrides: dict[str, Any] = {}
    if temp is not None:
        overrides["temperature"] = temp
    if max_per_task is not None:
        overrides["max_per_type"] = max_per_task
    if all_types:
        given = read_config(config_file, overrides)[1].weights
        overrides["weights"] = {kind: given.get(kind) or 1.0 for kind in DEFAULT_WEIGHTS}
    if out_path is not None and not dry_run:
        _check_space(config_file, out_path)
    cocktail = mix(
        config_file, overrides=overrides, progress=lambda line: click.echo(line, err=True)
    )
    _print_table(cocktail)
    if dry_run:
        return
    finished = Path(config_out or f"{Path(config_file).with_suffix('')}-cocktail.yml")
    text = yaml.safe_dump(cocktail.config, sort_keys=False, allow_unicode=True)
    beside = finished.with_name(f".{finished.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(finished)
    click.echo(str(finished))
    if out_path is not None:
        _merge(text, out_path, merge_options)
        click.echo(out_path)


def _print_table(cocktail: Cocktail) -> None:
    from rich.console import Console
    from rich.table import Table

    kinds = list(cocktail.ingredients[0].losses)
    table = Table("model", *(f"{kind} loss" for kind in kinds), "loss", "weight")
    for each in cocktail.ingredients:
        losses = [f"{each.losses[kind]:.4f}" for kind in kinds]
        table.add_row(each.model, *losses, f"{each.loss:.4f}", f"{each.weight:.4f}")
    Console().print(table)


def _merge(text: str, out_path: str, options: MergeOptions) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge

    options.apply_global_options()
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, out_path, options=options, config_source=text)


def _check_space(config_file: str, out_path: str) -> None:
    """That the merged model fits: it is as large as the largest input."""
    from mergekit_align.yaml_files import read_yaml_mapping

    content = read_yaml_mapping(config_file)
    models = [str(entry.get("model")) for entry in content.get("models") or []]
    sizes = [
        sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) for model in models
    ]
    there = Path(out_path).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < max(sizes, default=0):
        raise InputError(
            f"{out_path}: found {free // 2**20} MiB of free space; expected {max(sizes) // 2**20}"
        )


if __name__ == "__main__":
    main()
