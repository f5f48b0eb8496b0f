"""Defects of mergekit 0.1.5 and lm-eval 0.4.13 that stop `mergekit-evolve`, one function each.

Each function looks first whether the defect is there, so that a repaired upstream is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import torch

from mergekit_align.devices import default_device, default_dtype

LOG = logging.getLogger(__name__)


def repair_evo() -> None:
    """Everything that `mergekit.evo` needs before its modules are used."""
    let_actors_load_without_vllm()
    accept_optional_tensor_tasks()
    use_no_gpu_where_there_is_none()
    survive_failed_evaluations()


def repair_evolve_command() -> None:
    """Everything that `mergekit.scripts.evolve` needs."""
    forget_stale_input_models()


def write_model_cards_offline() -> None:
    """A model card asks the hub about local directories that are named like `owner/model` (0.1.5).

    So a finished merge of `demo/base` fails where no hub can be reached. What is there is local.
    """
    from mergekit import card

    original = card.is_hf
    if getattr(original, "knows_local_models", False):
        return

    def is_hf(path: str) -> bool:
        return not os.path.exists(path) and bool(original(path))

    is_hf.knows_local_models = True  # type: ignore[attr-defined]
    card.is_hf = is_hf


def let_actors_load_without_vllm() -> None:
    """`mergekit.evo.actors` reads `lm_eval.models.vllm_causallms` at import; it needs vLLM.

    mergekit 0.1.5 with lm-eval >= 0.4.10, which no longer imports that module by itself.
    """
    import lm_eval.models

    if hasattr(lm_eval.models, "vllm_causallms"):
        return
    name = "lm_eval.models.vllm_causallms"
    if importlib.util.find_spec("vllm") is not None:
        importlib.import_module(name)
        return
    placeholder = ModuleType(name, "Stands in where vLLM is not installed.")
    placeholder.VLLM = type("VLLM", (), {})  # type: ignore[attr-defined]
    sys.modules[name] = placeholder
    lm_eval.models.vllm_causallms = placeholder


def accept_optional_tensor_tasks() -> None:
    """`ReturnTensor.tensor_task` refuses the planner's `Task[Optional[Tensor]]` (mergekit 0.1.5).

    So `--in-memory` always fails, with pydantic 2.10 to 2.14.
    """
    from mergekit.graph import Task
    from mergekit.io.tasks import ReturnTensor

    field = ReturnTensor.model_fields["tensor_task"]
    if field.annotation != Task[torch.Tensor]:
        return
    # The planner's tasks are parametrised by `Optional[...]`, which differs from `X | None` as a class.
    planned = Task[Optional[torch.Tensor]]  # noqa: UP045
    ReturnTensor.__annotations__["tensor_task"] = planned
    field.annotation = planned
    ReturnTensor.model_rebuild(force=True)


def use_no_gpu_where_there_is_none() -> None:
    """Actors ask Ray for a GPU, and evaluation for the device "cuda", on every machine (0.1.5)."""
    if default_device() != "cpu":
        return
    from mergekit.evo import actors, helpers, strategy

    if not hasattr(torch.cpu, "empty_cache"):
        actors.get_torch_accelerator_module = lambda name=None: SimpleNamespace(
            empty_cache=lambda: None
        )
    for name in ("OnDiskMergeEvaluator", "InMemoryMergeEvaluator"):
        actor = getattr(strategy, name).options(num_cpus=1, num_gpus=0)
        setattr(strategy, name, actor)
    for name in ("merge_model_ray", "evaluate_model_ray"):
        task = getattr(strategy, name).options(num_cpus=1, num_gpus=0)
        setattr(strategy, name, task)

    original = helpers._eval_model

    def eval_model(model: Any, tasks: Any, model_args: Any = None, **kwargs: Any) -> Any:
        if model_args is not None:
            dtype = str(default_dtype("cpu")).removeprefix("torch.")
            model_args = {**model_args, "dtype": dtype}
        return original(model, tasks, model_args, **{"device": "cpu", **kwargs})

    helpers._eval_model = actors._eval_model = eval_model


def survive_failed_evaluations() -> None:
    """One candidate that fails ends the whole search (mergekit 0.1.5).

    A failed one is ranked below all others instead; a generation of failures only is an error.
    """
    import ray
    from mergekit.evo import strategy

    pool_strategy = strategy.ActorPoolEvaluationStrategy
    if getattr(pool_strategy.evaluate_genotypes, "survives", False):
        return

    def evaluate_genotypes(self: Any, genotypes: list[Any]) -> list[dict[str, Any]]:
        for genotype in genotypes:
            self.actor_pool.submit(lambda a, x: a.evaluate_genotype.remote(x), genotype)
        results, failure = [], None
        for _ in genotypes:
            try:
                result = self.actor_pool.get_next()
            except ray.exceptions.RayTaskError as error:
                LOG.warning("A candidate failed and is ranked last: %s", error.cause)
                result, failure = {"score": None, "results": {}}, error
            results.append(result)
        if all(result["score"] is None for result in results):
            raise failure or RuntimeError("every candidate of a generation failed to merge")
        for result in results:
            if result["score"] is None:
                result["score"] = float("-inf")
        return results

    evaluate_genotypes.survives = True  # type: ignore[attr-defined]
    pool_strategy.evaluate_genotypes = evaluate_genotypes


def seed_the_search(seed: int) -> None:
    """`--random-seed` reaches the merges but not CMA-ES, which seeds itself by the clock (0.1.5)."""
    import cma
    from mergekit.scripts import evolve

    def fmin2(*args: Any, options: dict[str, Any], **kwargs: Any) -> Any:
        # cma takes 0 for the clock.
        return cma.fmin2(*args, options={"seed": seed + 1, **options}, **kwargs)

    evolve.cma = SimpleNamespace(fmin2=fmin2, CMAEvolutionStrategy=cma.CMAEvolutionStrategy)


def forget_stale_input_models() -> None:
    """Inputs are copied under a name made of their path alone, and reused for ever (0.1.5).

    A model that was written again since, or whose copying was interrupted, is copied anew.
    """
    import shutil
    from pathlib import Path

    from mergekit.scripts import evolve

    original = evolve._reshard_model

    def reshard_model(model: Any, storage_path: str, *args: Any) -> Any:
        source = Path(model.model.path)
        copy = Path(storage_path) / "input_models" / model.model._unique_id()
        if source.is_dir() and copy.is_dir():
            newest = max(file.stat().st_mtime for file in source.iterdir())
            written = copy / "model.safetensors"
            if not written.is_file() or written.stat().st_mtime < newest:
                shutil.rmtree(copy)
        return original(model, storage_path, *args)

    evolve._reshard_model = reshard_model
