"""The search end to end on the demo world: what it finds, remembers and refuses."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from lm_eval.tasks import TaskManager
from mergekit.config import MergeConfiguration
from mergekit.evo.helpers import _eval_model
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_align.cli.evolve import main
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.evolve import EvolveConfig, SearchError, read_config, search
from mergekit_align.evolve.candidate import Evaluator
from mergekit_align.evolve.study import read_study

WriteConfig = Callable[..., Path]


def same(one: Any, other: Any) -> bool:
    """Whether two evaluations are equal, the time that they took aside."""
    return np.array_equal(one.genotype, other.genotype) and all(
        getattr(one, name) == getattr(other, name)
        for name in ("asked", "asks", "values", "violations", "results", "seed", "failure")
    )


def test_the_fitness_is_what_the_stock_search_has_for_the_merged_model(
    write_config: WriteConfig, tmp_path: Path, world: Path
) -> None:
    (tmp_path / "short.yaml").write_text(
        "task: short\n"
        "class: !function mergekit_align.tasks.RefusalTask\n"
        "sample_type: benign\n"
        "generation_kwargs: {max_gen_toks: 6, until: [], do_sample: false}\n"
    )
    path = write_config(
        tasks=[
            {"name": "response_alignment", "metric": "decision_logprob,none", "weight": 1.0},
            {"name": "response_task", "metric": "logprob,none", "weight": 0.3},
            {"name": "short", "metric": "full_compliance,none", "weight": 0.5},
        ],
        align={"batch_size": 8, "task_search_path": [str(tmp_path)]},
    )
    config = read_config(path)
    evaluator = Evaluator(config)
    evaluator.evaluate(np.array([0.2, 0.1]))  # nothing of it may be left
    genotype = np.array([0.8, 0.9])
    found = evaluator.evaluate(genotype)
    run_merge(config.genes.config(genotype), str(tmp_path / "merged"), MergeOptions(quiet=True))
    manager = TaskManager(
        include_path=[str(eval_tasks_path()), str(tmp_path)],
        include_defaults=False,
        metadata={"data": f"{world}/data/validation.jsonl"},
    )
    stock = _eval_model(
        "huggingface",
        config.file.config.tasks,
        {"pretrained": str(tmp_path / "merged"), "dtype": "float32"},
        task_manager=manager,
        limit=8,
        batch_size=8,
        device="cpu",
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    assert found.values == (pytest.approx(stock["score"], abs=1e-5),)
    assert found.failure is None


def test_a_search_leaves_a_plain_config_and_a_model(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, [str(write_config()), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "4/4, best" in result.output
    best = yaml.safe_load((tmp_path / "evolved" / "best_config.yml").read_text())
    assert MergeConfiguration.model_validate(best).merge_method == "task_arithmetic"
    assert list((tmp_path / "out").glob("*.safetensors"))
    evaluations = read_study(str(tmp_path / "evolved" / "study.journal"))[1]
    top = max(evaluations, key=lambda each: each.values or (-math.inf,))
    weights = [
        source["parameters"]["weight"]
        for source in best["slices"][0]["sources"]
        if "parameters" in source
    ]
    assert weights == top.genotype.tolist()


def test_a_dry_run_says_what_would_be_searched(write_config: WriteConfig, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(write_config()), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "weight (aligned)" in result.output
    assert "2 genes, searched by cma" in result.output
    assert "4 take" in result.output
    assert not (tmp_path / "evolved" / "study.journal").exists()


def test_a_resumed_study_is_the_uninterrupted_one(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    path = write_config()
    whole = search(read_config(path, storage=tmp_path / "whole", evaluations=9))
    evaluator = Evaluator(read_config(path, storage=tmp_path / "parts"))
    for count in (2, 3, 7, 9):
        config = read_config(path, storage=tmp_path / "parts", evaluations=count)
        parts = search(config, resume=True, evaluator=lambda: evaluator)
        assert len(parts.evaluations) == count
    assert len(whole.evaluations) == 9
    assert all(map(same, whole.evaluations, parts.evaluations))


def _search(path: Path, storage: Path, seed: int) -> None:
    torch.set_num_threads(1)
    search(read_config(path, storage=storage, evaluations=60, seed=seed), resume=True)


@pytest.mark.slow
def test_twenty_kills_change_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config()
    whole = search(read_config(path, storage=tmp_path / "whole", evaluations=60))
    one_evaluation = statistics.median(each.seconds for each in whole.evaluations)
    context = multiprocessing.get_context("fork")
    rng, kills = random.Random(0), 0
    journal = tmp_path / "killed" / "study.journal"
    while True:
        child = context.Process(target=_search, args=(path, tmp_path / "killed", 0))
        child.start()
        if kills < 20:
            deadline = time.monotonic() + 30
            before = journal.stat().st_size if journal.exists() else 0
            while time.monotonic() < deadline and child.is_alive():
                if journal.exists() and journal.stat().st_size > before:
                    break
                time.sleep(0.005)
            time.sleep(rng.random() * 2 * one_evaluation)
            assert child.pid is not None
            assert child.is_alive()
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
            continue
        child.join()
        assert child.exitcode == 0
        break
    killed = read_study(str(journal))[1]
    assert len(killed) == 60
    assert all(map(same, whole.evaluations, killed))


@pytest.mark.parametrize("end", ['{"op_code": 4, "wor', '{"op_code": 4, "wor\n', "\0\0\0\0"])
def test_a_corrupt_last_line_is_survived_and_reported(
    end: str, write_config: WriteConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config()
    search(read_config(path, evaluations=2))
    journal = tmp_path / "evolved" / "study.journal"
    whole = journal.read_text()
    journal.write_text(whole + end)
    search(read_config(path, evaluations=3), resume=True)
    assert journal.read_text().startswith(whole)
    assert len(read_study(str(journal))[1]) == 3
    assert f"dropped {len(end)} bytes" in caplog.text


def test_optuna_reads_the_study(write_config: WriteConfig, tmp_path: Path) -> None:
    import optuna

    path = write_config(align={"study": f"sqlite:///{tmp_path}/study.db"})
    found = search(read_config(path, evaluations=3))
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db")
    assert [tuple(trial.values) for trial in study.trials] == [e.values for e in found.evaluations]
    assert study.best_trial.params.keys() == {"weight (aligned)", "weight (expert-a)"}


def test_a_candidate_that_fails_is_remembered_and_passed_over(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    path = write_config(
        genome={"merge_method": "linear", "base_model": None, "normalize": True},
        align={"bounds": {"weight": [0.0, 1.0]}, "searcher": "grid", "grid_points": 2},
    )
    found = search(read_config(path))
    first, *others = found.evaluations
    assert first.genotype.tolist() == [0.0, 0.0]  # weights that cannot be normalised
    assert first.failure is not None
    assert "nan" in first.failure
    assert all(each.failure is None for each in others)
    assert found.best in others


def test_what_fails_three_times_alike_is_the_set_up(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def broken(doc, results):\n    raise OSError('no disk')\n")
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: broken.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: q\n"
        "doc_to_choice: [a, b]\ndoc_to_target: 0\nprocess_results: !function broken.broken\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "broken.jsonl").write_text(json.dumps({"q": "which"}) + "\n")
    monkeypatch.chdir(tmp_path)
    path = write_config(tasks=["broken"], align={"task_search_path": [str(tmp_path)]})
    with pytest.raises(SearchError, match=r"3 candidates in a row failed alike: OSError: no disk"):
        search(read_config(path))
    journal = str(tmp_path / "evolved" / "study.journal")
    assert [each.values for each in read_study(journal)[1]] == [None] * 3


def test_an_interrupt_finishes_the_candidate(write_config: WriteConfig) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("2/"):
            os.kill(os.getpid(), signal.SIGINT)

    found = search(read_config(write_config(), evaluations=5), progress=interrupt)
    assert found.stopped
    assert len(found.evaluations) == 2


def test_what_cannot_be_written_ends_the_search(write_config: WriteConfig, tmp_path: Path) -> None:
    journal = tmp_path / "evolved" / "study.journal"

    lines: list[str] = []

    def spoil(line: str) -> None:
        lines.append(line)
        if line.startswith("2/"):
            journal.rename(tmp_path / "away")
            journal.mkdir()

    with pytest.raises(IsADirectoryError):
        search(read_config(write_config(), evaluations=9), progress=spoil)
    assert len(lines) == 2


class TestFloors:
    """A floor is a constraint on a metric that a task gives."""

    def config(self, write_config: WriteConfig, storage: Path, least: float | None) -> EvolveConfig:
        floors = {} if least is None else {"response_alignment:logprob": least}
        path = write_config(
            tasks=[
                {"name": "response_alignment", "metric": "logprob,none", "weight": 0.0},
                {"name": "response_task", "metric": "logprob,none", "weight": 1.0},
            ],
            align={"searcher": "grid", "grid_points": 3, "floors": floors, "max_fevals": 9},
        )
        return read_config(path, storage=storage)

    def test_the_best_keeps_them(self, write_config: WriteConfig, tmp_path: Path) -> None:
        free = search(self.config(write_config, tmp_path / "free", None))
        values = [e.results["response_alignment"]["logprob,none"] for e in free.evaluations]
        least = sorted(values)[4]
        found = search(self.config(write_config, tmp_path / "kept", least))
        assert [e.violations for e in found.evaluations] == [(least - v,) for v in values]
        assert free.best is not None
        assert found.best is not None
        kept = [e for e, v in zip(found.evaluations, values, strict=True) if v >= least]
        assert found.best == max(kept, key=lambda each: each.values or ())
        assert free.best.values >= found.best.values

    def test_where_none_keeps_them_the_nearest_is_the_best_and_the_status_3(
        self, write_config: WriteConfig, tmp_path: Path
    ) -> None:
        self.config(write_config, tmp_path / "evolved", 1.5)
        result = CliRunner().invoke(main, [str(tmp_path / "genomic.yml"), "--evaluations", "4"])
        assert result.exit_code == 3
        assert "No candidate keeps the floors" in result.output
        evaluations = read_study(str(tmp_path / "evolved" / "study.journal"))[1]
        best = yaml.safe_load((tmp_path / "evolved" / "best_config.yml").read_text())
        nearest = min(evaluations, key=lambda each: each.violation)
        weights = [s["parameters"]["weight"] for s in best["slices"][0]["sources"][:2]]
        assert weights == nearest.genotype.tolist()


@pytest.mark.slow
def test_several_objectives_leave_a_front(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(
        tasks=[
            {"name": "response_alignment", "metric": "logprob,none", "weight": 1.0},
            {"name": "response_task", "metric": "logprob,none", "weight": 1.0},
        ],
        align={"objectives": ["response_alignment", "response_task:logprob"]},
    )
    result = CliRunner().invoke(main, [str(path), "--evaluations", "12"])
    assert result.exit_code == 0, result.output
    front = list((tmp_path / "evolved" / "front").glob("*.yml"))
    assert f"{len(front)} configs of the Pareto front" in result.output
    evaluations = read_study(str(tmp_path / "evolved" / "study.journal"))[1]
    points = np.array([each.values for each in evaluations])
    beaten = [(points > point).all(1).any() for point in points]
    assert 1 <= len(front) <= len(points) - sum(beaten)
    for file in front:
        MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))


def test_a_search_starts_where_another_ended(
    write_config: WriteConfig, tmp_path: Path, world: Path
) -> None:
    found = search(read_config(write_config(), storage=tmp_path / "first"))
    assert found.best is not None
    path = write_config(align={"warm_start": str(tmp_path / "first" / "study.journal")})
    assert read_config(path).genes.start.tolist() == found.best.genotype.tolist()
    weights = {"aligned": 0.3, "expert-a": 0.6}
    models = [
        {"model": f"{world}/{name}", "parameters": {"weight": weight}}
        for name, weight in weights.items()
    ]
    (tmp_path / "mix.yml").write_text(yaml.safe_dump({"models": models}))
    path = write_config(
        genome={"filters": ["mlp"]}, align={"warm_start": str(tmp_path / "mix.yml")}
    )
    assert read_config(path).genes.start.tolist() == [0.3, 0.3, 0.6, 0.6]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"searcher": "cmaes"}, "align.searcher: found 'cmaes'; expected one of adam, cma, "),
    (
        {"floors": {"response_alignment:recall": 0.5}},
        "align.floors.response_alignment:recall: found metric 'recall', which response_alignment "
        "does not give; expected one of decision_acc",
    ),
    (
        {"floors": {"safety": 0.5}},
        "align.floors.safety: found no task 'safety' among `tasks`; expected one of "
        "response_alignment",
    ),
    (
        {"bounds": {"weigth": [0, 1]}},
        "align.bounds.weigth: found an unknown parameter; expected one of weight",
    ),
    (
        {"bounds": {"weight": [1, 0]}},
        "align.bounds.weight: found [1.0, 0.0]; expected two rising numbers",
    ),
    (
        {"start": {"weight": 3.0}},
        "align.start.weight: found 3; expected a number within its bounds",
    ),
    ({"budget": {"evaluation": 3}}, "align.budget.evaluation: found 3; expected Extra inputs"),
    (
        {"objectives": ["response_alignment", "response_alignment:logprob"], "searcher": "cma"},
        "align.objectives: found 2 with the searcher cma; expected one, or the searcher grid",
    ),
    ({"warm_start": "none.journal"}, "none.journal: found no such file; expected the study"),
    ({"study": "nosql://x"}, "align.study: found nosql://x"),
]


@pytest.mark.parametrize(("align", "line"), BAD, ids=[next(iter(align)) for align, _ in BAD])
def test_bad_input_is_one_line(align: dict[str, Any], line: str, write_config: WriteConfig) -> None:
    path = write_config(align=align)
    result = CliRunner().invoke(main, [str(path)])
    assert result.exit_code == 2, result.output
    errors = [each for each in result.output.splitlines() if each.startswith("Error: ")]
    assert errors == [result.output.splitlines()[-1]]
    assert line in errors[0]


def test_a_start_from_a_study_of_other_genes(write_config: WriteConfig, tmp_path: Path) -> None:
    search(read_config(write_config(), evaluations=1))
    journal = tmp_path / "evolved" / "study.journal"
    path = write_config(
        genome={"merge_method": "ties", "models": None},
        align={"warm_start": str(journal), "storage_path": str(tmp_path / "second")},
    )
    content = yaml.safe_load(path.read_text())
    content["genome"]["models"] = [content["genome"]["base_model"].replace("base", "aligned")]
    path.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(main, [str(path)])
    assert result.exit_code == 2
    assert "align.warm_start: found 2 genes in" in result.output
    assert "expected this genome's 2: weight (aligned), density (aligned)" in result.output


def test_a_study_is_not_gone_on_with_unasked(write_config: WriteConfig) -> None:
    path = write_config()
    search(read_config(path, evaluations=1))
    result = CliRunner().invoke(main, [str(path)])
    assert result.exit_code == 2
    assert "found a study of 1 evaluations; expected none without --resume" in result.output


def test_a_study_of_another_config_is_not_gone_on_with(write_config: WriteConfig) -> None:
    search(read_config(write_config(), evaluations=1))
    path = write_config(genome={"normalize": True})
    result = CliRunner().invoke(main, [str(path), "--resume"])
    assert result.exit_code == 2
    assert (
        "genome.normalize: found True in the config; expected None, as the study" in result.output
    )


def test_a_study_has_one_run_at_a_time(write_config: WriteConfig, tmp_path: Path) -> None:
    from filelock import FileLock

    path = write_config()
    (tmp_path / "evolved").mkdir()
    with FileLock(tmp_path / "evolved" / "running.lock"):
        result = CliRunner().invoke(main, [str(path)])
    assert result.exit_code == 2
    assert "found another run on this study; expected none" in result.output


def test_a_hub_models_memory_is_known_once_it_is_cached(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from mergekit.common import ModelPath

    from mergekit_align.evolve.memory import _directory, _weights

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, commit = ModelPath(path="someone/aligned"), "0" * 40
    assert _weights(_directory(model)) == (0, 0)
    cached = tmp_path / "models--someone--aligned"
    for folder in ("refs", "snapshots"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).symlink_to(world / "aligned")
    found = _weights(_directory(model))
    assert found == _weights(world / "aligned") != (0, 0)


def test_too_little_memory_is_told_before_a_model_is_loaded(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_align.evolve import memory

    monkeypatch.setattr(memory, "_free", lambda device: 2**20)
    result = CliRunner().invoke(main, [str(write_config())])
    assert result.exit_code == 2
    assert "found 0.0 GiB of free memory on cpu; expected" in result.output
