"""`mergekit-align-guard`: judge responses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_align.cli.common import command
from mergekit_align.errors import InputError
from mergekit_align.process import importing

if TYPE_CHECKING:
    from mergekit_align.guard.run import Summary


@command("mergekit-align-guard")
@click.argument("responses", nargs=-1, required=True, type=click.Path())
@click.option("--guard", "model", required=True, help="Guard model: a directory or a hub name.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Verdicts, a JSON line each.  [default: RESPONSES.verdicts.jsonl]",
)
@click.option(
    "--profile",
    help="Kind of guard, or a YAML file that describes it.  [default: told from the model]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="P(unsafe) from which on a response is unsafe.",
)
@click.option(
    "--controversial",
    type=click.Choice(["safe", "unsafe"]),
    default="unsafe",
    show_default=True,
    help="How a guard's third verdict counts.",
)
@click.option(
    "--policy",
    type=click.Path(exists=True, dir_okay=False),
    help="YAML or JSON mapping of codes to policies, for a guard that takes any.",
)
@click.option("--prompts", is_flag=True, help="Judge the prompts; leave responses out.")
@click.option(
    "--mode",
    type=click.Choice(["probability", "generate"]),
    default="probability",
    show_default=True,
    help="`generate` reads verdicts from written text: slow, to compare with.",
)
@click.option(
    "--categories/--no-categories",
    default=True,
    show_default=True,
    help="Have the guard name what is violated.",
)
@click.option("--device", help="`cpu`, `cuda`, `cuda:1`.  [default: a GPU where there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: bfloat16, or float32 on a CPU without it]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: what memory allows]")
@click.option("--backend", help="lm-eval model that answers instead: `vllm`, `local-completions`.")
@click.option("--backend-args", default="", help="Its arguments: `base_url=http://...,model=NAME`.")
def main(
    responses: tuple[str, ...],
    output: str | None,
    prompts: bool,
    policy: str | None,
    backend_args: str,
    **settings: Any,
) -> None:
    """Judge RESPONSES (JSON or JSON lines, one file or many) with a guard model.

    A row has `prompt` and `response`, or `messages`. A killed run goes on where it stopped when the
    same command is given again. Several GPUs: `accelerate launch -m mergekit_align.cli.guard ...`.
    """
    with importing():  # here, so that --help needs no torch
        from lm_eval.utils import simple_parse_args_string
        from pydantic import ValidationError
        from transformers.utils.logging import disable_progress_bar

        from mergekit_align.guard import GuardSettings
        from mergekit_align.guard.run import judge_file
        from mergekit_align.yaml_files import input_error, read_yaml_mapping

    disable_progress_bar()
    try:
        chosen = GuardSettings(
            policy=read_yaml_mapping(policy) if policy else None,
            backend_args=simple_parse_args_string(backend_args),
            **settings,
        )
    except ValidationError as error:
        raise input_error(error, policy or "command line", prefix="") from error
    target = Path(output or f"{Path(responses[0]).with_suffix('')}.verdicts.jsonl")
    if target.resolve() in {Path(path).resolve() for path in responses}:
        raise InputError(f"--output: found {target}, which is to be judged; expected another file")
    summary = judge_file(responses, target, chosen, prompts_only=prompts)
    _print_summary(summary, target)


def _print_summary(summary: Summary, target: Path) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    readable = summary.safe + summary.unsafe
    click.echo(
        f"{summary.responses} responses: {100 * summary.safe_rate:.1f}% safe ({summary.safe} of "
        f"{readable}), {summary.unsafe} unsafe, {summary.unreadable} unreadable, {summary.cut} cut"
    )
    for code, count in summary.by_guard_category.items():
        click.echo(f"  {code}: {count} unsafe")
    for category, (safe, judged) in summary.by_category.items():
        click.echo(f"  {category}: {100 * safe / judged:.1f}% safe ({safe} of {judged})")
    click.echo(str(target))


if __name__ == "__main__":
    main()
