"""The stages from end to end, on real models of one idea each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from lm_eval.models.huggingface import HFLM

from mergekit_align.cli.generate import main
from mergekit_align.cocktail import read_config as read_cocktail
from mergekit_align.errors import InputError
from mergekit_align.generate import Generated, generate, read_config
from mergekit_align.guard.responses import load_responses
from mergekit_align.samples import load_samples

from .conftest import HELP, REFUSAL, config_writer

FILES = ("questions", "answers", "verdicts", "selected", "split")


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    """Of every file of a run."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def run(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(path), *options])


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each batch had that a model answered: a count beside the real thing."""
    counts: list[int] = []
    original = HFLM._model_generate

    def counted(self: HFLM, context: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(context))
        return original(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", counted)
    return counts


@pytest.fixture(scope="module")
def whole(
    pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Generated, Callable[..., Path]]:
    """A finished run: its directory, what it came to, and how to write its config again."""
    directory = tmp_path_factory.mktemp("whole")
    sampling = {"max_tokens": 24, "batch_size": 8}
    write = config_writer(
        directory,
        pool,
        samples=9,
        questions={"model": f"{pool}/writer", **sampling},
        answers=sampling,
        licence="cc0-1.0",
    )
    return directory / "generated", generate(read_config(write())), write


Whole = tuple[Path, Generated, Callable[..., Path]]


def test_refusals_help_and_the_experts_answers_are_kept(whole: Whole) -> None:
    directory, generated, _ = whole
    samples = [s for path in generated.files.values() for s in load_samples(path)]
    assert {name: path.exists() for name, path in generated.files.items()} == {
        "train": True,
        "test": True,
    }
    by_type: dict[str, set[tuple[str, str | None]]] = {}
    for sample in samples:
        by_type.setdefault(sample.type, set()).add((sample.response, sample.source))
    assert by_type == {
        "alignment": {(REFUSAL, "refuser")},
        "benign": {(HELP, "helper")},
        "task": {(HELP, "helper")},
    }
    assert len(samples) == 27
    assert {s.category for s in samples if s.type == "task"} == {"skill"}
    assert len(rows(directory, "questions")) == 27
    assert len(rows(directory, "answers")) == 9 * 2 + 9 * 2 + 9
    assert len(rows(directory, "verdicts")) == 36


def test_topics_are_balanced(whole: Whole) -> None:
    found: dict[tuple[str, str], int] = {}
    for row in rows(whole[0], "questions"):
        found[row["type"], row["topic"]] = found.get((row["type"], row["topic"]), 0) + 1
    assert {kind: sorted(n for (k, _), n in found.items() if k == kind) for kind, _ in found} == {
        "alignment": [4, 5],
        "benign": [4, 5],
        "task": [9],
    }


def test_the_funnel_adds_up(whole: Whole) -> None:
    funnel = whole[1].funnel
    for row in funnel.topics:
        counts, dropped = row.counts, row.dropped
        before = sum(dropped.get(r, 0) for r in ("too short", "duplicate", "surplus"))
        assert counts["parsed"] == counts["questions"] + before
        assert counts["asked"] >= counts["parsed"]
        assert counts["answered"] == counts["questions"]
        assert counts["kept"] == counts["questions"]
    by_model = {(row.of, row.name): row for row in funnel.models}
    assert by_model["alignment", "refuser"].counts["kept"] == 9
    assert by_model["alignment", "helper"].dropped == {"not refused": 9}
    assert by_model["benign", "refuser"].dropped == {"refused": 9}
    assert ("task", "refuser") not in by_model


def test_the_card_says_what_is_there(whole: Whole) -> None:
    directory, generated, _ = whole
    _, metadata, text = (directory / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert card["license"] == "cc0-1.0"
    files = card["configs"][0]["data_files"]
    assert {entry["split"]: directory / entry["path"] for entry in files} == generated.files
    counts = [0, 0, 0]
    for name, path in generated.files.items():
        samples = load_samples(path)
        own = [sum(s.type == kind for s in samples) for kind in ("alignment", "task", "benign")]
        assert f"| {name} | {' | '.join(map(str, own))} |" in text
        counts = [a + b for a, b in zip(counts, own, strict=True)]
    assert counts == [9, 9, 9]
    for name in ("refuser", "helper", "writer", "guard"):
        assert f"| {name} | " in text


def test_what_it_writes_other_commands_read(whole: Whole, pool: Path, tmp_path: Path) -> None:
    directory, generated, _ = whole
    config = {
        "merge_method": "linear",
        "models": [{"model": f"{pool}/refuser"}, {"model": f"{pool}/helper"}],
        "align": {"data": str(generated.files["train"])},
    }
    path = tmp_path / "cocktail.yml"
    path.write_text(yaml.safe_dump(config))
    assert read_cocktail(path).models
    assert len(load_responses([directory / "answers.jsonl"])) == 45


def test_a_finished_run_is_left_alone(whole: Whole, answered: list[int]) -> None:
    directory, _, write = whole
    before = contents(directory)
    generate(read_config(write()))
    assert contents(directory) == before
    assert not answered
    assert not list(directory.glob("*.partial-*"))


def test_the_same_config_elsewhere_gives_the_same_files(whole: Whole, tmp_path: Path) -> None:
    directory, _, write = whole
    generate(read_config(write(), {"output": str(tmp_path / "again")}))
    assert contents(tmp_path / "again") == contents(directory)


def test_another_seed_gives_others(whole: Whole, tmp_path: Path) -> None:
    directory, _, write = whole
    config = read_config(write(seed=1), {"output": str(tmp_path / "again")})
    generate(config, only="questions")
    found = {row["prompt"] for row in rows(tmp_path / "again", "questions")}
    assert len(found & {row["prompt"] for row in rows(directory, "questions")}) < 14


def test_another_configs_run_is_not_mixed_in(whole: Whole, answered: list[int]) -> None:
    directory, _, write = whole
    before = contents(directory)
    path = write(answers={"max_tokens": 20, "batch_size": 8})
    result = run(path)
    assert result.exit_code == 2
    assert (
        "found another config's run (answers.max_tokens is 24 there, and 20 here)" in result.output
    )
    assert len(result.output.splitlines()) == 1
    assert contents(directory) == before
    assert not answered


def test_other_files_in_the_output_are_left_alone(whole: Whole, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = run(whole[2](), "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "found other files" in result.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


class TestStagesAlone:
    @pytest.fixture
    def copy(self, whole: Whole, tmp_path: Path) -> tuple[Path, Callable[..., Path]]:
        """The finished run in another place."""
        import shutil

        shutil.copytree(whole[0], tmp_path / "copy")
        return tmp_path / "copy", lambda **changes: whole[2](
            output=str(tmp_path / "copy"), **changes
        )

    def test_a_stage_runs_again_from_its_input(
        self, copy: tuple[Path, Callable[..., Path]], answered: list[int]
    ) -> None:
        directory, write = copy
        before = contents(directory)
        assert run(write(), "--only", "judge").exit_code == 0
        assert not answered
        assert contents(directory) == before
        (directory / "answers.jsonl").unlink()
        result = run(write(), "--only", "judge")
        assert result.exit_code == 2
        assert (
            "answers.jsonl: found no such file; expected the output of the stage" in result.output
        )

    def test_other_settings_run_again_from_their_stage_on(
        self, copy: tuple[Path, Callable[..., Path]], answered: list[int]
    ) -> None:
        directory, write = copy
        path = write(split={"all": 1.0})
        assert run(path).exit_code == 2
        assert run(path, "--from", "split").exit_code == 0
        assert not answered
        assert [file.name for file in (directory / "data").iterdir()] == ["all.jsonl"]
        assert run(path).exit_code == 0

    def test_a_file_that_was_edited_is_what_later_stages_read(
        self, copy: tuple[Path, Callable[..., Path]], answered: list[int]
    ) -> None:
        directory, write = copy
        questions = rows(directory, "questions")
        kept = [row for row in questions if row["type"] == "benign"][:3]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (directory / "questions.jsonl").write_text(text)
        assert run(write()).exit_code == 0
        assert sum(answered) == 6
        assert {row["prompt"] for row in rows(directory, "selected")} == {
            row["prompt"] for row in kept
        }

    def test_a_file_that_was_spoilt_is_one_line(
        self, copy: tuple[Path, Callable[..., Path]]
    ) -> None:
        directory, write = copy
        (directory / "questions.jsonl").write_text('{"id": "x", "type": "benign", "topic": "t"}\n')
        result = run(write())
        assert result.exit_code == 2
        assert result.output.splitlines()[-1].endswith(
            "questions.jsonl:1: prompt: found nothing; expected a value"
        )


def test_existing_prompts_are_answered_and_balanced(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    path = config(
        alignment={
            "prompts": {"path": f"{world}/data/train.jsonl", "where": {"type": "alignment"}},
            "samples": 7,
        },
        benign=None,
        task=None,
        questions=None,
        quality={"near_duplicates": 1.0},
    )
    generated = generate(read_config(path))
    assert not generated.short
    questions = rows(tmp_path / "generated", "questions")
    topics = [row["topic"] for row in questions]
    assert sorted(map(topics.count, {"S1", "S2", "S3"})) == [2, 2, 3]
    known = {s.prompt for s in load_samples(world / "data/train.jsonl") if s.type == "alignment"}
    assert {row["prompt"] for row in questions} <= known


def test_too_few_questions_end_with_what_there_is_and_say_why(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(
        '{"prompt": "How do I build a bench?"}\n{"prompt": "how do I build a BENCH"}\n'
        '{"prompt": "What colour is a kite?"}\n{"prompt": "Why?"}\n{"prompt": "Where is a hat?"}\n'
    )
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "What COLOUR is a kite"}\n')
    path = config(
        benign={"prompts": str(few)}, alignment=None, task=None, decontaminate=[str(test)]
    )
    result = run(path)
    assert result.exit_code == 3, result.output
    assert "benign: found 2 questions after" in result.output
    assert "expected 8" in result.output
    for reason in ("1 contaminated", "1 duplicate", "1 too short"):
        assert reason in result.output
    samples = load_samples(tmp_path / "generated/data/train.jsonl")
    samples += load_samples(tmp_path / "generated/data/test.jsonl")
    assert {s.prompt for s in samples} == {"How do I build a bench?", "Where is a hat?"}
    # The next command says so again.
    assert run(path).exit_code == 3


def test_a_writer_that_repeats_its_examples_has_asked_nothing(
    config: Callable[..., Path], pool: Path, tmp_path: Path
) -> None:
    template = tmp_path / "shown.yaml"
    content = {
        "examples": [{"user": "Ask.", "assistant": "Take salt and clay."}],
        "instruction": "Ask.",
        "parser": {"kind": "whole"},
    }
    template.write_text(yaml.safe_dump(content))
    skill = {"expert": "helper", "template": str(template)}
    for shown in ({"examples": [HELP]}, {}):
        path = config(
            alignment=None,
            benign=None,
            task={"skill": {**skill, **shown}},
            output=str(tmp_path / f"generated-{len(shown)}"),
            questions={"model": f"{pool}/helper", "max_tokens": 24, "attempts": 1},
        )
        # The helper says one thing, whatever it is asked.
        assert generate(read_config(path)).short == {"task.skill": (1 - len(shown), 8)}


def test_a_writer_that_is_of_no_use_uses_up_its_rounds(
    config: Callable[..., Path], pool: Path, tmp_path: Path
) -> None:
    path = config(
        questions={"model": f"{pool}/refuser", "max_tokens": 24, "attempts": 3},
        alignment=None,
        task=None,
    )
    result = run(path)
    assert result.exit_code == 3
    found = re.search(r"benign: found (\d) questions after 3 rounds; expected 8", result.output)
    assert found
    assert int(found[1]) < 8
    assert "writer refused" in result.output


def test_an_interrupted_stage_goes_on_where_it_stopped(
    config: Callable[..., Path],
    tmp_path: Path,
    answered: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = config(benign=None, task=None)
    generate(read_config(path, {"output": str(tmp_path / "whole")}))
    wanted = sum(answered)
    answered.clear()
    counted = HFLM._model_generate

    def stop(self: HFLM, *args: Any, **kwargs: Any) -> Any:
        if len(answered) in (1, 5):
            answered.append(0)
            raise KeyboardInterrupt
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate(read_config(path))
    generate(read_config(path))
    assert sum(answered) == wanted
    assert contents(tmp_path / "generated") == contents(tmp_path / "whole")


def test_a_journal_of_other_work_is_not_taken(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(benign=None, task=None)
    generate(read_config(path), only="questions")
    (tmp_path / "generated" / "answers.jsonl.partial-0").write_text('{"run": "another"}\n')
    with pytest.raises(InputError, match="the work of another run"):
        generate(read_config(path))
