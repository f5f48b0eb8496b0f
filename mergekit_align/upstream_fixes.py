"""Defects of mergekit 0.1.5 and lm-eval 0.4.13 that stop `mergekit-evolve`, one function each.

Each function looks first whether the defect is there, so that a repaired upstream is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import torch

from mergekit_align.devices import default_device, default_dtype

LOG = logging.getLogger(__name__)


def repair_evo() -> None:
    """What `mergekit.evo` needs before its modules load."""
    let_actors_load_without_vllm()
    accept_optional_tensor_tasks()


def repair_evaluations() -> None:
    """Everything that `mergekit.evo.helpers` needs."""
    evaluate_without_a_gpu()
    use_the_batch_size_in_memory()
    describe_the_environment_once()


def repair_strategies() -> None:
    """Everything that `mergekit.evo.strategy` needs."""
    survive_failed_evaluations()
    use_no_gpu_where_there_is_none()


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


def merge_adapters_whole() -> None:
    """A merged adapter is written in its place, and what is there is taken for complete (0.1.5).

    So a run that was killed meanwhile leaves a model that no later run can read, or reads in part.
    """
    import tempfile
    from pathlib import Path

    from mergekit.common import ModelReference

    original = ModelReference.merged
    if getattr(original, "is_whole", False):
        return

    def merged(
        self: ModelReference, cache_dir: str | None = None, *args: Any, **options: Any
    ) -> ModelReference:
        if self.lora is None or cache_dir is None:
            return original(self, cache_dir, *args, **options)
        name = f"{self.model._unique_id()}_{self.lora._unique_id()}"
        place = Path(cache_dir) / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as beside:
                original(self, beside, *args, **options)
                Path(beside, name).rename(place)
        return original(self, cache_dir, *args, **options)

    merged.is_whole = True  # type: ignore[attr-defined]
    ModelReference.merged = merged


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
    import ray
    from mergekit.evo import strategy

    evaluate_without_a_gpu()
    free_no_gpu_memory_without_a_gpu()
    if default_device() != "cpu" or getattr(strategy, "asks_for_no_gpu", False):
        return
    strategy.asks_for_no_gpu = True
    for name in (
        "OnDiskMergeEvaluator",
        "InMemoryMergeEvaluator",
        "merge_model_ray",
        "evaluate_model_ray",
    ):
        setattr(strategy, name, getattr(strategy, name).options(num_cpus=1, num_gpus=0))
    # Upstream's reserves a GPU, by name, for its two steps.
    strategy.evaluate_genotype_serial = ray.remote(num_cpus=1)(_merge_and_evaluate)


def free_no_gpu_memory_without_a_gpu() -> None:
    """Actors empty the cache of an accelerator, which a CPU has only in newer versions of torch."""
    from mergekit.evo import actors

    if default_device() == "cpu" and not hasattr(torch.cpu, "empty_cache"):
        actors.get_torch_accelerator_module = lambda name=None: SimpleNamespace(
            empty_cache=lambda: None
        )


def evaluate_without_a_gpu() -> None:
    """Where there is none, evaluation is on the CPU, in a type that this computes fast."""
    from mergekit.evo import helpers

    original = helpers._eval_model
    if default_device() != "cpu" or getattr(helpers, "needs_no_gpu", False):
        return
    helpers.needs_no_gpu = True

    def eval_model(model: Any, tasks: Any, model_args: Any = None, **kwargs: Any) -> Any:
        dtype = default_dtype("cpu")
        if model_args is None:  # merged in memory, in bfloat16 whatever the processor
            model.model.to(dtype)
        else:
            model_args = {**model_args, "dtype": str(dtype).removeprefix("torch.")}
        return original(model, tasks, model_args, **{"device": "cpu", **kwargs})

    _replace_eval_model(eval_model)


def _replace_eval_model(eval_model: Any) -> None:
    from mergekit.evo import helpers

    helpers._eval_model = eval_model
    actors = sys.modules.get("mergekit.evo.actors")
    if actors is not None:  # it has a name of its own for it
        actors._eval_model = eval_model  # type: ignore[attr-defined]


def _merge_and_evaluate(
    genotype: Any,
    config: Any,
    genome: Any,
    merge_options: Any,
    model_storage_path: str | None = None,
    quantization_config: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """One candidate of the serial strategy, in one task on a CPU; arguments as upstream's."""
    path = _merge_or_none(genotype, genome, model_storage_path, merge_options)
    for name in ("num_fewshot", "limit", "apply_chat_template", "fewshot_as_multiturn"):
        kwargs[name] = getattr(config, name)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return _evaluate_or_unscored(path, config.tasks, **kwargs)


def use_the_batch_size_in_memory() -> None:
    """A model merged in memory is evaluated one sample at a time, whatever the batch size (0.1.5)."""
    from mergekit.evo import helpers

    original = helpers._eval_model
    if getattr(helpers, "sets_batch_size", False):
        return
    helpers.sets_batch_size = True

    def eval_model(model: Any, *args: Any, batch_size: Any = None, **kwargs: Any) -> Any:
        if batch_size is not None and hasattr(model, "batch_size_per_gpu"):
            model.batch_size_per_gpu = batch_size
        return original(model, *args, batch_size=batch_size, **kwargs)

    _replace_eval_model(eval_model)


