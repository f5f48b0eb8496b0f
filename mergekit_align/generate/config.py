"""A config file, read and checked before any model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_align.checks import local_config
from mergekit_align.devices import check_device
from mergekit_align.errors import InputError
from mergekit_align.evaluate.models import Backend, check_model, make_backend
from mergekit_align.generate.language import check_language
from mergekit_align.generate.origins import (
    Existing,
    as_origin,
    describe,
    evaluation_texts,
    load_prompts,
)
from mergekit_align.generate.settings import (
    TRIAL_SAMPLES,
    AskedSettings,
    DomainSettings,
    ModelSettings,
    Settings,
)
from mergekit_align.generate.template import Template, load_template
from mergekit_align.generate.topics import Topic, load_topics
from mergekit_align.guard import check_guard
from mergekit_align.samples import SampleType, read_rows
from mergekit_align.yaml_files import check_section, read_yaml_mapping

_PAGE = "docs/reference.md#generated-data"
DEFAULT_TOPICS: dict[SampleType, str] = {"alignment": "beavertails", "benign": "lookalikes"}
DEFAULT_TEMPLATES: dict[SampleType, str] = {
    "alignment": "unsafe_questions",
    "benign": "harmless_lookalikes",
    "task": "multiple_choice",
}


class PoolModel(NamedTuple):
    """A model that generates."""

    name: str
    model: str
    backend: Backend
    licence: str | None


class Asked(NamedTuple):
    """Questions of one type, or of one domain: how many, and where they come from."""

    key: str
    """Of the config: `alignment`, `benign`, `task.DOMAIN`."""
    type: SampleType
    domain: str | None
    samples: int
    expert: str | None
    """Name of the pool's model whose answers are kept, of a domain."""
    topics: list[Topic]
    template: Template | None
    """`None` where the prompts exist."""
    writer: PoolModel | None
    examples: list[dict[str, Any]]
    existing: list[Existing]
    origin: str
    """What the existing prompts are from."""


class Config(NamedTuple):
    """A config file, read and checked."""

    path: str
    settings: Settings
    output: Path
    pool: list[PoolModel]
    asked: list[Asked]
    evaluation: list[str]
    """Prompts of the evaluation sets."""

    def seed(self, own: int | None) -> int:
        """A stage's seed, which is the config's where it has none of its own."""
        return self.settings.seed if own is None else own


def read_config(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    trial: bool = False,
) -> Config:
    """The config in a file, `overrides` put into it.

    Args:
        trial: ten questions of each type, in an output directory of their own (`OUTPUT-trial`).

    Raises:
        InputError: it cannot be used; one line that names file, key, what was found and expected.
    """
    path = os.fspath(path)
    settings = check_section(
        Settings, {**read_yaml_mapping(path), **(overrides or {})}, path, prefix="", explained=_PAGE
    )
    output = settings.output.rstrip("/")
    if trial:
        settings = _of_a_trial(settings)
        output += "-trial"
    if settings.device is not None:
        check_device(settings.device, f"{path}: device")
    if settings.language is not None:
        check_language(settings.language, f"{path}: language")
    if abs(sum(settings.split.values()) - 1) > 1e-6:
        raise InputError.at(path, "split", found=settings.split, expected="shares that sum to 1")
    pool = _pool(settings, path)
    asked = _all_asked(settings, pool, path)
    _check_guard(settings, path)
    evaluation = [
        text
        for index, given in enumerate(settings.decontaminate)
        for text in evaluation_texts(
            as_origin(given), f"{path}: decontaminate[{index}]", settings.task_search_path
        )
    ]
    return Config(path, settings, Path(output), pool, asked, evaluation)


def _of_a_trial(settings: Settings) -> Settings:
    def few(asked: Any) -> Any:
        return asked and asked.model_copy(update={"samples": None})

    return settings.model_copy(
        update={
            "samples": min(settings.samples, TRIAL_SAMPLES),
            "alignment": few(settings.alignment),
            "benign": few(settings.benign),
            "task": {name: few(domain) for name, domain in settings.task.items()},
        }
    )


def _pool(settings: Settings, path: str) -> list[PoolModel]:
    pool: list[PoolModel] = []
    for index, given in enumerate(settings.models):
        model = _model(given, settings, f"{path}: models[{index}]", settings.answers.batch_size)
        if model.name in {other.name for other in pool}:
            raise InputError.at(
                path,
                f"models[{index}].name",
                found=f"{model.name!r} twice",
                expected="a name of its own for every model",
            )
        check_model(model.model, model.backend, longest="", max_tokens=settings.answers.max_tokens)
        pool.append(model)
    return pool


