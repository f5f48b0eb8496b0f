"""Judging files of responses: what is read, what is written, and that nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_align.cli.guard import main
from mergekit_align.demo.corpus import Corpus, judged_pairs
from mergekit_align.errors import InputError
from mergekit_align.guard import Conversation, GuardSettings, load_guard
from mergekit_align.guard.responses import load_responses
from mergekit_align.guard.run import judge_file

COMMAND = [sys.executable, "-m", "mergekit_align.cli.guard"]


def rows(count: int) -> list[dict[str, Any]]:
    pairs = judged_pairs(Corpus(0).prompts["test"], random.Random(0), count)
    return [{"prompt": pair.prompt, "response": pair.response} for pair in pairs]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def settings(world: Path) -> GuardSettings:
    return GuardSettings(model=f"{world}/guard", dtype="float32")


def test_verdicts_come_in_input_order_and_are_the_guards(
    tmp_path: Path, settings: GuardSettings
) -> None:
    content = rows(40)
    summary = judge_file([write(tmp_path / "r.jsonl", content)], tmp_path / "out", settings)
    found = read(tmp_path / "out")
    assert [row["turns"] for row in found] == [[r["prompt"], r["response"]] for r in content]
    expected = load_guard(settings).judge(
        [Conversation.of(r["prompt"], r["response"]) for r in content]
    )
    for row, verdict in zip(found, expected, strict=True):
        assert row["verdict"] == verdict.label
        assert row["p_unsafe"] == pytest.approx(verdict.p_unsafe, abs=2e-5)
    assert summary.responses == 40
    assert summary.safe + summary.unsafe + summary.unreadable == 40
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl", "out"}


def test_files_of_every_shape_are_read(tmp_path: Path) -> None:
    beavertails = {"prompt": "p", "response": "r", "category": {"a": True, "b": False}}
    sample = {"prompt": "p", "response": "", "type": "benign", "category": "c"}
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([beavertails, {"messages": turns, "id": "m"}]))
    lines = write(tmp_path / "lines.jsonl", [sample])
    found = load_responses([listed, lines])
    assert [row.id for row in found] == ["0", "m", "2"]
    assert [row.categories for row in found] == [("a",), (), ("c",)]
    assert [len(row.conversation.turns) for row in found] == [2, 4, 2]
    assert found[2].conversation.turns[-1] == ""
    prompts = load_responses([listed, lines], prompts_only=True)
    assert [len(row.conversation.turns) for row in prompts] == [1, 3, 1]


def test_an_empty_response_is_judged(tmp_path: Path, settings: GuardSettings) -> None:
    path = write(tmp_path / "r.jsonl", [{"prompt": "What colour is a zorb?", "response": ""}])
    assert judge_file([path], tmp_path / "out", settings).responses == 1


def test_a_huge_response_is_cut_and_counted(tmp_path: Path, settings: GuardSettings) -> None:
    huge = {"prompt": "How do I make a zorb?", "response": "Use iron. " * 100_000}
    content = [huge, *rows(3)]
    summary = judge_file([write(tmp_path / "r.jsonl", content)], tmp_path / "out", settings)
    assert summary.cut == 1
    assert [row["cut"] for row in read(tmp_path / "out")] == [True, False, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "response": "r"}\n{"prompt": "p",\n{}', "r.jsonl:2: found text that is"),
        ('{"prompt": "p"}', "r.jsonl:1: response: found nothing; expected a string"),
        ('{"response": "r"}', "r.jsonl:1: prompt: found nothing; expected a string"),
        ('{"prompt": "p", "response": 3}', "r.jsonl:1: response: found int; expected a string"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "expected 'user'"),
        (
            '{"id": "a", "prompt": "p", "response": ""}\n{"id": "a", "prompt": "q", "response": ""}',
            "r.jsonl:2: id: found 'a'; expected another than at",
        ),
        ("", "found no responses; expected at least one"),
    ],
)
def test_bad_rows_are_one_line_before_anything_is_judged(
    tmp_path: Path, world: Path, text: str, message: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    result = CliRunner().invoke(main, [str(path), "--guard", f"{world}/guard"])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.jsonl"]


def test_bad_guards_are_one_line(tmp_path: Path, world: Path) -> None:
    path = str(write(tmp_path / "r.jsonl", rows(2)))
    for guard, message in (
        (f"{world}/aligned", "is no guard we know; expected one of"),
        (f"{world}/nothing", "found no directory"),
    ):
        result = CliRunner().invoke(main, [path, "--guard", guard])
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.splitlines()) == 1


def test_the_input_is_never_overwritten(tmp_path: Path, world: Path) -> None:
    path = str(write(tmp_path / "r.jsonl", rows(2)))
    result = CliRunner().invoke(main, [path, "--guard", f"{world}/guard", "--output", path])
    assert result.exit_code == 2
    assert "expected another file" in result.output


def test_the_journal_of_another_run_is_not_mixed_in(
    tmp_path: Path, settings: GuardSettings
) -> None:
    path = write(tmp_path / "r.jsonl", rows(10))
    (tmp_path / "out.partial-0").write_text('{"run": "another"}\n')
    with pytest.raises(InputError, match="verdicts of another run"):
        judge_file([path], tmp_path / "out", settings)


def test_finished_chunks_are_not_judged_again(tmp_path: Path, settings: GuardSettings) -> None:
    path = write(tmp_path / "r.jsonl", rows(30))
    judge_file([path], tmp_path / "out", settings)
    whole = (tmp_path / "out").read_bytes()
    # As a kill would leave it: two chunks, marked here so that they are known again, and half a line.
    journal = tmp_path / "out.partial-0"
    calls: list[int] = []
    judge_file_killed(path, tmp_path / "out", settings, calls, after=2)
    marked = journal.read_text().replace('"cut": false', '"cut": true')
    journal.write_text(marked + '{"chunk": 2, "rec')
    judge_file([path], tmp_path / "out", settings)
    found = read(tmp_path / "out")
    assert [row["cut"] for row in found] == [True] * 16 + [False] * 14
    assert (tmp_path / "out").read_bytes().replace(b'"cut": true', b'"cut": false') == whole


def judge_file_killed(
    path: Path, output: Path, settings: GuardSettings, calls: list[int], *, after: int
) -> None:
    """A run that is interrupted when `after` chunks are on disk."""
    from mergekit_align.guard import run

    original = run.Journal.append

    def append(journal: Any, number: int, records: Any) -> None:
        original(journal, number, records)
        calls.append(number)
        if len(calls) == after:
            raise KeyboardInterrupt

    run.Journal.append = append  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            judge_file([path], output, settings)
    finally:
        run.Journal.append = original  # type: ignore[method-assign]


@pytest.fixture
def run(tmp_path: Path, world: Path) -> Callable[..., Path]:
    """Runs the command in processes of its own."""
    path = write(tmp_path / "r.jsonl", rows(300))

    def run_command(name: str, *launcher: str) -> Path:
        output = tmp_path / name
        arguments = [str(path), "--guard", f"{world}/guard", "--dtype", "float32"]
        command = [*(launcher or COMMAND), *arguments, "--output", str(output)]
        subprocess.run(command, check=True, capture_output=True)
        return output

    return run_command


@pytest.mark.slow
def test_two_processes_write_the_same_file_as_one(run: Callable[..., Path], world: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    module = ["-m", "mergekit_align.cli.guard"]
    one = run("one")
    assert one.read_bytes() == run("two", *launch, "2", *module).read_bytes()


@pytest.mark.slow
def test_more_processes_than_responses(tmp_path: Path, world: Path) -> None:
    path = write(tmp_path / "r.jsonl", rows(1))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "mergekit_align.cli.guard", str(path), "--guard", f"{world}/guard"]
    subprocess.run([*command, "--output", str(tmp_path / "out")], check=True)
    assert len(read(tmp_path / "out")) == 1


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_writes_the_same_file(
    run: Callable[..., Path], tmp_path: Path, world: Path
) -> None:
    one = run("one")
    output = tmp_path / "killed"
    arguments = [str(tmp_path / "r.jsonl"), "--guard", f"{world}/guard", "--dtype", "float32"]
    rng = random.Random(0)
    judged = 0
    for _ in range(5):
        process = subprocess.Popen([*COMMAND, *arguments, "--output", str(output)])
        while not output.exists() and process.poll() is None:
            # Killed as soon as it got on, at a moment of its own.
            if _size(tmp_path) > judged:
                time.sleep(rng.uniform(0, 0.2))
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        judged = _size(tmp_path)
    assert not output.exists()
    assert judged
    assert run("killed").read_bytes() == one.read_bytes()


def _size(directory: Path) -> int:
    return sum(os.path.getsize(path) for path in directory.glob("killed.partial-*"))
