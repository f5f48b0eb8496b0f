"""Statistics against what autograd and plain hooks give, one sample after another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.cli import stats
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.samples import Sample, load_samples, save_samples
from mergekit_align.statistics.collect import Source, collect_statistics
from mergekit_align.statistics.files import find_statistics
from mergekit_align.statistics.propagate import collect_propagated

LIMIT = 3


@pytest.fixture
def source(world: Path) -> Source:
    return Source([world / "data" / "validation.jsonl"], limit=LIMIT, seed=1)


def load(world: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32).eval()


def encoded(world: Path, name: str, source: Source, kind: str) -> list[EncodedSample]:
    tokenizer = AutoTokenizer.from_pretrained(world / name)
    samples = source.by_type()[kind]  # type: ignore[index]
    return ResponseEncoder(tokenizer).encode_samples(samples)


def plain_loss(model: Any, sample: EncodedSample) -> torch.Tensor:
    """Mean negative log-likelihood of the response, as transformers computes it."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    labels = ids.clone()
    labels[:, : len(sample.prompt_ids)] = -100
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def plain_grams(model: Any, samples: list[EncodedSample]) -> dict[str, torch.Tensor]:
    """Mean x x^T a token of every linear layer but the output layer."""
    grams: dict[str, torch.Tensor] = {}
    tokens = sum(len(each.prompt_ids) + len(each.response_ids) for each in samples)

    def hook(name: str) -> Any:
        def add(module: Any, inputs: Any) -> None:
            rows = inputs[0][0].double()
            grams[name] = grams.get(name, 0) + rows.T @ rows / tokens

        return add

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for each in samples:
            model(input_ids=torch.tensor([[*each.prompt_ids, *each.response_ids]]))
    for handle in handles:
        handle.remove()
    return grams


