"""`mergekit-align-cocktail`: weights from a few examples, then mergekit's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_align.cli.common import InputErrorAsUsage
from mergekit_align.process import importing

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
@click.option("--solve", is_flag=True, help="Minimise the merged model's own loss as well.")
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
    solve: bool,
    dry_run: bool,
) -> None:
    """Weigh the models of CONFIG_FILE by how well they predict its `align: data:`, and merge them.

    CONFIG_FILE is an ordinary mergekit config without weights. What is written is one with weights,
    which `mergekit-yaml` reads, and with OUT_PATH the merged model. Several GPUs:
    `accelerate launch -m mergekit_align.cli.cocktail ...`.
    """
    with importing():
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align import cocktail as cocktails

    disable_progress_bar()
    merge_options.apply_global_options()
    given = {"temperature": temp, "max_per_type": max_per_task, "solve": solve or None}
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    config = cocktails.read_config(config_file, overrides, allow_crimes=merge_options.allow_crimes)
    if all_types:
        own = config.section.weights
        weights = {kind: own.get(kind) or 1.0 for kind in cocktails.types_in_data(config)}
        config = config._replace(section=config.section.model_copy(update={"weights": weights}))
    if out_path is not None and not dry_run:
        cocktails.check_space(config, out_path)
    cocktail = cocktails.mix(config, merge_options, progress=_progress)
    if cocktail is None:
        return
    _print_table(cocktail)
    if dry_run:
        return
    finished = config_out or f"{Path(config_file).with_suffix('')}-cocktail.yml"
    cocktails.save_config(cocktail, finished)
    click.echo(finished)
    if out_path is not None:
        cocktails.merge(cocktail, config, out_path, merge_options)
        click.echo(out_path)


def _progress(line: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        click.echo(line, err=True)


def _print_table(cocktail: Cocktail) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    kinds = list(cocktail.ingredients[0].losses)
    model = Column("model", overflow="fold")
    table = Table(model, *(f"{kind} loss" for kind in kinds), "loss", "weight")
    for each in cocktail.ingredients:
        losses = [f"{each.losses[kind]:.4f}" for kind in kinds]
        table.add_row(each.model, *losses, f"{each.loss:.4f}", f"{each.weight:.4f}")
    console.print(table)
    console.print(f"Losses: nats a {cocktail.unit}, in {cocktail.precision.dtype}.")
    if cocktail.unit == "byte":
        console.print("By byte, since the models' tokenizers differ.")
    if cocktail.solution is not None:
        table = Table("merged with", *(f"{kind} loss" for kind in kinds), "loss")
        for name, by_type, loss in cocktail.solution.rows():
            table.add_row(name, *(f"{by_type[kind]:.4f}" for kind in kinds), f"{loss:.4f}")
        console.print(table)


if __name__ == "__main__":
    main()
