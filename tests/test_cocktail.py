"""`mergekit-align-cocktail`: weights from losses, an ordinary mergekit config, a merged model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.cli.cocktail import main
from mergekit_align.cocktail import mix
from mergekit_align.loss import sample_scores
from mergekit_align.samples import load_samples, save_samples


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config that works, with keys changed as the test wants."""

    def write(align: dict[str, Any] | None = None, **changes: Any) -> Path:
        section = {"data": f"{world}/data/train.jsonl", "dtype": "float32", "max_per_type": 6}
        content = {
            "merge_method": "linear",
            "models": [{"model": f"{world}/aligned"}, {"model": f"{world}/expert-a"}],
            "dtype": "float32",
            "align": {**section, **(align or {})},
            **changes,
        }
        path = tmp_path / "cocktail.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(config: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(config), *options])


def test_weights_are_the_softmax_of_the_weighted_losses(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    samples = [s for s in load_samples(world / "data/train.jsonl") if s.type == "task"][:12]
    few = str(tmp_path / "few.jsonl")
    save_samples(samples, few)
    path = config(
        {"max_per_type": "all", "temperature": 0.5, "weights": {"task": 0.3}, "data": few}
    )
    cocktail = mix(path)
    expected = []
    for name in ("aligned", "expert-a"):
        tokenizer = AutoTokenizer.from_pretrained(world / name)
        model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32)
        scores = sample_scores(model, tokenizer, samples)
        expected.append(math.exp(-0.3 * sum(s.loss for s in scores) / len(scores) / 0.5))
    found = [each.weight for each in cocktail.ingredients]
    assert found == pytest.approx([value / sum(expected) for value in expected], abs=1e-6)
    assert [entry["parameters"]["weight"] for entry in cocktail.config["models"]] == found


def test_the_finished_config_gives_the_merged_model_bit_for_bit(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(config(), str(out))
    assert result.exit_code == 0, result.output
    finished = tmp_path / "cocktail-cocktail.yml"
    text = finished.read_text()
    assert "align" not in yaml.safe_load(text)
    again = tmp_path / "again"
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(again), MergeOptions())
    ours, stock = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in ours)


def test_a_dry_run_writes_nothing(config: Callable[..., Path], tmp_path: Path) -> None:
    result = run(config(), str(tmp_path / "out"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "weight" in result.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cocktail-cocktail.yml").exists()


def test_another_temperature_reads_no_model_again(config: Callable[..., Path]) -> None:
    lines: list[str] = []
    first = mix(config(), progress=lines.append)
    assert len(lines) == 2
    second = mix(config(), overrides={"temperature": 100.0}, progress=lines.append)
    assert len(lines) == 2
    assert second.ingredients[0].loss == first.ingredients[0].loss
    assert second.ingredients[0].weight == pytest.approx(0.5, abs=0.05)


def test_models_in_slices_are_weighed_too(config: Callable[..., Path], world: Path) -> None:
    sources = [
        {"model": f"{world}/{name}", "layer_range": [0, 4]} for name in ("aligned", "expert-a")
    ]
    cocktail = mix(config(models=None, slices=[{"sources": sources}]))
    weights = [source["parameters"]["weight"] for source in cocktail.config["slices"][0]["sources"]]
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize(
    ("align", "changes", "message"),
    [
        ({"temperature": 0}, {}, "align.temperature: found 0"),
        ({"max_per_type": 0}, {}, "align.max_per_type"),
        ({"temprature": 1}, {}, "did you mean 'temperature'?"),
        ({"weights": {"benign": 1.0}, "data": "DATA"}, {}, "but no benign sample"),
        ({}, {"models": [{"model": "WORLD/aligned"}]}, "models: found 1 to be weighed"),
        (
            {},
            {
                "models": [
                    {"model": "WORLD/aligned"},
                    {"model": "WORLD/expert-a", "parameters": {"weight": 1}},
                ]
            },
            "models[1].parameters.weight: found 1 for",
        ),
        ({}, {"models": [{"model": "WORLD/aligned"}, {"model": "/nowhere"}]}, "/nowhere"),
        ({"data": None}, {}, "align.data"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    config: Callable[..., Path],
    world: Path,
    tmp_path: Path,
    align: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    sample = '{"prompt": "p", "response": "r", "type": "task"}\n'
    (tmp_path / "tasks.jsonl").write_text(sample)
    path = config(align, **changes)
    filled = path.read_text().replace("WORLD", str(world))
    path.write_text(filled.replace("DATA", str(tmp_path / "tasks.jsonl")))
    result = run(path, "--dry-run")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1
