"""What keeps a merged model saying what its parents say: a term of the fitness, with a gradient.

Of each task that has a teacher, the Kullback-Leibler divergence (nats a response token) of the merged
model's predictions from the teacher's, on the task's own samples. DAM learns merging weights by this
alone (Differentiable Adaptive Merging, arXiv 2410.08371). A teacher's likeliest tokens are kept, and
all others as one, so that a large vocabulary takes no more memory: the divergence of these is never
more than that of all, and hardly less where the others are unlikely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mergekit_align.errors import InputError, closest
from mergekit_align.gradient import Lesson, lessons

if TYPE_CHECKING:
    from mergekit_align.evolve.config import EvolveConfig
    from mergekit_align.evolve.fitness import Fitness

DISTILLATION = "distillation,none"
"""The metric: minus the divergence, higher being better as of every other."""
_KEPT = 64


def teach(config: EvolveConfig, fitness: Fitness) -> dict[str, list[Lesson]]:
    """What each task's teacher predicts; the teachers are loaded for it, one after another."""
    from transformers import AutoModelForCausalLM

    assert config.distillation is not None
    teachers = config.distillation.teachers
    found: dict[str, list[Lesson]] = {}
    for path in dict.fromkeys(teachers.values()):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=config.dtype).to(config.device)
        for task, teacher in teachers.items():
            if teacher == path:
                samples, _ = fitness.samples.encoded(task)
                found[task] = lessons(model.eval(), samples, kept=_KEPT)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def check_teachers(config: EvolveConfig) -> None:
    """That a config's distillation has tasks and models of the config, and a searcher by gradient.

    Raises:
        InputError: one is missing; says which.
    """
    if config.distillation is None:
        return
    key = "align.distillation"
    if not config.by_gradient:
        raise InputError.at(
            config.path,
            key,
            found=f"it with the searcher {config.searcher}",
            expected="it with the searcher gradient or adam",
        )
    genome = config.file.config.genome
    models = [str(model) for model in genome.models]
    for task, teacher in config.distillation.teachers.items():
        where = f"{key}.teachers.{task}"
        if task not in config.file.loaded:
            names = list(config.file.loaded)
            raise InputError.at(
                config.path,
                where,
                found="no such task among `tasks`",
                expected=f"one of {', '.join(names)}{closest(task, names)}",
            )
        if teacher not in models:
            raise InputError.at(
                config.path,
                where,
                found=teacher,
                expected=f"one of the genome's models: {', '.join(models)}",
            )
