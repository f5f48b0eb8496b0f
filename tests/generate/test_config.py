"""What is wrong with a config is one line, before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from click.testing import CliRunner
from lm_eval.models.huggingface import HFLM

from mergekit_align.cli.generate import main
from mergekit_align.generate import read_config
from mergekit_align.generate.config import apportion
from mergekit_align.generate.template import load_template
from mergekit_align.generate.topics import load_topics

PACKAGE = Path(read_config.__code__.co_filename).parent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": []}, "modles: found an unknown key; expected one of models"),
        ({"models": []}, "models: found []"),
        ({"models": ["nowhere"]}, "models[0]: found no directory nowhere"),
        ({"output": None}, "output: found nothing; expected a value"),
        ({"guard": None}, "guard: found nothing; expected the guard that judges"),
        ({"guard": {"model": "./nowhere"}}, "guard.model: found no directory ./nowhere"),
        ({"split": {"train": 0.5}}, "split: found {'train': 0.5}; expected shares that sum to 1"),
        ({"language": "xx"}, "language: found 'xx'; expected one of ar, bg"),
        ({"backend": "hff"}, "backend: found 'hff'"),
        ({"device": "cuda:99"}, "device: found 'cuda:99'"),
        ({"alignment": {"topics": "nowhere.yaml"}}, "alignment.topics: found no file nowhere.yaml"),
        ({"alignment": {"topics": "beavertale"}}, "(did you mean 'beavertails'?)"),
        ({"alignment": {"topics": ["a", "a"]}}, "alignment.topics: found 'a' twice"),
        ({"alignment": {"topics": [{"name": "a", "share": 0}]}}, "topics[0].share: found 0"),
        (
            {"alignment": {"template": "unsafe"}},
            "alignment.template: found 'unsafe'; expected a YAML",
        ),
        ({"alignment": {"template": "no.yaml"}}, "alignment.template: found no file no.yaml"),
        ({"alignment": {"prompts": "no.jsonl"}}, "alignment.prompts: found no such file no.jsonl"),
        ({"alignment": {"prompts": {}}}, "found none; expected either `path` or `dataset`"),
        ({"alignment": {"prompts": "x", "topics": ["a"]}}, "found `prompts` and `topics`"),
        ({"questions": {}}, "alignment.model: found nothing; expected who writes the questions"),
        ({"questions": {"model": "nowhere"}}, "questions.model: found no directory nowhere"),
        ({"questions": {"attempts": 0}}, "questions.attempts: found 0"),
        ({"decontaminate": ["no.jsonl"]}, "decontaminate[0]: found no such file no.jsonl"),
        ({"task": {"skill": {"expert": "nobody"}}}, "task.skill.expert: found 'nobody'"),
        ({"task": {"skill": {}}}, "task.skill.expert: found nothing; expected the expert, one of"),
        (
            {"alignment": None, "benign": None, "task": None},
            "found none of alignment, benign and task",
        ),
        ({"quality": {"near_duplicates": 0.1}}, "quality.near_duplicates: found 0.1"),
        ({"answers": {"max_tokens": 9999}}, "found a context window of 512 tokens"),
    ],
)
def test_bad_input_is_one_line(
    config: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(HFLM, "__init__", load)
    result = CliRunner().invoke(main, [str(config(**changes))])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "generated").exists()


def test_a_pool_of_one_model_is_no_expert_unless_it_is_said(
    config: Callable[..., Path], pool: Path
) -> None:
    one = {"models": [f"{pool}/helper"]}
    result = CliRunner().invoke(main, [str(config(**one, task={"skill": {}}))])
    assert result.exit_code == 2
    assert "found nothing, and a pool of one model, helper, here; expected" not in result.output
    assert "a pool of one model, helper," in result.output
    read_config(config(**one))


def test_a_model_of_the_pool_may_write_under_its_name(
    config: Callable[..., Path], pool: Path
) -> None:
    own = {"model": f"{pool}/refuser", "name": "careful"}
    read = read_config(
        config(models=[own, f"{pool}/helper"], questions={"model": "careful"}, task=None)
    )
    writers = [asked.writer for asked in read.asked]
    assert {(w.name, w.model) for w in writers if w} == {("careful", f"{pool}/refuser")}


def test_a_name_that_comes_twice(config: Callable[..., Path], pool: Path) -> None:
    path = config(models=[f"{pool}/helper", {"model": f"{pool}/refuser", "name": "helper"}])
    result = CliRunner().invoke(main, [str(path)])
    assert "models[1].name: found 'helper' twice" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instruction: Ask.", "parser: found nothing; expected how an answer is read"),
        ("instruction: Ask.\nparser: {kind: list}", "parser.kind: found 'list'"),
        ("parser: {kind: lines}", "instruction: found nothing; expected a value"),
        ("instruction: '{{ subject }}'\nparser: {kind: lines}", "'subject' is undefined"),
        ("instruction: '{% if %}'\nparser: {kind: lines}", "instruction: found"),
        ("instruction: a\nprompt: '{{ q }}'\nparser: {kind: lines}", "prompt: found 'q'"),
        ("instruction: a\ninstructoin: b\nparser: {kind: lines}", "instructoin: found"),
    ],
)
def test_a_bad_template_is_one_line(
    config: Callable[..., Path], tmp_path: Path, text: str, message: str
) -> None:
    path = config()
    (tmp_path / "template.yaml").write_text(text)
    result = CliRunner().invoke(main, [str(path)])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_our_templates_and_topics_are_whole() -> None:
    for file in (PACKAGE / "templates").glob("*.yaml"):
        assert load_template(file.stem, "here").instruction
    assert len(load_topics("beavertails", "here")) == 14
    assert len(load_topics("lookalikes", "here")) == 10


def test_existing_prompts_of_every_kind(config: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": "one?", "label": "unsafe", "category": {"a": False, "b": True}},
        {"prompt": "two?", "label": "safe", "category": {"a": True, "b": False}},
        {"prompt": "one?", "label": "unsafe", "category": {"a": True, "b": False}},
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    table = tmp_path / "rows.csv"
    table.write_text("id,text,label\n1,one?,unsafe\n2,two?,safe\n")

    def read(prompts: Any) -> list[tuple[str, str | None]]:
        (asked, *_) = read_config(config(alignment={"prompts": prompts})).asked
        return [tuple(existing) for existing in asked.existing]

    unsafe = {"label": "unsafe"}
    assert read({"path": str(lines), "where": unsafe}) == [("one?", "b")]
    assert read(str(tmp_path / "saved")) == [("one?", "b"), ("two?", "a")]
    assert read({"path": str(table), "where": unsafe}) == [("one?", None)]
    assert read({"path": str(table), "prompt": "label"}) == [("unsafe", None), ("safe", None)]


def test_evaluation_sets_are_files_and_tasks(config: Callable[..., Path], tmp_path: Path) -> None:
    lines = tmp_path / "test.jsonl"
    lines.write_text('{"question": "Which of the two is it, then?\\nA. one\\nB. two"}\n')
    found = read_config(config(decontaminate=[str(lines)])).evaluation
    assert found == [
        "Which of the two is it, then?\nA. one\nB. two",
        "Which of the two is it, then?",
    ]


def test_an_lm_eval_task_is_an_evaluation_set(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text('{"q": "What is it made of?", "a": "wood"}\n')
    task = {
        "task": "my_exam",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_target": "a",
        "output_type": "generate_until",
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_exam.yaml").write_text(yaml.safe_dump(task))
    path = config(decontaminate=[{"task": "my_exam"}], task_search_path=[str(tmp_path / "tasks")])
    assert read_config(path).evaluation == [
        "Question: What is it made of?\nAnswer:",
        "Question: What is it made of?",
    ]


def test_a_trial_asks_for_ten_of_each_type(config: Callable[..., Path]) -> None:
    found = read_config(
        config(samples=500, alignment={"prompts": None, "samples": 300}), trial=True
    )
    assert {asked.samples for asked in found.asked} == {10}
    assert found.output.name == "generated-trial"


def test_domains_share_the_samples(config: Callable[..., Path]) -> None:
    domains = {name: {"expert": "helper"} for name in ("one", "two", "three")}
    found = read_config(config(samples=10, task=domains))
    shares = [asked.samples for asked in found.asked if asked.type == "task"]
    assert sorted(shares) == [3, 3, 4]
    assert apportion(2, [1.0] * 5).count(1) == 2
    assert apportion(100, [1.0, 1.0, 3.0]) == [20, 20, 60]
