"""`mergekit-align-generate`: synthetic samples from models."""

from __future__ import annotations

import sys

import click

from mergekit_align.cli.common import command
from mergekit_align.process import importing

STAGES = ("questions", "answers", "judge", "select", "split", "save")
TOO_FEW = 3
"""Exit status where fewer questions were obtained than asked for."""


@command("mergekit-align-generate")
@click.argument("config_file")
@click.option("--trial", is_flag=True, help="Ten questions of each type, into OUTPUT-trial.")
@click.option("--output", metavar="DIR", help="In place of the config's.")
@click.option(
    "--from",
    "start",
    type=click.Choice(STAGES),
    help="Run this stage and the later ones again.",
)
@click.option("--only", type=click.Choice(STAGES), help="Run this stage again, and no other.")
def main(
    config_file: str, trial: bool, output: str | None, start: str | None, only: str | None
) -> None:
    """Generate samples as CONFIG_FILE says: questions, answers, verdicts, and what is kept of them.

    Every stage is a file in the config's `output`, that of the next stage's input; samples are in its
    `data`, with a card beside them. A killed run goes on where it stopped. Exit status 3: there are
    fewer questions than asked for, and samples of those. Several GPUs: `accelerate launch -m
    mergekit_align.cli.generate ...`.
    """
    with importing():  # here, so that --help needs no torch
        from accelerate import PartialState
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align.generate import generate, print_funnel, read_config

    disable_progress_bar()
    config = read_config(config_file, {"output": output} if output else None, trial=trial)
    generated = generate(
        config, start=start, only=only, progress=lambda line: click.echo(line, err=True)
    )
    if PartialState().is_main_process:
        print_funnel(generated.funnel, Console())
        for path in generated.files.values():
            click.echo(str(path))
        for key, (found, wanted) in generated.short.items():
            click.echo(
                f"{config_file}: {key}: found {found} questions after "
                f"{config.settings.questions.attempts} rounds; expected {wanted} (the table says "
                "what the others were dropped for)",
                err=True,
            )
    if generated.short:
        sys.exit(TOO_FEW)


if __name__ == "__main__":
    main()
