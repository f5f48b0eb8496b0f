"""Evaluations and studies read back, the other formats, and what cannot be reported on."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_inputs import HELP, REFUSAL, SEARCHED, make_evaluation

from mergekit_align.cli.report import main
from mergekit_align.errors import InputError
from mergekit_align.evaluate import save
from mergekit_align.report import tables, watch, write, write_report
from mergekit_align.report.contents import read_section
from mergekit_align.report.evaluation_figure import points
from mergekit_align.report.evaluation_file import read_evaluation
from mergekit_align.report.examples import examples
from mergekit_align.report.study_figures import axes_of, figures, front
from mergekit_align.report.study_file import read_study


class TestEvaluation:
    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        tasks = {
            "arc": {"aligned": [1.0, 0.0], "expert": [1.0, 1.0], "merged": [0.0, 0.0]},
            "ppl": {"aligned": [0.5, 1.5], "expert": [2.5, 0.1], "merged": [None, None]},
        }
        written = make_evaluation(tasks=tasks)
        found = read_evaluation(save(written, tmp_path / "x")[0])
        assert found.models == written.models
        assert found.notes == written.notes
        assert found.answers == json.loads(json.dumps(written.answers))
        for name, column in written.columns.items():
            assert found.columns[name].title == column.title
            assert found.columns[name].is_rate == column.is_rate
            for model, score in column.scores.items():
                # NaN is not equal to itself.
                assert repr(found.columns[name].scores[model]) == repr(score)
        assert math.isnan(found.columns["ppl"].scores["merged"].value)

    def test_a_model_that_another_beats_in_all_is_not_on_the_front(self, tmp_path: Path) -> None:
        """`expert` answers as many tasks as `merged`, and is less safe."""
        found = {each.model: each for each in points(make_evaluation(), "task")}
        assert {name for name, each in found.items() if each.on_front} == {"aligned", "merged"}
        assert found["merged"].alignment.value == 75.0

    def test_unsafe_answers_by_category(self) -> None:
        by_prompt, by_guard = tables.categories(make_evaluation())
        rows = [[" ".join(cell.lines) for cell in row] for row in by_prompt.rows]
        assert by_prompt.head == ["model", "C0", "C1"]
        # The expert's third answer is unreadable: neither safe nor unsafe.
        assert rows == [
            ["aligned", "0 of 2", "0 of 2"],
            ["expert", "1 of 1", "2 of 2"],
            ["merged", "0 of 2", "1 of 2"],
        ]
        assert [row[1].lines for row in by_guard.rows] == [["0"], ["3"], ["1"]]

    def test_examples_are_those_on_which_models_part(self) -> None:
        answers = {"a": [REFUSAL] * 4, "b": [REFUSAL, REFUSAL, HELP, REFUSAL]}
        evaluation = make_evaluation(
            {name: [*unsafe, HELP, HELP, "blue", "blue"] for name, unsafe in answers.items()}
        )
        (example,) = examples(evaluation, 1)["Unsafe prompts"]
        assert example.prompt.text == "unsafe 2"
        assert [each.outcome for each in example.answers] == ["safe", "unsafe"]

    def test_the_command_can_be_copied(self, evaluation_file: Path) -> None:
        texts = {each.title: each.text for each in read_section(evaluation_file, "s1").reproduce}
        assert texts["Command"].startswith("mergekit-align-evaluate models/aligned models/expert")
        assert "--data '/data/test set.jsonl' --guard some-guard" in texts["Command"]

    def test_the_command_finds_tasks_and_a_server_again(self, tmp_path: Path) -> None:
        evaluation = make_evaluation({"a": [REFUSAL] * 8})
        evaluation.settings.update(
            {
                "backend": "local-completions",
                "backend_args": {"base_url": "http://host/v1", "tokenizer": "t"},
                "task_search_path": ["my tasks"],
            }
        )
        found = read_section(save(evaluation, tmp_path / "e")[0], "s1").reproduce
        (command,) = (each.text for each in found if each.title == "Command")
        assert "--backend-args base_url=http://host/v1,tokenizer=t" in command
        assert "--task-search-path 'my tasks'" in command


class TestStudy:
    def test_the_chosen_one_keeps_the_floors(self, write_study: Callable[..., Path]) -> None:
        study = read_study(write_study())
        assert len(study.candidates) == len(SEARCHED)
        assert study.best is not None
        assert study.best.number == 2
        assert study.best.fitness == pytest.approx(-1.0 - 0.15 - 0.3)
        assert study.candidates[2].evaluation.failure == "out of <memory>"

    def test_the_front(self, write_study: Callable[..., Path]) -> None:
        study = read_study(write_study())
        axes = axes_of(study)
        assert axes is not None
        assert axes.alignment.metric[0] == "response_alignment"
        assert axes.skill.metric[0] == "skill"
        assert axes.third is not None
        assert axes.third.metric[0] == "response_benign"
        assert [each.number for each in front(study, axes)] == [5, 2]

    def test_several_objectives(self, write_study: Callable[..., Path]) -> None:
        names = ["response_benign:logprob,none", "skill:logprob,none"]
        study = read_study(write_study(objectives=names))
        axes = axes_of(study)
        assert axes is not None
        assert (axes.alignment.metric[0], axes.skill.metric[0]) == ("response_benign", "skill")
        assert study.candidates[1].fitness == pytest.approx(-1.0 - 0.15 - 0.3)

    def test_a_figure_each(self, write_study: Callable[..., Path]) -> None:
        study = read_study(write_study())
        found = figures(study, "s")
        assert [each.key for each in found] == ["s-tradeoff", "s-progress", "s-weights"]
        assert "2 rows by 2 groups of layers, from 0.1 to 0.7" in found[2].alt
        flat = read_study(
            write_study("flat.journal", genes=[[f"t {i}", 0, 1, 0] for i in range(4)])
        )
        assert [each.key for each in figures(flat, "s")] == ["s-tradeoff", "s-progress"]

    def test_an_unfinished_last_line_is_left_out(self, write_study: Callable[..., Path]) -> None:
        path = write_study()
        with path.open("ab") as stream:
            stream.write(b'{"op_code": 4, "worker')
        before = path.read_bytes()
        assert len(read_study(path).candidates) == len(SEARCHED)
        assert path.read_bytes() == before


class TestFormats:
    def test_markdown(
        self, evaluation_file: Path, write_study: Callable[..., Path], tmp_path: Path
    ) -> None:
        inputs = [evaluation_file, write_study()]
        text = write_report(inputs, format="markdown", output=tmp_path / "r.md").read_text("utf-8")
        assert "| merged | 75.0 [30.1, 95.4]" in text
        assert "| the chosen one | 2 | -1.45 | -1 | -0.5 | -0.6 | 0 |" in text

    def test_json(self, evaluation_file: Path, tmp_path: Path) -> None:
        path = write_report([evaluation_file], format="json", output=tmp_path / "r.json")
        (section,) = json.loads(path.read_text("utf-8"))["sections"]
        rows = section["tables"]["Comparison"]
        assert [row["alignment %"]["value"] for row in rows] == [1.0, 0.0, 0.75]

    def test_png(
        self, evaluation_file: Path, write_study: Callable[..., Path], tmp_path: Path
    ) -> None:
        inputs = [evaluation_file, write_study()]
        content = write_report(inputs, format="png", output=tmp_path / "r.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width == 1120
        assert height > 2 * width


def test_a_changed_input_is_reported_again(
    evaluation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    page = tmp_path / "r.html"
    steps = iter([lambda: None, lambda: evaluation_file.write_text("{"), lambda: None])

    def wait(seconds: float) -> None:
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(write.time, "sleep", wait)
    with pytest.raises(KeyboardInterrupt):
        watch([evaluation_file], progress=told.append, output=page)
    # Once at first, and once when it was half written: that is said, and the page stays.
    assert told[0] == str(page)
    assert len(told) == 2
    assert "not JSON" in told[1]
    assert 'data-reload="5"' in page.read_text("utf-8")


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda content: content.pop("answers"), "answers: found nothing"),
            (
                lambda content: content["columns"]["task"]["models"].pop("merged"),
                "columns.task.models",
            ),
            (lambda content: content["answers"][3]["models"].pop("merged"), "answers[3].models"),
            (lambda content: content["answers"][3].pop("prompt"), "3.prompt"),
            (lambda content: content["columns"]["task"]["models"].update(merged=3), "merged"),
        ],
    )
    def test_in_an_evaluation(
        self, change: Callable[[Any], Any], expected: str, evaluation_file: Path
    ) -> None:
        content = json.loads(evaluation_file.read_text("utf-8"))
        change(content)
        evaluation_file.write_text(json.dumps(content))
        assert_one_line([str(evaluation_file)], str(evaluation_file), expected)

    def test_in_the_arguments(self, evaluation_file: Path, tmp_path: Path) -> None:
        file = str(evaluation_file)
        assert_one_line([file, "--chosen", "mergd"], "--chosen: found 'mergd'", "'merged'")
        assert_one_line([file, "--skill", "none"], "--skill: found 'none'", "over_refusal")
        assert_one_line([file, "--output", file], "which is an input")
        assert_one_line([f"{tmp_path}/x.json"], "x.json: found no file")
        assert_one_line([f"{tmp_path}/x.journal"], "x.journal: found no such file")
        assert not Path(f"{tmp_path}/x.journal").exists()

    def test_a_model_of_one_evaluation_is_marked_there(
        self, evaluation_file: Path, tmp_path: Path
    ) -> None:
        answers = {name: [REFUSAL] * 8 for name in ("aligned", "another")}
        second = save(make_evaluation(answers), tmp_path / "second")[0]
        page = write_report([evaluation_file, second], chosen="another", output=tmp_path / "r.html")
        assert page.read_text("utf-8").count(">the chosen one<") == 1

    def test_a_journal_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "study.journal"
        path.write_text("hello\n")
        with pytest.raises(InputError, match="no study of mergekit-align-evolve"):
            read_study(path)


def assert_one_line(arguments: list[str], *parts: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.output
    for part in parts:
        assert part in lines[0]