def _model(
    given: str | ModelSettings, settings: Settings, where: str, batch_size: int | None
) -> PoolModel:
    chosen = ModelSettings(model=given) if isinstance(given, str) else given
    own = chosen.backend_args
    backend = make_backend(
        chosen.backend or settings.backend,
        settings.backend_args if own is None else own,
        device=settings.device,
        batch_size=batch_size,
    )
    if not backend.is_server:
        local_config(chosen.model, where)
    name = chosen.name or Path(chosen.model).name
    return PoolModel(name, chosen.model, backend, chosen.licence)


def _all_asked(settings: Settings, pool: list[PoolModel], path: str) -> list[Asked]:
    found = []
    kinds: tuple[tuple[SampleType, AskedSettings | None], ...] = (
        ("alignment", settings.alignment),
        ("benign", settings.benign),
    )
    for kind, given in kinds:
        if given is not None:
            found.append(_asked(given, settings, kind, None, settings.samples, path))
    shares = apportion(settings.samples, [1.0] * len(settings.task))
    for (domain, given), share in zip(settings.task.items(), shares, strict=True):
        asked = _asked(given, settings, "task", domain, max(1, share), path)
        expert = _expert(given, pool, f"{path}: task.{domain}.expert")
        found.append(asked._replace(expert=expert))
    if not found:
        raise InputError(
            f"{path}: found none of alignment, benign and task; expected at least one, `{{}}` for "
            "every default"
        )
    return found


def apportion(count: int, shares: Sequence[float]) -> list[int]:
    """`count` in parts as `shares` are to each other, to within one."""
    found, given, total = [], 0.0, 0
    for share in shares:
        given += share
        # The tolerance undoes what adding up fractions loses.
        part = math.floor(count * given / sum(shares) + 1e-9) - total
        found.append(part)
        total += part
    return found


def _asked(
    given: AskedSettings,
    settings: Settings,
    kind: SampleType,
    domain: str | None,
    samples: int,
    path: str,
) -> Asked:
    key = kind if domain is None else f"task.{domain}"
    where = f"{path}: {key}"
    base = Asked(key, kind, domain, given.samples or samples, None, [], None, None, [], [], "")
    if given.prompts is not None:
        for other in ("topics", "template", "model"):
            if getattr(given, other) is not None:
                raise InputError(f"{where}: found `prompts` and `{other}`; expected one of them")
        origin = as_origin(given.prompts)
        existing = load_prompts(origin, f"{where}.prompts")
        return base._replace(existing=existing, origin=describe(origin))
    writer = given.model or settings.questions.model
    if writer is None:
        raise InputError(
            f"{where}.model: found nothing; expected who writes the questions, here or in "
            "questions.model, or `prompts` that exist"
        )
    writer_key = f"{path}: questions.model" if given.model is None else f"{where}.model"
    named = {each.name: each for each in settings.models if isinstance(each, ModelSettings)}
    if isinstance(writer, str):
        writer = named.get(writer, writer)
    topics = given.topics or DEFAULT_TOPICS.get(kind)
    template = load_template(given.template or DEFAULT_TEMPLATES[kind], f"{where}.template")
    found = base._replace(
        topics=load_topics(topics, f"{where}.topics") if topics else [Topic(domain or kind)],
        template=template,
        writer=_model(writer, settings, writer_key, settings.questions.batch_size),
        examples=_examples(given, where),
    )
    assert found.writer is not None
    check_model(
        found.writer.model,
        found.writer.backend,
        longest=template.instruction,
        max_tokens=settings.questions.max_tokens,
    )
    return found


def _examples(given: AskedSettings, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, DomainSettings):
        return []
    where = f"{where}.examples"
    entries: list[Any]
    if not isinstance(given.examples, str):
        entries = list(given.examples)
    elif given.examples.endswith((".yaml", ".yml")):
        entries = read_yaml_mapping(given.examples).get("examples") or []
    else:
        entries = [row for _, row in read_rows(Path(given.examples))]
    examples = [{"question": entry} if isinstance(entry, str) else entry for entry in entries]
    for index, example in enumerate(examples):
        if not isinstance(example, dict) or not isinstance(example.get("question"), str):
            raise InputError(f"{where}[{index}]: found {example!r}; expected a `question`")
    return examples


def _expert(given: DomainSettings, pool: list[PoolModel], where: str) -> str:
    names = ", ".join(model.name for model in pool)
    if given.expert is None:
        found = f"nothing, and a pool of one model, {names}," if len(pool) == 1 else "nothing"
        raise InputError(f"{where}: found {found}; expected the expert, one of models: {names}")
    for model in pool:
        if given.expert in (model.name, model.model):
            return model.name
    raise InputError(f"{where}: found {given.expert!r}; expected one of models: {names}")


def _check_guard(settings: Settings, path: str) -> None:
    if settings.alignment is None and settings.benign is None:
        return
    if settings.guard is None:
        raise InputError.at(
            path,
            "guard",
            found="nothing",
            expected="the guard that judges the answers: {model: ...}",
        )
    local_config(settings.guard.model, f"{path}: guard.model")
    check_guard(settings.guard)
