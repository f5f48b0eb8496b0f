"""The evaluation itself: check, let every model answer, judge, score."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mergekit_align
from mergekit_align.checks import File, check_writable
from mergekit_align.errors import InputError
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.evaluate.columns import (
    Answered,
    Verdicts,
    answer_record,
    notes_on,
    sample_columns,
    task_columns,
)
from mergekit_align.evaluate.inputs import (
    chosen_samples,
    guard_settings,
    named_models,
)
from mergekit_align.evaluate.judge import judge
from mergekit_align.evaluate.models import (
    Backend,
    check_model,
    generate,
    make_backend,
    open_model,
)
from mergekit_align.evaluate.report import Evaluation, save
from mergekit_align.evaluate.tasks import ChosenTask, choose_tasks, run_task
from mergekit_align.guard import GuardSettings, check_guard
from mergekit_align.samples import Sample
from mergekit_align.user_cache import user_cache

MAX_TOKENS = 256


def evaluate(
    models: Sequence[File],
    *,
    names: Sequence[str] | None = None,
    data: Sequence[File | Sample] = (),
    tasks: Sequence[str] = (),
    guard: File | None = None,
    output: File | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    guard_profile: str | None = None,
    threshold: float = 0.5,
    device: str | None = None,
    batch_size: int | None = None,
    backend: str = "hf",
    backend_args: Mapping[str, Any] | None = None,
    apply_chat_template: bool = True,
    task_search_path: Sequence[File] = (),
    cache: File | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluate models: alignment, over-refusal, skill, and lm-eval tasks, side by side.

    Args:
        models: directories or hub names; the first is what the others are compared with.
        names: of the models, in their order; by default the ends of their paths.
        data: files of samples, or samples. Responses to `alignment` prompts are judged, refusals of
            `benign` ones counted, answers to `task` ones compared with the sample's.
        tasks: of lm-eval, ours included, each `NAME` or `NAME:METRIC`.
        guard: model that judges; without one, alignment is the share of refusals.
        output: stem of the JSON and Markdown files; `None` writes none.
        limit: samples of each type (drawn by `seed`, a larger limit's include a smaller's), and
            documents of each task (its first).
        seed: of that, of the bootstrap, and of tasks that sample.
        max_tokens: longest answer to a prompt of `data`.
        guard_profile: kind of guard, or a YAML file that describes it; by default told from the model.
        threshold: P(unsafe) from which on a response is unsafe.
        device: `cpu`, `cuda` or `cuda:1`; by default a GPU where there is one.
        batch_size: requests that a model answers at once; the guard's own is by memory.
        backend: the lm-eval model that runs them: `hf`, `vllm`, `local-chat-completions`, ...
        backend_args: its arguments.
        apply_chat_template: ask the tasks through the models' chat template, few-shot examples as
            turns; `data` is always asked so.
        task_search_path: directories of lm-eval tasks, beside ours.
        cache: directory of what models answered and guards judged; by default
            `mergekit-align/generations` in the user's cache.
        progress: told of each step in a line.

    Raises:
        InputError: something given cannot be used; before any model is loaded.
    """
    named = named_models(models, names)
    for option, value in (("limit", limit), ("max-tokens", max_tokens), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"--{option}: found {value}; expected at least 1")
    if not data and not tasks:
        raise InputError("found neither --data nor --tasks; expected something to evaluate on")
    chosen_backend = make_backend(backend, backend_args, device=device, batch_size=batch_size)
    samples = chosen_samples(data, limit, seed)
    judging = guard_settings(guard, guard_profile, threshold, device, samples)
    profile = check_guard(judging)[1].name if judging else None
    longest = max((sample.prompt for sample in samples), key=len, default="")
    tokenizers = {
        name: check_model(model, chosen_backend, longest=longest, max_tokens=max_tokens)
        for name, model in named.items()
    }
    files = [os.path.abspath(item) for item in data if not isinstance(item, Sample)]
    chosen = choose_tasks(
        tasks,
        [str(eval_tasks_path()), *(os.fspath(path) for path in task_search_path)],
        {
            **({"data": files[0]} if len(files) == 1 else {}),
            **({"guard": judging.model_dump()} if judging else {}),
        },
    )
    directory = Path(cache) if cache is not None else user_cache("generations")
    check_writable(str(directory), "--cache", "directory")
    if output is not None:
        check_writable(str(Path(output).parent), output, "directory")

    answered: dict[str, Answered] = {}
    for name, model in named.items():
        answered[name] = _answer(
            name,
            model,
            chosen_backend,
            tokenizers[name],
            directory,
            samples,
            chosen,
            max_tokens=max_tokens,
            limit=limit,
            seed=seed,
            apply_chat_template=apply_chat_template,
            progress=progress,
        )
    verdicts = _judge_all(samples, answered, judging, directory, progress)
    columns = sample_columns(samples, answered, verdicts, seed)
    columns |= task_columns(chosen, answered, seed, known=columns)
    evaluation = Evaluation(
        named,
        columns,
        judging is not None,
        notes_on(judging, profile, samples, verdicts),
        {
            "seed": seed,
            "limit": limit,
            "max_tokens": max_tokens,
            "backend": chosen_backend.name,
            "backend_args": _printable(backend_args or {}),
            "device": chosen_backend.device,
            "dtype": chosen_backend.dtype,
            "batch_size": chosen_backend.batch_size,
            "apply_chat_template": apply_chat_template,
            "guard": judging and judging.model,
            "guard_profile": profile,
            "threshold": judging and judging.threshold,
            "data": files,
            "tasks": list(tasks),
            "task_search_path": [os.fspath(each) for each in task_search_path],
            "mergekit-align": mergekit_align.__version__,
            **{package: version(package) for package in ("lm_eval", "transformers", "torch")},
        },
        [answer_record(index, sample, answered, verdicts) for index, sample in enumerate(samples)],
    )
    if output is not None:
        save(evaluation, output)
    return evaluation


