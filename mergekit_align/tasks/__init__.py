"""lm-eval tasks that YAML files name by `class: !function mergekit_align.tasks.NAME`."""

from mergekit_align.tasks.response import ResponseTask

__all__ = ["ResponseTask"]
