"""`mergekit-align-evolve`: search for a merge, in memory."""

from __future__ import annotations

import sys
from functools import cache

import click

from mergekit_align.cli.common import command
from mergekit_align.process import importing


@command("mergekit-align-evolve")
@click.argument("genome_file")
@click.option("--out", help="Write the best merge as a model here.")
@click.option("--resume", is_flag=True, help="Go on with the study where it was left.")
@click.option("--dry-run", is_flag=True, help="Say what would be searched, and how long it takes.")
@click.option("--searcher", help="What proposes candidates, in place of the config's.")
@click.option("--evaluations", type=click.IntRange(min=1), help="When to stop.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="When to stop.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the search.")
@click.option("--device", help="`cpu`, `cuda` or `cuda:1`.  [default: a GPU where there is one]")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Candidates at the same time, one a GPU, or a CPU.  [default: the config's, or 1, in this "
    "process]",
)
@click.option("--ray-address", help="HOST:PORT of a running Ray cluster, for the workers.")
@click.option("--storage-path", help="Where the search keeps its files.  [default: NAME-evolved]")
@click.option("--task-search-path", multiple=True, help="A directory of lm-eval tasks.")
def main(
    genome_file: str,
    out: str | None,
    resume: bool,
    dry_run: bool,
    searcher: str | None,
    evaluations: int | None,
    seconds: float | None,
    seed: int | None,
    device: str | None,
    workers: int | None,
    ray_address: str | None,
    storage_path: str | None,
    task_search_path: tuple[str, ...],
) -> None:
    """Search for the best merge of GENOME_FILE, the YAML that `mergekit-evolve` reads.

    `best_config.yml`, a plain mergekit config, is kept current; the study goes on after a kill with
    --resume. Ctrl-C finishes the candidate and saves. Exit status 3: no candidate kept the floors.
    """
    with importing():  # here, so that --help needs no torch
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align.evolve import Evaluator, SearchError, read_config, search
        from mergekit_align.evolve.report import (
            describe,
            print_summary,
            summary,
            write_front,
            write_model,
        )

    disable_progress_bar()
    config = read_config(
        genome_file,
        storage=storage_path,
        evaluations=evaluations,
        seconds=seconds,
        searcher=searcher,
        device=device,
        seed=seed,
        task_search_path=task_search_path,
    )
    if dry_run:
        describe(config)
        return
    try:
        evaluator = cache(lambda: Evaluator(config))
        found = search(
            config,
            resume=resume,
            progress=_progress,
            evaluator=evaluator,
            workers=workers or config.file.section.workers or 1,
            ray_address=ray_address,
        )
    except SearchError as error:
        raise click.ClickException(str(error)) from error
    if sys.stderr.isatty():
        click.echo(err=True)
    if found.best is None:
        raise click.ClickException("every candidate failed; why is in the study")
    print_summary(summary(found, evaluator()))
    if config.objectives:
        click.echo(
            f"{len(write_front(found))} configs of the Pareto front: {config.storage / 'front'}"
        )
    if out is not None:
        write_model(found, out)
        click.echo(out)
    if found.best.violation:
        click.echo(
            "No candidate keeps the floors; the best is the one that misses least.", err=True
        )
        sys.exit(3)


def _progress(line: str) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    click.echo(f"{line:<79}" if end == "\r" else line, err=True, nl=False)
    click.echo(end, err=True, nl=False)


if __name__ == "__main__":
    main()
