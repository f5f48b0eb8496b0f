"""Each repair, by what works with it; `test_evolve_command` runs them together."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mergekit import card
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.evo import actors, strategy
from mergekit.evo.config import EvolMergeConfiguration, TaskConfiguration
from mergekit.evo.genome import ModelGenome
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts import evolve
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mergekit_align import upstream_fixes
from mergekit_align.eval_task_files import eval_tasks_path

TASK = """\
include: {tasks}/responses/response_alignment.yaml
task: mine
data: {world}/data/validation.jsonl
"""


def build_strategy(name: str, config: Path, world: Path, **options: Any) -> Any:
    config.with_name("mine.yaml").write_text(TASK.format(tasks=eval_tasks_path(), world=world))
    content = EvolMergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    storage = config.with_name("evolved")
    return getattr(strategy, name)(
        content,
        ModelGenome(content.genome),
        MergeOptions(cuda=False, quiet=True),
        num_gpus=1,
        model_storage_path=str(storage),
        task_search_path=[str(config.parent)],
        **options,
    )


def test_an_adapter_that_is_cut_off_is_merged_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "lora")
    reference = ModelReference.model_validate(f"{world}/base+{tmp_path}/lora")
    cache = tmp_path / "merged"

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reference.merged(str(cache))
    assert not list(cache.iterdir())
    place = Path(reference.merged(str(cache)).model.path)
    assert list(cache.iterdir()) == [place]
    written = (place / "model.safetensors").stat().st_mtime_ns
    assert reference.merged(str(cache)).model.path == str(place)
    assert (place / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("name", "in_memory"),
    [
        ("ActorPoolEvaluationStrategy", True),
        pytest.param("ActorPoolEvaluationStrategy", False, marks=pytest.mark.slow),
        pytest.param("BufferedRayEvaluationStrategy", False, marks=pytest.mark.slow),
        pytest.param("SerialEvaluationStrategy", False, marks=pytest.mark.slow),
    ],
)
def test_every_strategy_runs_on_a_cpu_and_ranks_a_failed_candidate_last(
    cluster: None, write_config: Callable[..., Path], world: Path, name: str, in_memory: bool
) -> None:
    task = {"name": "mine", "metric": "logprob,none"}
    workers = build_strategy(name, write_config(tasks=[task]), world, in_memory=in_memory)
    good = torch.full((1, 2, 1, 1), 0.5).numpy()
    no_genotype = torch.zeros(1, 2, 1, 5).numpy()
    no_number = torch.full((1, 2, 1, 1), math.nan).numpy()
    scores = [r["score"] for r in workers.evaluate_genotypes([no_genotype, good, no_number])]
    assert scores[0] == scores[2] == -math.inf
    assert -20 < scores[1] < 0
    with pytest.raises(RuntimeError, match="every candidate of a generation failed"):
        workers.evaluate_genotypes([no_genotype])


def test_a_model_in_memory_is_evaluated_in_batches(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK.format(tasks=eval_tasks_path(), world=world))
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    actors._eval_model(
        lm,
        [TaskConfiguration(name="mine", metric="logprob,none")],
        batch_size=16,
        limit=2,
        task_manager=TaskManager(include_path=[str(tmp_path)], include_defaults=False),
    )
    assert lm.batch_size == 16


def test_actors_load_without_vllm() -> None:
    subprocess.run([sys.executable, "-c", "import mergekit.evo.actors"], check=True)


def test_the_planners_optional_tensors_can_be_returned(world: Path) -> None:
    model = {"model": f"{world}/base", "parameters": {"weight": 1}}
    config = MergeConfiguration.model_validate({"merge_method": "linear", "models": [model]})
    model_config = ModelReference.parse(f"{world}/base").config()
    options = MergeOptions(cuda=False, quiet=True)
    planner = MergePlanner(config, arch_info_for_config(model_config), options, model_config)
    assert planner.plan_in_memory()


def test_a_model_card_asks_no_hub_about_a_local_model(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.parent)
    assert (Path(world.name) / "base").is_dir()
    assert card.is_hf(f"{world.name}/base") is False


def test_an_input_model_that_was_written_again_is_copied_again(world: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    storage = str(tmp_path / "storage")

    def copied() -> torch.Tensor:
        reference = ModelReference.parse(str(source))
        copy = evolve._reshard_model(reference, storage, None, False)
        return load_file(Path(copy.model.path) / "model.safetensors")["model.norm.weight"]

    shutil.copytree(world / "base", source)
    before = copied()
    shutil.rmtree(source)
    shutil.copytree(world / "expert-a", source)
    newer = 2 + max(file.stat().st_mtime for file in Path(storage).rglob("*"))
    os.utime(source / "model.safetensors", (newer, newer))
    assert not torch.equal(copied(), before)


def test_evaluations_describe_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "torch.utils.collect_env.get_pretty_env_info", lambda: calls.append(1) or "environment"
    )
    described: list[dict[str, Any]] = [{}, {}]
    for results in described:
        evaluator.add_env_info(results)
    assert len(calls) <= 1
    assert described[0] == described[1]
    assert described[0]["pretty_env_info"]


def test_repairs_may_be_made_any_number_of_times() -> None:
    evaluate = strategy.ActorPoolEvaluationStrategy.evaluate_genotypes
    upstream_fixes.repair_evo()
    upstream_fixes.repair_evaluations()
    upstream_fixes.free_no_gpu_memory_without_a_gpu()
    upstream_fixes.repair_strategies()
    upstream_fixes.repair_evolve_command()
    upstream_fixes.write_model_cards_offline()
    upstream_fixes.merge_adapters_whole()
    assert strategy.ActorPoolEvaluationStrategy.evaluate_genotypes is evaluate
