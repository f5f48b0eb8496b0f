"""The term that keeps a merged model near its parents, against all of their predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mergekit_align.demo.models import new_model
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.encoding import EncodedSample
from mergekit_align.errors import InputError
from mergekit_align.evolve import read_config, search
from mergekit_align.evolve.candidate import Evaluator
from mergekit_align.evolve.distillation import DISTILLATION
from mergekit_align.gradient import lessons, mean_nearness

TASKS = [
    {"name": "response_alignment", "metric": "decision_logprob,none", "weight": 1.0},
    {"name": "response_task", "metric": "sequence_logprob,none", "weight": 0.1},
]
SAMPLES = [
    EncodedSample([7, 8, 9], [30, 31, 32, 33]),
    EncodedSample([7, 8, 9, 10, 11], [40]),
    EncodedSample([5], [50, 51]),
]


def random_model(seed: int) -> PreTrainedModel:
    model = new_model("llama", build_tokenizer(), seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # so that predictions differ
    return model


def whole_divergence(teacher: PreTrainedModel, model: PreTrainedModel) -> torch.Tensor:
    """Mean over samples of the mean over response tokens, a sample at a time."""
    found = []
    for prompt, response in SAMPLES:
        ids = torch.tensor([[*prompt, *response]])
        own, its = (
            each(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1) for each in (teacher, model)
        )
        found.append((own.exp() * (own - its)).sum(1).mean())
    return torch.stack(found).mean()


def test_all_tokens_kept_is_the_whole_divergence() -> None:
    teacher, model = random_model(0), random_model(1)
    value = mean_nearness(model, lessons(teacher, SAMPLES, kept=10**6)).accumulate()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = whole_divergence(teacher, model)
    (-expected).backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(-expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_few_tokens_kept_tell_no_more_than_all() -> None:
    teacher, model = random_model(0), random_model(1)
    with torch.no_grad():
        whole = float(whole_divergence(teacher, model))
    kept = [
        -mean_nearness(model, lessons(teacher, SAMPLES, kept=n)).accumulate() for n in (1, 8, 64)
    ]
    assert 0 < kept[0] < kept[1] < kept[2] < whole
    itself = lessons(model, SAMPLES, kept=8)
    assert mean_nearness(model, itself).accumulate() == pytest.approx(0, abs=1e-6)


@pytest.fixture
def distilled(write_config: Callable[..., Path], world: Path) -> Path:
    teachers = {"response_alignment": f"{world}/aligned", "response_task": f"{world}/expert-a"}
    align = {
        "searcher": "gradient",
        "distillation": {"weight": 200.0, "teachers": teachers},
        "start": {"weight": 0.5},
    }
    return write_config(tasks=TASKS, align=align)


def test_it_counts_in_the_fitness_and_in_its_gradient(distilled: Path) -> None:
    config = read_config(distilled)
    candidates = Evaluator(config)
    genotype = np.array([0.5, 0.5])
    found = candidates.evaluate(genotype, gradient=True)
    assert found.values is not None
    assert found.gradient is not None
    plain = candidates.evaluate(genotype)
    assert plain.values is not None
    nearness = sum(found.results[task["name"]][DISTILLATION] for task in TASKS)  # type: ignore[index]
    assert nearness < -1e-3
    assert found.values[0] == pytest.approx(plain.values[0] + 200.0 * nearness, abs=1e-3)
    for gene in range(2):
        step = np.zeros(2)
        step[gene] = 0.1
        ends = [candidates.evaluate(genotype + sign * step, gradient=True) for sign in (1, -1)]
        slope = (ends[0].values[0] - ends[1].values[0]) / 0.2  # type: ignore[index]
        assert found.gradient[0, gene] == pytest.approx(slope, rel=0.2, abs=0.1)
    # A merge that is the teacher says what the teacher says.
    teacher = candidates.evaluate(np.array([1.0, 0.0]), gradient=True)
    assert teacher.results["response_alignment"][DISTILLATION] == pytest.approx(0, abs=1e-4)


def test_a_search_with_it_is_another_study(distilled: Path, tmp_path: Path) -> None:
    found = search(read_config(distilled, storage=tmp_path / "one", evaluations=3))
    assert all(each.failure is None for each in found.evaluations)
    text = distilled.read_text()
    distilled.write_text(text.replace("weight: 200.0", "weight: 100.0"))
    with pytest.raises(InputError, match=r"distillation\.weight: found 100\.0"):
        search(read_config(distilled, storage=tmp_path / "one", evaluations=4), resume=True)


@pytest.mark.parametrize(
    ("align", "line"),
    [
        ({"searcher": "cma"}, "align.distillation: found it with the searcher cma; expected"),
        (
            {"teachers": {"response_tusk": "{world}/aligned"}},
            "align.distillation.teachers.response_tusk: found no such task among `tasks`; expected",
        ),
        (
            {"teachers": {"response_task": "{world}/base"}},
            "align.distillation.teachers.response_task: found {world}/base; expected one of",
        ),
        ({"teachers": {}}, "align.distillation.teachers"),
    ],
)
def test_bad_input_is_one_line(
    align: dict[str, Any], line: str, write_config: Callable[..., Path], world: Path
) -> None:
    teachers = {
        task: model.format(world=world)
        for task, model in align.get("teachers", {"response_task": "{world}/aligned"}).items()
    }
    section = {
        "searcher": align.get("searcher", "gradient"),
        "distillation": {"teachers": teachers},
    }
    with pytest.raises(InputError) as error:
        read_config(write_config(tasks=TASKS, align=section))
    assert line.format(world=world) in str(error.value)
