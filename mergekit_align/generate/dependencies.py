"""What each stage depends on, beside its input."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from typing import Any

import mergekit_align
from mergekit_align.evaluate.models import generation_fingerprint
from mergekit_align.generate.config import Asked, Config, PoolModel
from mergekit_align.generate.settings import Stage


def stage_settings(config: Config) -> dict[Stage, Any]:
    """What each stage depends on, beside its input."""
    settings = config.settings

    def sampling(section: Any) -> dict[str, Any]:
        dumped: dict[str, Any] = section.model_dump(exclude={"model"})
        return {**dumped, "seed": config.seed(section.seed)}

    def of_model(model: PoolModel) -> dict[str, Any]:
        return {
            "model": model.model,
            "fingerprint": generation_fingerprint(model.model, model.backend),
            "batch_size": model.backend.batch_size,
        }

    def of_asked(asked: Asked) -> dict[str, Any]:
        return {
            "samples": asked.samples,
            "topics": [topic._asdict() for topic in asked.topics],
            "template": asked.template and asked.template.model_dump(),
            "writer": asked.writer and of_model(asked.writer),
            "examples": asked.examples,
            "existing": _digest(asked.existing),
        }

    guard = settings.guard
    return {
        "questions": {
            **sampling(settings.questions),
            "asked": {asked.key: of_asked(asked) for asked in config.asked},
            "quality": settings.quality.model_dump(),
            "language": settings.language,
            "decontaminate": _digest(config.evaluation),
            "version": mergekit_align.__version__,
            "lm_eval": version("lm_eval"),
        },
        "answers": {
            **sampling(settings.answers),
            "models": {model.name: of_model(model) for model in config.pool},
            "experts": {asked.domain: asked.expert for asked in config.asked if asked.domain},
        },
        "judge": guard and guard.fingerprint(),
        "select": {**settings.select.model_dump(), "seed": config.seed(settings.select.seed)},
        "split": {"shares": list(settings.split.items()), "seed": settings.seed},
        "save": {
            "licence": settings.licence,
            "licences": {model.name: model.licence for model in config.pool},
        },
    }


def _digest(content: Any) -> str | None:
    if not content:
        return None
    return hashlib.sha256(json.dumps(content, default=os.fspath).encode()).hexdigest()[:16]