def test_importance_and_fisher_are_means_over_samples(
    world: Path, source: Source, tmp_path: Path
) -> None:
    kinds: Any = ["importance", "fisher", "gram"]
    collect_statistics(f"{world}/aligned", source, tmp_path, kinds=kinds)
    model = load(world, "aligned")
    samples = encoded(world, "aligned", source, "benign")
    importance, fisher = (
        {n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in "ab"
    )
    for each in samples:
        model.zero_grad()
        plain_loss(model, each).backward()
        for name, parameter in model.named_parameters():
            importance[name] += (parameter * parameter.grad).abs() / len(samples)
            fisher[name] += parameter.grad**2 / len(samples)
    for kind, expected in (("importance", importance), ("fisher", fisher)):
        (file,) = (f for f in find_statistics(tmp_path, kind) if f.header.type == "benign")  # type: ignore[arg-type]
        assert file.names == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(file[name], value.detach(), atol=1e-7, rtol=1e-3)


def test_gram_matrices_are_means_over_tokens(world: Path, source: Source, tmp_path: Path) -> None:
    collect_statistics(f"{world}/aligned", source, tmp_path, types=["task"])
    (file,) = find_statistics(tmp_path, "gram")
    expected = plain_grams(load(world, "aligned"), encoded(world, "aligned", source, "task"))
    assert all(name in file for name in expected)
    for name, gram in expected.items():
        torch.testing.assert_close(file[name].double(), gram, atol=1e-5, rtol=1e-4)
    # Layers that read the same input are stored once.
    assert len(file.names) < len(expected)


@pytest.mark.parametrize("off_diagonal", [0.9, 0.2])
def test_propagated_gram_matrices_are_of_the_merged_models_layers(
    off_diagonal: float, world: Path, source: Source, tmp_path: Path
) -> None:
    types: dict[str, Any] = {"aligned": "alignment", "expert-a": "task"}
    for name, kind in types.items():
        collect_statistics(f"{world}/{name}", source, tmp_path / name, types=[kind])
    weights = {"aligned": 1.5, "expert-a": 0.5}
    entries = [
        {
            "model": f"{world}/{name}",
            "parameters": {"statistics": f"{tmp_path}/{name}", "weight": weights[name]},
        }
        for name in types
    ]
    content = {
        "merge_method": "regmean_plus",
        "models": entries,
        "parameters": {} if off_diagonal == 0.9 else {"off_diagonal": off_diagonal},
    }
    collect_propagated(MergeConfiguration.model_validate(content))

    parents = {name: load(world, name) for name in types}
    samples = {name: encoded(world, name, source, kind) for name, kind in types.items()}
    merged = copy.deepcopy(parents["aligned"])
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            both = [dict(parent.named_parameters())[name] for parent in parents.values()]
            parameter.copy_((both[0] + both[1]) / 2)
    for number, layer in enumerate(merged.model.layers):
        grams = {}
        average = copy.deepcopy(layer)
        for name, parent in parents.items():
            merged.model.layers[number] = parent.model.layers[number]
            grams[name] = plain_grams(merged, samples[name])
        merged.model.layers[number] = average
        for name, module in average.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            own = f"model.layers.{number}.{name}.weight"
            total, pulled = torch.zeros(1), torch.zeros(1)
            for parent_name, parent in parents.items():
                (file,) = find_statistics(tmp_path / parent_name, "propagated_gram")
                gram = grams[parent_name][own]
                torch.testing.assert_close(file[own].double(), gram, atol=1e-4, rtol=1e-3)
                diagonal = (1 - off_diagonal) * torch.diag(gram.diag())
                shrunk = weights[parent_name] * (off_diagonal * gram + diagonal)
                total = total + shrunk
                pulled = pulled + dict(parent.named_parameters())[own].double() @ shrunk
            with torch.no_grad():
                module.weight.copy_(pulled @ torch.linalg.inv(total))


def test_files_that_are_there_are_kept_and_others_refused(
    world: Path, source: Source, tmp_path: Path
) -> None:
    first = collect_statistics(f"{world}/aligned", source, tmp_path)
    times = [path.stat().st_mtime_ns for path in first]
    again = collect_statistics(f"{world}/aligned", source, tmp_path)
    assert [path.stat().st_mtime_ns for path in again] == times
    with pytest.raises(ValueError, match="found statistics of another model"):
        collect_statistics(f"{world}/expert-a", source, tmp_path)
    with pytest.raises(ValueError, match="found statistics of another sample"):
        collect_statistics(f"{world}/aligned", source._replace(seed=2), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--data", "DATA"], "found no MODEL, --data or --out"),
        (["nowhere", "--data", "DATA", "--out", "OUT"], "MODEL: found no model that loads"),
        (["MODEL", "--data", "none.jsonl", "--out", "OUT"], "none.jsonl"),
        (
            ["MODEL", "--data", "TASK", "--out", "OUT", "--type", "benign"],
            "--type: found no sample",
        ),
        (["MODEL", "--data", "DATA", "--out", "OUT", "--device", "cuda:7"], "--device: found"),
        (["--merge", "none.yml"], "none.yml"),
        (["MODEL", "--merge", "none.yml"], "--merge: found MODEL"),
    ],
)
def test_what_is_wrong_is_one_line(
    world: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    task = tmp_path / "task.jsonl"
    save_samples([Sample(prompt="a", response="b", type="task")], task)
    places = {
        "MODEL": f"{world}/aligned",
        "DATA": f"{world}/data/validation.jsonl",
        "TASK": str(task),
        "OUT": str(tmp_path / "out"),
    }
    result = CliRunner().invoke(stats.main, [places.get(each, each) for each in arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_file_a_type_and_kind(world: Path, tmp_path: Path) -> None:
    data = world / "data" / "validation.jsonl"
    arguments = [f"{world}/aligned", "--data", str(data), "--limit", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(stats.main, [*arguments, "--kind", "gram", "--kind", "fisher"])
    assert result.exit_code == 0, result.output
    types = {sample.type for sample in load_samples(data)}
    expected = {f"{each}.{kind}.safetensors" for each in types for kind in ("gram", "fisher")}
    assert {path.name for path in tmp_path.iterdir()} == expected