def survive_failed_evaluations() -> None:
    """One failed candidate ends the search, or hangs it (`buffered`); a missing score ends it (0.1.5).

    A candidate that fails, or whose score is no finite number, is ranked below all others instead; a
    generation of failures only is an error.
    """
    import ray
    from mergekit.evo import strategy

    if getattr(strategy, "survives_failures", False):
        return
    strategy.survives_failures = True
    strategy.merge_model_ray = ray.remote(num_cpus=1, num_gpus=1)(_merge_or_none)
    strategy.evaluate_model_ray = ray.remote(num_cpus=1, num_gpus=1)(_evaluate_or_unscored)
    pool = strategy.ActorPoolEvaluationStrategy
    pool.evaluate_genotypes = _evaluate_in_pool
    for strategy_class in (
        pool,
        strategy.BufferedRayEvaluationStrategy,
        strategy.SerialEvaluationStrategy,
    ):
        strategy_class.evaluate_genotypes = _rank_failures_last(strategy_class.evaluate_genotypes)
        strategy_class.evaluate_genotype = _evaluate_one


def _merge_or_none(*args: Any) -> str | None:
    from mergekit.evo import helpers

    try:
        path: str | None = helpers.merge_model(*args)
    except Exception as error:  # whatever it is, it must not end the search
        LOG.warning("A candidate cannot be merged: %r", error)
        return None
    return path


def _evaluate_or_unscored(path: str | None, *args: Any, **kwargs: Any) -> dict[str, Any]:
    from mergekit.evo import helpers

    if path is None:
        return _unscored("its merge failed")
    try:
        result: dict[str, Any] = helpers.evaluate_model(path, *args, **kwargs)
    except Exception as error:  # whatever it is, it must not end the search
        return _unscored(repr(error))
    return result


def _unscored(reason: str) -> dict[str, Any]:
    return {"score": None, "results": {}, "reason": reason}


def _evaluate_in_pool(self: Any, genotypes: list[Any]) -> list[dict[str, Any]]:
    import ray.exceptions

    for genotype in genotypes:
        self.actor_pool.submit(lambda actor, x: actor.evaluate_genotype.remote(x), genotype)
    results = []
    for _ in genotypes:
        try:
            results.append(self.actor_pool.get_next())
        except ray.exceptions.RayTaskError as error:
            results.append(_unscored(repr(error.cause)))
    return results


def _evaluate_one(self: Any, genotype: Any) -> Any:
    return self.evaluate_genotypes([genotype])[0]


def _rank_failures_last(evaluate: Any) -> Any:
    def evaluate_genotypes(self: Any, genotypes: list[Any]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = evaluate(self, genotypes)
        failed = [r for r in results if r["score"] is None or not math.isfinite(r["score"])]
        for result in failed:
            result.setdefault("reason", f"its score is {result['score']}")
            LOG.warning("A candidate is ranked last: %s", result["reason"])
            result["score"] = -math.inf
        if len(failed) == len(results):
            raise RuntimeError(f"every candidate of a generation failed: {failed[0]['reason']}")
        return results

    return evaluate_genotypes


def describe_the_environment_once() -> None:
    """Every evaluation asks pip and nvidia-smi what is installed: 0.2 s (lm-eval 0.4.13)."""
    from lm_eval import evaluator

    original = evaluator.add_env_info
    if getattr(original, "describes_once", False):
        return
    known: dict[str, Any] = {}

    def add_env_info(results: dict[str, Any]) -> None:
        if not known:
            original(known)
        results.update(known)

    add_env_info.describes_once = True  # type: ignore[attr-defined]
    evaluator.add_env_info = add_env_info


def keep_the_search_repeatable(seed: int, storage_path: str) -> None:
    """`--random-seed` reaches the merges but not CMA-ES, which seeds itself by the clock (0.1.5).

    CMA-ES also writes its log to the working directory; here to `storage_path`.
    """
    import cma
    from mergekit.scripts import evolve

    # cma takes 0 for the clock.
    ours = {"seed": seed + 1, "verb_filenameprefix": os.path.join(storage_path, "outcmaes", "")}

    def fmin2(*args: Any, options: dict[str, Any], **kwargs: Any) -> Any:
        return cma.fmin2(*args, options={**ours, **options}, **kwargs)

    evolve.cma = SimpleNamespace(fmin2=fmin2, CMAEvolutionStrategy=cma.CMAEvolutionStrategy)


def forget_stale_input_models() -> None:
    """Inputs are copied under a name made of their path alone, and reused for ever (0.1.5).

    A model that was written again since, or whose copying was interrupted, is copied anew.
    """
    import shutil
    from pathlib import Path

    from mergekit.scripts import evolve

    original = evolve._reshard_model
    if getattr(original, "forgets_stale_models", False):
        return

    def reshard_model(model: Any, storage_path: str, *args: Any) -> Any:
        source = Path(model.model.path)
        copy = Path(storage_path) / "input_models" / model.model._unique_id()
        if source.is_dir() and copy.is_dir():
            newest = max(file.stat().st_mtime for file in source.iterdir())
            written = copy / "model.safetensors"
            if not written.is_file() or written.stat().st_mtime < newest:
                shutil.rmtree(copy)
        return original(model, storage_path, *args)

    reshard_model.forgets_stale_models = True  # type: ignore[attr-defined]
    evolve._reshard_model = reshard_model
