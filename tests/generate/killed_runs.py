"""Run a config again and again, killed (SIGKILL) twice in every stage, until a run ends by itself.

    python killed_runs.py CONFIG

A moment to be killed at is after a chunk of work is on disk, and before and after a file is put in its
place: a stage is killed at its first such moment, and at the third of the run after that. Prints the
stages that were killed. Each run is a process of its own, forked from this one, which has imported all
that they need.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import lm_eval.models.api_models
import lm_eval.models.huggingface  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from mergekit_align.generate import generate, read_config, stages
from mergekit_align.generate.settings import STAGES
from mergekit_align.journal import Journal


def kill_at(moment: int, stage: str) -> None:
    """Let this process kill itself at the `moment`-th moment of a stage."""
    left, running = moment, ""
    replace, append, run = os.replace, Journal.append, stages.Stages.run

    def count() -> None:
        nonlocal left
        left -= running == stage
        if left == 0:
            print(stage, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(*args: Any) -> None:
        count()
        replace(*args)
        count()

    def counted_append(*args: Any) -> None:
        append(*args)
        count()

    def named_run(self: stages.Stages, name: Any) -> None:
        nonlocal running
        running = name
        run(self, name)

    os.replace, Journal.append, stages.Stages.run = (  # type: ignore[assignment,method-assign]
        counted_replace,
        counted_append,
        named_run,
    )


def main() -> None:
    config = read_config(sys.argv[1])
    deaths = [(moment, stage) for stage in STAGES for moment in (1, 3)]
    for death in [*deaths, None]:
        child = os.fork()
        if child == 0:
            if death is not None:
                kill_at(*death)
            generate(config)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) != (death is not None):
            sys.exit(f"{death}: the run ended with {status}")


if __name__ == "__main__":
    main()
