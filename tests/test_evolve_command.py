"""`mergekit-evolve CONFIG` with no other option; what the config says, what the command line says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from click.testing import CliRunner
from lm_eval.tasks import TaskManager
from mergekit.scripts.evolve import main

from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.evolve_command import prepare

EVOLVE = str(Path(sys.executable).with_name("mergekit-evolve"))


def evolve(config: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EVOLVE, str(config), *options],
        capture_output=True,
        text=True,
        cwd=config.parent,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_literal_command_writes_the_best_merge(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(align={"in_memory": True, "random_seed": 3})
    result = evolve(config)
    assert result.returncode == 0, result.stderr[-3000:]
    best = yaml.safe_load((tmp_path / "evolved" / "best_config.yaml").read_text())
    assert best["merge_method"] == "task_arithmetic"
    final = tmp_path / "evolved" / "final_model"
    assert (final / "config.json").is_file()
    assert list(final.glob("*.safetensors"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"genomic.yml", "evolved"}


@pytest.mark.slow
def test_a_guards_judgement_may_be_the_fitness(
    write_config: Callable[..., Path], tmp_path: Path, world: Path
) -> None:
    (tmp_path / "short.yaml").write_text(
        "task: short\n"
        "class: !function mergekit_align.tasks.GuardTask\n"
        "sample_type: alignment\n"
        "generation_kwargs: {max_gen_toks: 8, until: [], do_sample: false}\n"
    )
    config = write_config(
        tasks=[{"name": "short", "metric": "p_safe,none", "weight": 1.0}],
        align={
            "guard": {"model": f"{world}/guard"},
            "task_search_path": [str(tmp_path)],
            "in_memory": True,
            "batch_size": 8,
        },
    )
    result = evolve(config)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "evolved" / "final_model" / "config.json").is_file()


@pytest.mark.slow
def test_a_users_own_task_works_in_three_places(
    write_config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "my tasks"
    directory.mkdir()
    shutil.copy(world / "data" / "validation.jsonl", directory / "mine.jsonl")
    (directory / "mine.yaml").write_text(
        f"include: {eval_tasks_path()}/responses/response_alignment.yaml\n"
        "task: mine\n"
        "data: mine.jsonl\n"
    )

    python = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": f"{world}/base", "dtype": "float32", "device": "cpu"},
        tasks=["mine"],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        apply_chat_template=True,
        limit=8,
    )["results"]["mine"]["logprob,none"]

    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={world}/base,dtype=float32", "--limit", "8"]
    command += ["--include_path", str(directory), "--tasks", "mine", "--apply_chat_template"]
    command += ["--output_path", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True)
    (results,) = (tmp_path / "results").rglob("results*.json")
    shell = json.loads(results.read_text())["results"]["mine"]["logprob,none"]
    assert shell == pytest.approx(python, abs=1e-5)

    config = write_config(tasks=[{"name": "mine", "metric": "logprob,none"}], align={"data": None})
    evolved = evolve(config, "--task-search-path", str(directory), "--no-save-final-model")
    assert evolved.returncode == 0, evolved.stderr[-3000:]
    assert (tmp_path / "evolved" / "best_config.yaml").is_file()
    assert not (tmp_path / "evolved" / "final_model").exists()


def options_of(config: Path, *explicit: str, **given: Any) -> dict[str, Any]:
    context = main.make_context("mergekit-evolve", [str(config)])
    options = {**context.params, **given}
    prepare(options, explicit)
    return options


def test_an_explicit_option_wins(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(align={"max_fevals": 7, "batch_size": 3})
    assert options_of(config)["max_fevals"] == 7
    here = str(tmp_path / "here")
    options = options_of(config, "max_fevals", "storage_path", max_fevals=2, storage_path=here)
    assert (options["max_fevals"], options["storage_path"]) == (2, here)
    assert options["batch_size"] == 3


def test_the_users_task_directories_come_on_top_of_ours(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(align={"task_search_path": ["from-config"]})
    options = options_of(config, "task_search_path", task_search_path=("from-command-line",))
    ours, *theirs = options["task_search_path"]
    assert Path(ours).name == "eval_tasks"
    assert theirs == ["from-config", "from-command-line"]


def test_without_an_align_section_every_option_is_stocks(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config()
    content = yaml.safe_load(config.read_text())
    del content["align"]
    content["tasks"] = ["own"]
    config.write_text(yaml.safe_dump(content))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: own.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: q\n"
        "doc_to_choice: [a, b]\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "own.jsonl").write_text('{"q": "which"}\n')
    stock = main.make_context("mergekit-evolve", [str(config)]).params
    options = options_of(config, "task_search_path", task_search_path=(str(tmp_path),))
    ours = {"storage_path", "task_search_path", "merge_cuda", "num_gpus"}
    assert {k: v for k, v in options.items() if k not in ours} == {
        k: v for k, v in stock.items() if k not in ours
    }
    assert options["storage_path"] == "genomic-evolved"


def test_a_fitness_without_alignment_gets_one_line(
    write_config: Callable[..., Path], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tasks=[{"name": "response_task", "metric": "logprob,none"}])
    options_of(config)
    assert capsys.readouterr().err == f"{config}: tasks: none of them scores alignment\n"
    options_of(write_config())
    assert capsys.readouterr().err == ""


def test_help_of_the_stock_command_still_lists_its_options() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "--task-search-path" in result.output


@pytest.mark.slow
def test_the_same_seed_finds_the_same_merge(write_config: Callable[..., Path]) -> None:
    configs = []
    for _ in range(2):
        config = write_config(align={"in_memory": True, "save_final_model": False, "workers": 1})
        assert evolve(config).returncode == 0
        best = config.parent / "evolved" / "best_config.yaml"
        configs.append(best.read_text())
        best.unlink()
    assert configs[0] == configs[1]