def _answer(
    name: str,
    model: str,
    backend: Backend,
    tokenizer: Any,
    cache: Path,
    samples: Sequence[Sample],
    tasks: Sequence[ChosenTask],
    *,
    max_tokens: int,
    limit: int | None,
    seed: int,
    apply_chat_template: bool,
    progress: Callable[[str], None],
) -> Answered:
    from transformers import set_seed

    started = time.monotonic()
    with open_model(model, backend, tokenizer, cache) as (lm, on_demand):
        responses = generate(lm, [sample.prompt for sample in samples], max_tokens=max_tokens)
        if samples:
            seconds = time.monotonic() - started
            known = len(samples) - on_demand.computed
            progress(f"{name}: {len(samples)} answers ({known} known) in {seconds:.1f} s")
        results = []
        for task in tasks:
            started = time.monotonic()
            set_seed(seed)
            results.append(run_task(lm, task, limit=limit, apply_chat_template=apply_chat_template))
            progress(f"{name}: {task.name} in {time.monotonic() - started:.1f} s")
    return Answered(responses, results)


def _judge_all(
    samples: Sequence[Sample],
    answered: Mapping[str, Answered],
    settings: GuardSettings | None,
    cache: Path,
    progress: Callable[[str], None],
) -> Verdicts:
    verdicts: Verdicts = {name: [None] * len(samples) for name in answered}
    if settings is None:
        return verdicts
    started = time.monotonic()
    places = [
        (name, index)
        for name in answered
        for index, sample in enumerate(samples)
        if sample.type == "alignment"
    ]
    pairs = [(samples[index].prompt, answered[name].responses[index]) for name, index in places]
    found, new = judge(pairs, settings, cache)
    for (name, index), verdict in zip(places, found, strict=True):
        verdicts[name][index] = verdict
    seconds = time.monotonic() - started
    progress(f"guard: {len(pairs)} responses ({new} to judge) in {seconds:.1f} s")
    return verdicts


def _printable(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Without what must stay secret."""
    secret = ("key", "token", "secret", "password", "header")
    return {
        k: str(v) for k, v in arguments.items() if not any(word in k.lower() for word in secret)
    }
