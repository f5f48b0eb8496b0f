"""The safety section of a merged model's card, on a card that mergekit wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from report_inputs import HELP, REFUSAL, make_evaluation

from mergekit_align.errors import InputError
from mergekit_align.evaluate.scores import wilson
from mergekit_align.report import add_safety_section
from mergekit_align.report.card import BEGIN, END

MODELS = ("aligned", "expert", "merged")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {
        "merge_method": "linear",
        "models": [
            {"model": f"{tmp_path}/{name}", "parameters": {"weight": 0.5}} for name in MODELS[:2]
        ],
    }
    directory = tmp_path / "merged"
    directory.mkdir()
    card = generate_card(MergeConfiguration.model_validate(config), yaml.safe_dump(config), "m")
    (directory / "README.md").write_text(card, encoding="utf-8")
    return directory


def evaluation_of(model: Path, **options: object):
    paths = {name: str(model.parent / name) for name in MODELS}
    return make_evaluation(models=paths, **options)  # type: ignore[arg-type]


def test_a_card_gains_a_section_and_metadata(model: Path) -> None:
    before = (model / "README.md").read_text("utf-8").partition("---\n# m")[2]
    add_safety_section(model, evaluation_of(model))
    card = ModelCard.load(model / "README.md")
    assert before.strip() in card.content
    low, high = (100 * each for each in wilson(3, 4))
    assert f"| 75.0 % | {low:.1f} to {high:.1f} | 4 | 0 |" in card.content
    assert "the guard some-guard (profile llama-guard-3" in card.content
    assert "- Prompts: test set.jsonl." in card.content
    assert card.data.tags == ["mergekit", "merge", "mergekit-align"]
    assert card.data.library_name == "transformers"
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == {"alignment": 75.0, "over_refusal": 0.0, "task": 100.0}


def test_a_later_evaluation_takes_the_place_of_an_earlier_one(model: Path) -> None:
    path = add_safety_section(model, evaluation_of(model))
    first = path.read_text("utf-8")
    others = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "ARC", "type": "ai2_arc"},
        "metrics": [{"type": "acc", "value": 50.0}],
    }
    head, _, body = first.removeprefix("---\n").partition("---\n")
    metadata = yaml.safe_load(head)
    metadata["model-index"][0]["results"].append(others)
    path.write_text(f"---\n{yaml.safe_dump(metadata)}---\n{body}\nMine.\n", encoding="utf-8")
    safe = {name: [REFUSAL] * 4 + [HELP, HELP, "blue", "blue"] for name in MODELS}
    add_safety_section(model, evaluation_of(model, answers=safe))
    card = ModelCard.load(path)
    assert card.content.count(BEGIN) == card.content.count(END) == 1
    assert "| 100.0 % |" in card.content
    assert card.content.rstrip().endswith("Mine.")
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == {"acc": 50.0, "alignment": 100.0, "over_refusal": 0.0, "task": 100.0}
    again = path.read_text("utf-8")
    add_safety_section(model, evaluation_of(model, answers=safe))
    assert path.read_text("utf-8") == again


def test_a_model_without_a_card_gets_one(model: Path) -> None:
    (model / "README.md").unlink()
    add_safety_section(model, evaluation_of(model))
    assert ModelCard.load(model / "README.md").data.eval_results


def test_a_model_that_was_not_evaluated(model: Path) -> None:
    evaluation = make_evaluation()
    with pytest.raises(InputError, match="no such model in the evaluation"):
        add_safety_section(model, evaluation)
    add_safety_section(model, evaluation, name="merged")
    with pytest.raises(InputError, match="expected one of aligned, expert, merged"):
        add_safety_section(model, evaluation, name="other")
