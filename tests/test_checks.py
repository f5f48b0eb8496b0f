"""Bad input to `mergekit-evolve` is one line and exit status 2, before a model is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mergekit.scripts.evolve import main

ALIGNMENT = {"name": "response_alignment", "metric": "logprob,none"}
SAMPLE = {"prompt": "p", "response": "r", "type": "alignment"}


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the config was checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


def run(config: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(config), *options])


def test_missing_config(tmp_path: Path) -> None:
    assert_one_line(
        run(tmp_path / "none.yml"), "none.yml", "no such file", "expected a YAML config"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [("- a\n- b\n", "found list"), ("", "found NoneType"), ("a: [", "not YAML")],
)
def test_config_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "genomic.yml"
    path.write_text(text)
    assert_one_line(run(path), str(path), found)


def test_config_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "genomic.yml"
    path.write_bytes(b"a: \xff\n")
    assert_one_line(run(path), str(path), "not UTF-8")


def test_unknown_align_key(write_config: Callable[..., Path]) -> None:
    path = write_config(align={"batchsize": 3})
    assert_one_line(run(path), str(path), "align.batchsize", "unknown key", "'batch_size'")


@pytest.mark.parametrize(
    ("start", "parts"),
    [
        ({"wieght": 1.0}, ["align.start.wieght", "unknown parameter", "one of weight"]),
        ({"weight": float("inf")}, ["align.start.weight", "inf", "finite"]),
        ({"weight": "much"}, ["align.start.weight", "'much'", "number"]),
    ],
)
def test_start_of_no_parameter_or_no_number(
    write_config: Callable[..., Path], start: dict[str, Any], parts: list[str]
) -> None:
    path = write_config(align={"start": start})
    assert_one_line(run(path), str(path), *parts)


def test_align_value_of_the_wrong_type(write_config: Callable[..., Path]) -> None:
    path = write_config(align={"max_fevals": "many"})
    assert_one_line(run(path), str(path), "align.max_fevals", "'many'", "integer")


def test_unknown_task_names_the_closest(write_config: Callable[..., Path]) -> None:
    path = write_config(tasks=[{**ALIGNMENT, "name": "response_alignmen"}])
    assert_one_line(
        run(path), str(path), "tasks[0].name", "'response_alignmen'", "'response_alignment'"
    )


def test_unknown_metric_names_the_closest(write_config: Callable[..., Path]) -> None:
    path = write_config(tasks=[{**ALIGNMENT, "metric": "logprb,none"}])
    assert_one_line(run(path), str(path), "tasks[0].metric", "'logprb,none'", "'logprob,none'")


@pytest.mark.parametrize("weight", ["much", None])
def test_weight_that_is_no_number(write_config: Callable[..., Path], weight: Any) -> None:
    path = write_config(tasks=[{**ALIGNMENT, "weight": weight}])
    assert_one_line(run(path), str(path), "tasks.0.weight", repr(weight), "number")


def test_weight_that_is_nan(write_config: Callable[..., Path]) -> None:
    path = write_config(tasks=[{**ALIGNMENT, "weight": float("nan")}])
    assert_one_line(run(path), str(path), "tasks[0].weight", "nan", "a finite number")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["no samples"]),
        (b"\xff\xfe", ["not UTF-8"]),
        (json.dumps({"prompt": "p", "type": "task"}).encode(), [":1:", "response"]),
        (
            b"\n".join(json.dumps(s).encode() for s in (SAMPLE, {**SAMPLE, "type": "evil"})),
            [":2:", "type", "'evil'", "one of alignment, task, benign"],
        ),
        (b"not json", [":1:", "not JSON"]),
    ],
    ids=["empty", "not UTF-8", "no response", "unknown type", "not JSON"],
)
def test_bad_data(
    write_config: Callable[..., Path], tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    assert_one_line(run(write_config(align={"data": str(data)})), str(data), *parts)


def test_data_without_a_sample_of_the_tasks_type(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({**SAMPLE, "type": "task"}))
    assert_one_line(run(write_config(align={"data": str(data)})), "no alignment", "some, for task")


def test_a_decision_without_both_kinds_of_responses(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "refusals.jsonl"
    data.write_text(json.dumps(SAMPLE) + "\n")
    task = {**ALIGNMENT, "metric": "decision_acc,none"}
    path = write_config(tasks=[task], align={"data": str(data)})
    assert_one_line(run(path), "tasks[0].metric: found 'decision_acc,none'", "logprob,none")


def test_a_tag_reports_nothing_of_its_own(write_config: Callable[..., Path]) -> None:
    path = write_config(tasks=[{**ALIGNMENT, "name": "response"}])
    assert_one_line(run(path), "tasks[0].name: found response, of which lm-eval reports no metric")


def test_a_group_reports_what_it_aggregates(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [response_alignment, response_benign]\n"
        "aggregate_metric_list: [{metric: logprob}]\n"
    )
    task = {**ALIGNMENT, "name": "both", "metric": "logprb,none"}
    path = write_config(tasks=[task], align={"task_search_path": [str(tmp_path)]})
    assert_one_line(run(path), "tasks[0].metric: found 'logprb,none'; expected one of logprob,none")


def test_missing_data(write_config: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "none.jsonl"
    assert_one_line(run(write_config(align={"data": str(data)})), str(data), "no such file")


def test_no_data_at_all(write_config: Callable[..., Path]) -> None:
    assert_one_line(run(write_config(align={"data": None})), "data", "nothing", "a path")


def test_unknown_method_names_the_closest(write_config: Callable[..., Path]) -> None:
    path = write_config(genome={"merge_method": "tie"})
    assert_one_line(run(path), str(path), "genome.merge_method", "'tie'", "mean 'ties'")


def test_missing_base_model(write_config: Callable[..., Path]) -> None:
    path = write_config(genome={"base_model": None})
    assert_one_line(run(path), str(path), "genome.base_model", "nothing", "task_arithmetic needs")


def test_missing_model_directory(write_config: Callable[..., Path], world: Path) -> None:
    path = write_config(genome={"models": [f"{world}/aligned", f"{world}/nobody"]})
    assert_one_line(run(path), str(path), "genome.models[1]", f"no directory {world}/nobody")


def test_model_directory_without_weights(
    write_config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(world / "base" / "config.json", tmp_path / "empty")
    path = write_config(genome={"models": [f"{world}/aligned", f"{tmp_path}/empty"]})
    assert_one_line(run(path), str(path), "genome.models[1]", "no weights", "expected a model")


@pytest.mark.parametrize(
    ("field", "value"), [("architectures", ["GPT2LMHeadModel"]), ("hidden_size", 7)]
)
def test_models_that_do_not_fit_together(
    write_config: Callable[..., Path], world: Path, tmp_path: Path, field: str, value: Any
) -> None:
    shutil.copytree(world / "expert-a", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, field: value}))
    path = write_config(genome={"models": [f"{world}/aligned", f"{tmp_path}/other"]})
    assert_one_line(run(path), str(path), "genome.models[1]", field, str(value), str(config[field]))


def test_storage_path_that_cannot_be_written(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = write_config(align={"storage_path": f"{tmp_path}/file/evolved"})
    assert_one_line(run(path), str(path), "align.storage_path", "a writable directory")


def test_a_gpu_that_is_not_there(write_config: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path = write_config(align={"device": "cuda"})
    assert_one_line(run(path), str(path), "align.device", "no GPU", "cpu")
