"""The paper's evaluations as groups of lm-eval's own tasks, and the one number each group reports.

lm-eval's tasks and evaluator are the real ones. Their datasets are stand-ins of a few rows, of
different sizes, so that a plain mean and one weighted by size differ.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from mergekit_align.eval_task_files import eval_tasks_path

STOCK = Path(lm_eval.__file__).parent / "tasks"
USED = ["arc", "medmcqa", "medqa", "mmlu/default", "pubmedqa", "winogrande"]
BIOMEDICINE = {
    "medmcqa",
    "medqa_4options",
    "pubmedqa",
    "mmlu_anatomy",
    "mmlu_clinical_knowledge",
    "mmlu_college_biology",
    "mmlu_college_medicine",
    "mmlu_medical_genetics",
    "mmlu_professional_medicine",
}
REASONING = {"winogrande", "arc_challenge"}
GROUPS = ["paper_biomedicine", "paper_stem", "paper_reasoning", "paper_all"]

ROWS: dict[str, dict[str, Any]] = {
    "GBaker/MedQA-USMLE-4-options-hf": {
        "sent1": "Which?",
        **{f"ending{index}": f"option {index}" for index in range(4)},
        "label": 2,
    },
    "allenai/ai2_arc": {
        "question": "Which?",
        "choices": {"text": ["this", "that", "neither"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "allenai/winogrande": {
        "sentence": "The cup fits the box because _ is small.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    "bigbio/pubmed_qa": {
        "QUESTION": "Does it?",
        "CONTEXTS": ["It was seen.", "It was not."],
        "final_decision": "maybe",
    },
    "cais/mmlu": {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 3},
    "openlifescienceai/medmcqa": {
        "question": "Which?",
        **{f"op{letter}": f"option {letter}" for letter in "abcd"},
        "cop": 0,
    },
}


def _load_rows(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    size = 2 + len(f"{path}/{name}") % 9
    rows = datasets.Dataset.from_list([ROWS[path]] * size)
    return datasets.DatasetDict(dict.fromkeys(["train", "validation", "test", "dev"], rows))


@pytest.fixture(scope="module", autouse=True)
def _rows_for_the_hubs_datasets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", _load_rows)
        yield


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Ours and the stock directories that ours need: all of lm-eval takes long to read."""
    paths = [*(STOCK / directory for directory in USED), eval_tasks_path()]
    return TaskManager(include_defaults=False, include_path=paths)


@pytest.mark.slow  # lm-eval reads every task that it has
def test_lm_eval_validates_the_groups_and_has_none_of_their_names() -> None:
    command = [sys.executable, "-m", "lm_eval", "validate", "--tasks", ",".join(GROUPS)]
    done = subprocess.run(
        [*command, "--include_path", eval_tasks_path()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All tasks found and valid" in done.stdout
    assert "overrides existing task" not in done.stderr


def _tasks(manager: TaskManager, name: str) -> set[str]:
    return set(manager.load([name])["tasks"])


def test_each_group_holds_what_the_paper_evaluates(manager: TaskManager) -> None:
    assert _tasks(manager, "paper_biomedicine") == BIOMEDICINE
    assert _tasks(manager, "paper_reasoning") == REASONING
    assert _tasks(manager, "paper_stem") == _tasks(manager, "mmlu_stem")


def test_every_task_is_lm_evals_own(manager: TaskManager) -> None:
    for name in _tasks(manager, "paper_all"):
        assert STOCK in manager.task_index[name].yaml_path.parents


@pytest.fixture(scope="module")
def results(manager: TaskManager) -> dict[str, Any]:
    done = lm_eval.simple_evaluate(
        "dummy", tasks=["paper_all"], task_manager=manager, bootstrap_iters=0
    )
    return done["results"]


@pytest.mark.parametrize(
    ("group", "by_size"),
    [("paper_biomedicine", False), ("paper_stem", True), ("paper_reasoning", False)],
)
def test_a_group_reports_one_accuracy_averaged_as_the_paper_does(
    manager: TaskManager, results: dict[str, Any], group: str, by_size: bool
) -> None:
    tasks = [results[name] for name in _tasks(manager, group)]

    def mean(weights: list[int]) -> float:
        pairs = zip(weights, tasks, strict=True)
        return sum(weight * task["acc,none"] for weight, task in pairs) / sum(weights)

    plain, weighted = mean([1] * len(tasks)), mean([task["sample_len"] for task in tasks])
    assert plain != pytest.approx(weighted)
    assert results[group]["acc,none"] == pytest.approx(weighted if by_size else plain)


def test_subjects_in_two_groups_are_evaluated_once(
    manager: TaskManager, results: dict[str, Any]
) -> None:
    shared = _tasks(manager, "paper_biomedicine") & _tasks(manager, "paper_stem")
    assert shared
    assert set(results) == _tasks(manager, "paper_all") | set(GROUPS)
    assert "acc,none" not in results["paper_all"]
