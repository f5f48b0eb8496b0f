"""`mergekit-align-evaluate`: models side by side in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_align.cli.common import command
from mergekit_align.process import importing


@command("mergekit-align-evaluate")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Samples (JSONL, JSON or a saved dataset): unsafe prompts are those of type `alignment`, "
    "harmless look-alikes `benign`, skill `task`. May be repeated.",
)
@click.option(
    "--tasks",
    default="",
    metavar="NAME,...",
    help="lm-eval tasks, a column each: `arc_easy,gsm8k:exact_match`.",
)
@click.option(
    "--guard",
    metavar="MODEL",
    help="Guard model that judges responses to unsafe prompts.  [default: refusals are counted]",
)
@click.option(
    "--output",
    default="evaluation",
    show_default=True,
    metavar="STEM",
    help="Writes STEM.json, with every answer, and STEM.md.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    help="A model's name in the table: once for each, in their order.  [default: the path's end]",
)
@click.option("--limit", type=int, help="Samples of each type, and documents of each task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn.")
@click.option(
    "--max-tokens", type=int, default=256, show_default=True, help="Longest answer to a prompt."
)
@click.option(
    "--guard-profile",
    help="Kind of guard, or a YAML file that describes it.  [default: told from the model]",
)
@click.option(
    "--threshold",
    type=float,
    default=0.5,
    show_default=True,
    help="P(unsafe) from which on a response is unsafe.",
)
@click.option("--device", help="`cpu`, `cuda`, `cuda:1`.  [default: a GPU where there is one]")
@click.option("--batch-size", type=int, help="[default: 64, halved where memory is short]")
@click.option(
    "--backend",
    default="hf",
    show_default=True,
    help="lm-eval model that runs the models: `hf`, `vllm`, `local-chat-completions`.",
)
@click.option(
    "--backend-args", default="", metavar="KEY=VALUE,...", help="Its arguments: `dtype=float32`."
)
@click.option(
    "--apply-chat-template/--no-apply-chat-template",
    default=True,
    show_default=True,
    help="Ask the tasks through the chat template too.",
)
@click.option(
    "--task-search-path",
    "--include-path",
    multiple=True,
    metavar="DIR",
    help="lm-eval tasks of your own. May be repeated.",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Keeps what models answered.  [default: ~/.cache/mergekit-align/generations]",
)
def main(
    models: tuple[str, ...],
    names: tuple[str, ...],
    tasks: str,
    backend_args: str,
    output: str,
    **settings: Any,
) -> None:
    """Compare MODELs (directories or hub names): alignment, over-refusal and tasks, in one table.

    Every model answers the prompts in --data and runs the lm-eval --tasks; a guard judges what it
    said to unsafe prompts. Each score comes with its 95% interval, and with its difference from the
    first model's.

    A killed run goes on where it stopped, and a model, task or guard that is added costs only itself.

    \b
    mergekit-align-evaluate aligned merged --data test.jsonl --guard meta-llama/Llama-Guard-3-8B
    mergekit-align-evaluate aligned merged --data test.jsonl --tasks arc_easy --limit 100
    """
    with importing():  # here, so that --help needs no torch
        from lm_eval.utils import simple_parse_args_string
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align.evaluate import evaluate, print_table

    disable_progress_bar()
    stem = str(Path(output).with_suffix("") if output.endswith((".json", ".md")) else output)
    evaluation = evaluate(
        list(models),
        names=names or None,
        tasks=[name for name in tasks.split(",") if name],
        backend_args=simple_parse_args_string(backend_args),
        output=stem,
        progress=lambda line: click.echo(line, err=True),
        **settings,
    )
    print_table(evaluation, Console())
    click.echo(f"{stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
