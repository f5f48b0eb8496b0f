"""The stages in their order, each from file to file."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mergekit_align.checks import check_writable
from mergekit_align.errors import InputError, closest
from mergekit_align.generate.config import Config
from mergekit_align.generate.dependencies import stage_settings
from mergekit_align.generate.funnel import Funnel, make_funnel
from mergekit_align.generate.record import Record
from mergekit_align.generate.settings import STAGES, Stage
from mergekit_align.generate.stages import Stages
from mergekit_align.journal import delete_journals


class Generated(NamedTuple):
    """What a run came to."""

    output: Path
    files: dict[str, Path]
    """Samples, by the name of their split; none where the run ended before they were saved."""
    funnel: Funnel
    short: dict[str, tuple[int, int]]
    """By what was asked for: questions found and wanted, where there are fewer than that."""


def generate(
    config: Config,
    *,
    start: str | None = None,
    only: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Generated:
    """Run the stages that are not done: questions, answers, judge, select, split, save.

    Under `accelerate launch` every process calls it, and they share the work out.

    Args:
        start: run this stage and the later ones, whatever was done.
        only: run this stage alone, whatever was done, on the files that are there.
        progress: told of each step in a line, by the first process.

    Raises:
        InputError: the output holds another config's run, a stage's file was edited into something
            that cannot be read, or a server does not answer.
    """
    from accelerate import PartialState

    again = _again(start, only)
    check_writable(str(config.output), config.path, "output")
    # Longer than any stage that one process runs alone.
    state = PartialState(timeout=datetime.timedelta(days=7))
    record = Record(
        config.output,
        stage_settings(config),
        date=datetime.date.today().isoformat(),
        again=frozenset(again),
    )
    state.wait_for_everyone()
    main: bool = state.is_main_process
    if main:
        record.write()
        for stage in STAGES:
            if stage in again or record.is_done(stage):
                delete_journals(record.path(stage))
    state.wait_for_everyone()
    stages = Stages(config, record, state, progress if main else lambda line: None)
    for stage in STAGES:
        if only is not None and stage != only:
            continue
        if record.is_done(stage) and stage != "save":
            continue
        record.check_inputs(stage)
        stages.run(stage)
    funnel = make_funnel({stage: record.counts(stage) for stage in STAGES})
    short = {key: tuple(pair) for key, pair in record.counts("questions").get("short", {}).items()}
    files = {name: config.output / "data" / f"{name}.jsonl" for name in config.settings.split}
    return Generated(config.output, {k: v for k, v in files.items() if v.exists()}, funnel, short)


def _again(start: str | None, only: str | None) -> list[Stage]:
    for option, name in (("--from", start), ("--only", only)):
        if name is not None and name not in STAGES:
            raise InputError(
                f"{option}: found {name!r}; expected one of {', '.join(STAGES)}"
                f"{closest(name, STAGES)}"
            )
    if start is not None and only is not None:
        raise InputError("--only: found together with --from; expected one of them")
    return [
        stage
        for index, stage in enumerate(STAGES)
        if stage == only or (start is not None and index >= list[str](STAGES).index(start))
    ]
