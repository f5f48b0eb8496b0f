"""lm-eval tasks that YAML files name by `class: !function mergekit_align.tasks.NAME`."""

from mergekit_align.tasks.generated import (
    GuardTask,
    RefusalTask,
    labelled_safe,
    labelled_unsafe,
    unique_prompts,
)
from mergekit_align.tasks.response import ResponseTask

__all__ = [
    "GuardTask",
    "RefusalTask",
    "ResponseTask",
    "labelled_safe",
    "labelled_unsafe",
    "unique_prompts",
]
