"""Gradients of a candidate's metrics with respect to its genes, against autograd through the merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch.func import functional_call

from mergekit_align.evolve import read_config, search
from mergekit_align.evolve.ascent import Ascent
from mergekit_align.evolve.candidate import Evaluator
from mergekit_align.gradient import mean_decision, mean_logprob
from mergekit_align.loss import response_scores

TASKS = [
    {"name": "response_alignment", "metric": "decision_logprob,none", "weight": 1.0},
    {"name": "response_task", "metric": "sequence_logprob,none", "weight": 0.1},
    {"name": "response_benign", "metric": "decision_margin,none", "weight": 0.2},
]


def evaluator(write_config: Callable[..., Path], **genome: Any) -> tuple[Evaluator, Any]:
    """In float32, so that what is computed in two ways comes out alike."""
    config = read_config(write_config(tasks=TASKS, genome=genome))._replace(dtype=torch.float32)
    return Evaluator(config), config


def test_the_values_are_those_of_the_fitness(write_config: Callable[..., Path]) -> None:
    candidates, config = evaluator(write_config)
    plain = candidates.evaluate(config.genes.start)
    sloped = candidates.evaluate(config.genes.start, gradient=True)
    assert plain.values == pytest.approx(sloped.values, abs=1e-4)
    for task, metrics in plain.results.items():
        assert metrics == pytest.approx(sloped.results[task], abs=1e-4)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("normalize", [False, True])
def test_they_are_autograds_through_the_merge(
    method: str, normalize: bool, write_config: Callable[..., Path], world: Path
) -> None:
    candidates, config = evaluator(
        write_config,
        merge_method=method,
        normalize=normalize,
        filters=["self_attn"],
        layer_granularity=1,
        **({"base_model": None} if method == "linear" else {}),
    )
    rng = np.random.default_rng(0)
    genotype = rng.uniform(0.3, 1.2, len(config.genes))
    found = candidates.evaluate(genotype, gradient=True)
    assert found.gradient is not None

    # The same merge in float32, and the same samples, by the model's own parameters.
    genes = torch.tensor(genotype, requires_grad=True)
    sources = [LazyTensorLoader.from_disk(str(world / n)) for n in ("aligned", "expert-a")]
    base = LazyTensorLoader.from_disk(str(world / "base"))
    model = candidates.merged.model
    layers = model.config.num_hidden_layers
    table = genes.view(layers, 2, 2)  # layers, models, filters

    def merged() -> dict[str, torch.Tensor]:
        tensors = {}
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            outer = 0 if "embed" in name else layers - 1
            layer = int(parts[2]) if parts[1] == "layers" else outer
            weights = table[layer, :, 0 if "self_attn" in name else 1]
            origin = base.get_tensor(name).double() if method != "linear" else 0.0
            total = sum(
                w * (source.get_tensor(name).double() - origin)
                for w, source in zip(weights, sources, strict=True)
            )
            total = total / weights.sum() if normalize else total
            tensors[name] = (origin + total).to(parameter.dtype)
        return tensors

    class Merged(torch.nn.Module):
        config, device = model.config, model.device
        get_output_embeddings = model.get_output_embeddings

        def forward(
            self, input_ids: Any, attention_mask: Any, position_ids: Any, **more: Any
        ) -> Any:
            more |= {"input_ids": input_ids, "position_ids": position_ids}
            return functional_call(model, merged(), (), {"attention_mask": attention_mask, **more})

    fitness = candidates.fitness
    encoded = {task["name"]: fitness.samples.encoded(str(task["name"])) for task in TASKS}
    for (name, (samples, openings)), task in zip(encoded.items(), TASKS, strict=True):
        weight = task["weight"]
        before = genes.grad.clone() if genes.grad is not None else torch.zeros_like(genes)
        genes.grad = None
        if "decision" in str(task["metric"]):
            mean_decision(
                Merged(),  # type: ignore[arg-type]
                samples,
                openings[0],
                refusal_wanted=name == "response_alignment",
                margin="margin" in str(task["metric"]),
            ).accumulate()
        else:
            mean_logprob(Merged(), samples, by_token=False).accumulate()  # type: ignore[arg-type]
        assert genes.grad is not None
        genes.grad = before + weight * genes.grad
    expected = genes.grad.numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.gradient[0], expected, atol=0.03 * scale)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_weight_is_the_sum_of_its_shares_of_genes(
    smooth: bool, write_config: Callable[..., Path]
) -> None:
    candidates, config = evaluator(
        write_config, filters=["self_attn"], layer_granularity=1, smooth=smooth
    )
    genotype = np.random.default_rng(0).uniform(0.3, 1.2, len(config.genes))
    shares = Ascent(config.genes, candidates.merged, candidates.fitness)._weights_by_gene()
    for merge in candidates.merged.resolve(config.genes.config(genotype)):
        for model, own in merge.own.items():
            if own:
                parts = shares[merge.weight.name, str(model)].items()
                total = sum(share * genotype[gene] for gene, share in parts)
                assert total == pytest.approx(own["weight"])


def test_ties_gradient_is_the_slope_where_its_selections_stay(
    write_config: Callable[..., Path],
) -> None:
    candidates, _ = evaluator(write_config, merge_method="ties", normalize=False)
    genotype = np.array([0.9, 0.6, 0.7, 0.5])
    found = candidates.evaluate(genotype, gradient=True)
    assert found.gradient is not None
    assert found.gradient[0, 1] == found.gradient[0, 3] == 0.0  # densities
    for gene in (0, 2):
        step = np.zeros(4)
        step[gene] = 0.05
        ends = [candidates.evaluate(genotype + sign * step).values for sign in (1, -1)]
        slope = (ends[0][0] - ends[1][0]) / 0.1  # type: ignore[index]
        assert found.gradient[0, gene] == pytest.approx(slope, rel=0.3, abs=0.05)


@pytest.mark.slow
def test_a_search_climbs_and_keeps_its_floor(write_config: Callable[..., Path]) -> None:
    path = write_config(tasks=TASKS, align={"searcher": "gradient", "max_fevals": 8})
    free = search(read_config(path))
    assert free.best is not None
    assert free.best.values > free.evaluations[0].values
    name = "response_task:sequence_logprob"
    task = [e.results["response_task"]["sequence_logprob,none"] for e in free.evaluations]
    floor = max(task[0], free.best.results["response_task"]["sequence_logprob,none"]) + 0.5
    path = write_config(
        tasks=TASKS, align={"searcher": "gradient", "max_fevals": 14, "floors": {name: floor}}
    )
    kept = search(read_config(path, storage=path.parent / "kept"))
    assert kept.best is not None
    assert kept.best.violation < floor - task[0]


def test_decisions_and_responses_are_the_losss(
    write_config: Callable[..., Path],
) -> None:
    candidates, config = evaluator(write_config)
    candidates.evaluate(config.genes.start, gradient=True)
    model = candidates.merged.model
    for task in TASKS:
        samples, openings = candidates.fitness.samples.encoded(str(task["name"]))
        scores = response_scores(model, samples, openings=openings)
        margins = [score.decision_margin for score in scores]
        assert mean_logprob(model, samples, by_token=True).accumulate() == pytest.approx(
            -sum(score.loss for score in scores) / len(scores), abs=1e-4
        )
        assert mean_decision(
            model, samples, openings[0], refusal_wanted=True, margin=True
        ).accumulate() == pytest.approx(sum(margins) / len(margins), abs=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("genome", "task", "line"),
    [
        (
            {"merge_method": "dare_ties"},
            TASKS[0],
            "align.searcher: found 'gradient' with dare_ties; expected it with linear",
        ),
        (
            {},
            {"name": "response_alignment", "metric": "decision_acc,none"},
            "tasks[0]: found response_alignment decision_acc, which has no gradient; expected "
            "decision_logprob",
        ),
        (
            {},
            {"name": "over_refusal", "metric": "refusal,none"},
            "tasks[0]: found over_refusal, which has no gradient,; expected a response task",
        ),
    ],
)
def test_what_has_no_gradient_is_one_line(
    genome: Any, task: Any, line: str, write_config: Callable[..., Path]
) -> None:
    from mergekit_align.errors import InputError

    path = write_config(genome=genome, tasks=[task], align={"searcher": "gradient"})
    with pytest.raises(InputError) as error:
        read_config(path)
    assert line in str(error.value)
