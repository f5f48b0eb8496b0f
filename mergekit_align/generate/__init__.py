"""Prompts -> questions -> answers -> judged, tagged samples: synthetic data from the user's own models.

    from mergekit_align.generate import generate, read_config

    generated = generate(read_config("generate.yml"))
    generated.files["train"]       # alignment, task and benign samples, for every other command

Each stage reads a file and writes one: `questions`, `answers`, `judge`, `select`, `split`, `save`. A
killed run goes on where it stopped, and any stage can be run again alone. `ask` collects questions,
`work` has models answer, `select` says what is kept, `run` and `record` keep the order.
"""

from mergekit_align.generate.config import Config, read_config
from mergekit_align.generate.funnel import Funnel, print_funnel
from mergekit_align.generate.run import Generated, generate

__all__ = ["Config", "Funnel", "Generated", "generate", "print_funnel", "read_config"]
