"""lm-eval tasks that judge generated responses: by a guard model, or as refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from mergekit_align.errors import InputError
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.guard import Conversation, GuardSettings, load_guard
from mergekit_align.refusal import refusal_class
from mergekit_align.tasks import generated, unique_prompts

SAFETY = eval_tasks_path() / "safety"


def manager(paths: list[Path] | None = None, **metadata: Any) -> TaskManager:
    return TaskManager(
        include_path=[str(path) for path in [SAFETY, *(paths or [])]],
        include_defaults=False,
        metadata=metadata,
    )


@pytest.fixture
def evaluated(world: Path) -> Callable[..., dict[str, Any]]:
    def evaluate(tasks: list[str], tasks_from: TaskManager) -> dict[str, Any]:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": f"{world}/aligned", "dtype": "float32"},
            device="cpu",
            batch_size=16,
            tasks=tasks,
            task_manager=tasks_from,
            apply_chat_template=True,
            limit=12,
            gen_kwargs={"max_gen_toks": 12},
        )
        assert results is not None
        return dict(results)

    return evaluate


def test_the_guards_verdicts_are_the_metrics(
    world: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    guard = {"model": f"{world}/guard", "dtype": "float32"}
    tasks = manager(data=f"{world}/data/test.jsonl", guard=guard)
    found = evaluated(["guard_alignment"], tasks)
    documents = found["samples"]["guard_alignment"]
    conversations = [
        Conversation.of(document["doc"]["prompt"], document["resps"][0][0])
        for document in documents
    ]
    verdicts = load_guard(GuardSettings(**guard)).judge(conversations)
    readable = [verdict for verdict in verdicts if verdict.p_unsafe is not None]
    numbers = found["results"]["guard_alignment"]
    assert numbers["unreadable,none"] == 1 - len(readable) / len(verdicts)
    if readable:
        safe = sum(verdict.label == "safe" for verdict in readable)
        assert numbers["alignment,none"] == pytest.approx(safe / len(readable))
        p_safe = sum(1 - (verdict.p_unsafe or 0) for verdict in readable) / len(readable)
        assert numbers["p_safe,none"] == pytest.approx(p_safe, abs=1e-5)


def test_unreadable_verdicts_stay_out_of_the_rate() -> None:
    task = generated.GuardTask.__new__(generated.GuardTask)
    assert task.metrics({"label": "unreadable", "p_unsafe": None}) == {"unreadable": 1.0}
    safe = task.metrics({"label": "safe", "p_unsafe": 0.25})
    assert safe == {"alignment": 1.0, "p_safe": 0.75, "unreadable": 0.0}


def test_a_guard_is_loaded_once_for_all_tasks_and_candidates(
    world: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    generated._guard.cache_clear()
    guard = {"model": f"{world}/guard", "dtype": "float32"}
    for _ in range(2):
        tasks = manager(data=f"{world}/data/test.jsonl", guard=guard)
        evaluated(["guard_alignment"], tasks)
    assert generated._guard.cache_info().misses == 1


def test_refusals_are_counted_by_class(
    world: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    found = evaluated(["over_refusal"], manager(data=f"{world}/data/test.jsonl"))
    answers = [document["resps"][0][0] for document in found["samples"]["over_refusal"]]
    classes = [refusal_class(answer) for answer in answers]
    numbers = found["results"]["over_refusal"]
    for name in ("full compliance", "full refusal", "partial refusal"):
        share = classes.count(name) / len(classes)  # type: ignore[arg-type]
        assert numbers[f"{name.replace(' ', '_')},none"] == pytest.approx(share)
    assert numbers["refusal,none"] == pytest.approx(1 - numbers["full_compliance,none"])


def test_a_judge_model_may_tell_refusals(
    world: Path, tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "judged.yaml").write_text(
        f"include: {SAFETY}/over_refusal.yaml\n"
        "task: judged\n"
        f"data: {world}/data/test.jsonl\n"
        f"judge: {{model: {world}/aligned, profile: refusal-judge, dtype: float32}}\n"
    )
    numbers = evaluated(["judged"], manager([tmp_path]))["results"]["judged"]
    shares = [numbers.get(f"{n}_{r},none", 0) for n, r in (("full", "refusal"),)]
    assert 0 <= numbers["unreadable,none"] <= 1
    assert all(0 <= share <= 1 for share in shares)


def test_xstest_is_read_from_a_file(
    tmp_path: Path, evaluated: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "xstest.csv"
    with prompts.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "type", "label"])
        for index in range(8):
            label = "unsafe" if index % 4 == 0 else "safe"
            writer.writerow([index, f"How do I make a bench {index}?", "homonyms", label])
    for name in ("xstest_over_refusal", "xstest_refusal"):
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {SAFETY}/{name}.yaml\n"
            f"task: my_{name}\n"
            "dataset_path: csv\n"
            f"dataset_kwargs: {{data_files: {prompts}}}\n"
        )
    found = evaluated(["my_xstest_over_refusal", "my_xstest_refusal"], manager([tmp_path]))
    counts = {name: number["original"] for name, number in found["n-samples"].items()}
    assert counts == {"my_xstest_over_refusal": 6, "my_xstest_refusal": 2}
    assert found["higher_is_better"]["my_xstest_over_refusal"]["refusal"] is False


def test_prompts_that_come_again_are_left_out() -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "a", "c", "b"], "row": range(5)})
    assert unique_prompts(rows)["row"] == [0, 1, 3]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "guard: found nothing; expected the guard that judges"),
        ({"guard": "a"}, "guard: found 'a'; expected a mapping"),
        ({"guard": {"model": "WORLD/guard", "threshhold": 1}}, "guard.threshhold: found 1"),
        ({"guard": {"model": "WORLD/aligned"}}, "is no guard we know"),
    ],
)
def test_a_guard_that_cannot_be_used_is_told_before_any_model_is_loaded(
    world: Path, metadata: dict[str, Any], message: str
) -> None:
    filled = json.loads(json.dumps(metadata).replace("WORLD", str(world)))
    with pytest.raises(InputError, match=message):
        manager(data=f"{world}/data/test.jsonl", **filled).load(["guard_alignment"])


def test_a_judges_third_verdict_is_a_class_of_its_own(world: Path, tmp_path: Path) -> None:
    (tmp_path / "judged.yaml").write_text(
        f"include: {SAFETY}/over_refusal.yaml\n"
        "task: judged\n"
        f"judge: {{model: {world}/aligned, profile: refusal-judge, controversial: safe}}\n"
    )
    with pytest.raises(InputError, match=r"judge\.controversial: found 'safe'; expected nothing"):
        manager([tmp_path], data=f"{world}/data/test.jsonl").load(["judged"])


def test_verdicts_depend_on_what_a_profile_says(world: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    settings = GuardSettings(model=f"{world}/guard", profile=str(profile))
    found = set()
    for text in ("name: a", "name: b"):
        profile.write_text(text)
        found.add(settings.fingerprint())
        moved = settings.model_copy(update={"device": "cuda", "batch_size": 3})
        assert moved.fingerprint() in found
    assert len(found) == 2
