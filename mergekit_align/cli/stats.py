"""`mergekit-align-stats`: what a model does on samples, for merge methods that are aware of data."""

from __future__ import annotations

from typing import get_args

import click

from mergekit_align.cli.common import command
from mergekit_align.process import importing


@command("mergekit-align-stats")
@click.argument("model", required=False)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Samples (JSONL, JSON or a saved dataset). May be repeated.",
)
@click.option("--out", metavar="DIR", help="The model's statistics, a file a sample type and kind.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["gram", "importance", "fisher"]),
    default=["gram"],
    show_default=True,
    help="What to compute, all in one pass: input Gram matrices (regmean, align_adaptive), "
    "|theta * grad| (led), diagonal Fisher information (fisher). May be repeated.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    type=click.Choice(["alignment", "task", "benign"]),
    help="Only samples of this type. May be repeated.  [default: all that there are]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Samples of each type.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws them.")
@click.option("--device", help="`cpu`, `cuda`, `cuda:1`.  [default: a GPU where there is one]")
@click.option(
    "--merge",
    metavar="CONFIG",
    help="Instead of MODEL: a mergekit config of `regmean_plus`, whose models' Gram matrices are "
    "computed anew from what the merged layers pass on.",
)
def main(
    model: str | None,
    data: tuple[str, ...],
    out: str | None,
    kinds: tuple[str, ...],
    types: tuple[str, ...],
    limit: int | None,
    seed: int,
    device: str | None,
    merge: str | None,
) -> None:
    """Compute statistics of MODEL (a directory or a hub name) on samples.

    Merge methods read them by path (`parameters: {statistics: DIR}`), tensor by tensor. Files that are
    there already, of the same model and samples, are kept.

    \b
    mergekit-align-stats aligned --data train.jsonl --type alignment --type benign --out stats/aligned
    mergekit-align-stats expert --data train.jsonl --type task --out stats/expert
    mergekit-align-stats --merge regmean_plus.yml
    """
    with importing():  # here, so that --help needs no torch
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align.errors import InputError
        from mergekit_align.samples import SampleType
        from mergekit_align.statistics.collect import Source, collect_statistics
        from mergekit_align.statistics.files import Kind
        from mergekit_align.statistics.propagate import collect_propagated, read_merge

    disable_progress_bar()

    def progress(line: str) -> None:
        click.echo(line, err=True)

    if merge is not None:
        if model is not None or data or out:
            raise InputError("--merge: found MODEL, --data or --out too; expected it alone")
        paths = collect_propagated(read_merge(merge), progress)
    else:
        if model is None or not data or out is None:
            raise InputError("found no MODEL, --data or --out; expected all three, or --merge")
        paths = collect_statistics(
            model,
            Source(data, limit, seed),
            out,
            kinds=[kind for kind in get_args(Kind) if kind in kinds],
            types=[kind for kind in get_args(SampleType) if kind in types],
            device=device,
            progress=progress,
        )
    for path in paths:
        click.echo(path)


if __name__ == "__main__":
    main()
