"""`mergekit-align-report`: evaluations and searches as one page."""

from __future__ import annotations

from typing import Any

import click

from mergekit_align.cli.common import command


@command("mergekit-align-report")
@click.argument("inputs", nargs=-1, required=True, metavar="STUDY|EVALUATION...")
@click.option(
    "--format",
    type=click.Choice(["html", "markdown", "json", "png"]),
    default="html",
    show_default=True,
    help="One self-contained page, text, the numbers, or the figures.",
)
@click.option("--output", metavar="FILE", help="[default: report.html, .md, .json or .png]")
@click.option("--chosen", metavar="NAME", help="The model to be marked, by its name in the table.")
@click.option(
    "--skill",
    metavar="COLUMN",
    help="What is set against alignment.  [default: the first task]",
)
@click.option(
    "--examples", type=int, default=8, show_default=True, help="Example prompts of each type."
)
@click.option("--watch", "watching", is_flag=True, help="Write it again when an input changes.")
@click.option(
    "--card",
    metavar="MODEL",
    help="Put a safety section into the README.md of this evaluated model's directory; no report.",
)
def main(
    inputs: tuple[str, ...], watching: bool, card: str | None, examples: int, **options: Any
) -> None:
    """Show evaluations (`evaluation.json`) and searches (`study.journal`) on one page.

    The trade-off between skill, alignment and over-refusal, every score with its interval, categories
    of unsafe answers, examples, and what it takes to do it again. The page needs no network.

    \b
    mergekit-align-report evaluation.json --chosen merged
    mergekit-align-report genomic-evolved/study.journal evaluation.json --watch
    mergekit-align-report evaluation.json --card merged
    """
    # Imported here, so that --help needs no torch.
    from mergekit_align.report import add_safety_section, watch, write_report

    if examples < 0:
        raise click.BadParameter(f"found {examples}; expected 0 or more", param_hint="--examples")
    if card is not None:
        if len(inputs) != 1:
            raise click.UsageError(f"--card: found {len(inputs)} inputs; expected one evaluation")
        click.echo(add_safety_section(card, inputs[0], name=options["chosen"]))
    elif watching:
        watch(inputs, examples=examples, progress=click.echo, **options)
    else:
        click.echo(write_report(inputs, examples=examples, **options))


if __name__ == "__main__":
    main()
