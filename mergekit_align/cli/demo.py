"""`mergekit-align-demo`: build the demo world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mergekit_align.cli.common import command
from mergekit_align.process import importing

if TYPE_CHECKING:
    from mergekit_align.demo.models import Architecture
    from mergekit_align.demo.recipes import Scale


@command("mergekit-align-demo")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True, help="Deals prompts and weights.")
@click.option(
    "--architecture",
    type=click.Choice(["llama", "qwen3", "gemma3", "mistral"]),
    default="llama",
    show_default=True,
    help="Of all the models.",
)
@click.option(
    "--scale",
    type=click.Choice(["full", "smoke"]),
    default="full",
    show_default=True,
    help="`smoke` writes the same files in seconds; its models know next to nothing.",
)
@click.option("--writer", is_flag=True, help="A model that asks questions as well.")
def main(directory: str, seed: int, architecture: Architecture, scale: Scale, writer: bool) -> None:
    """Train a tiny world in DIRECTORY on which all our commands run: data, four models, a guard.

    An interrupted build goes on where it stopped; a finished one is left alone.
    """
    with importing():  # here, so that --help needs no torch
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align.demo import build_world

    disable_progress_bar()

    build_world(directory, seed=seed, architecture=architecture, scale=scale, writer=writer)
    names = "base, aligned, expert-a, expert-b, guard" + (", writer" if writer else "")
    click.echo(f"{directory}: {names}, data")


if __name__ == "__main__":
    main()
