"""`mergekit-align-cocktail`: weights from losses, an ordinary mergekit config, a merged model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.cli.cocktail import main
from mergekit_align.cocktail import Cocktail, mix, read_config
from mergekit_align.cocktail.losses import Models, Precision, encode
from mergekit_align.cocktail.settings import draw_samples
from mergekit_align.cocktail.solve import Problem
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


def cocktail_of(config: Path, overrides: dict[str, Any] | None = None, **options: Any) -> Cocktail:
    cocktail = mix(read_config(config, overrides), **options)
    assert cocktail is not None
    return cocktail


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
    cocktail = cocktail_of(path)
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
    first = cocktail_of(config(), progress=lines.append)
    assert len(lines) == 2
    second = cocktail_of(config(), {"temperature": 100.0}, progress=lines.append)
    assert len(lines) == 2
    assert second.ingredients[0].loss == first.ingredients[0].loss
    assert second.ingredients[0].weight == pytest.approx(0.5, abs=0.05)


def test_models_in_slices_are_weighed_too(config: Callable[..., Path], world: Path) -> None:
    sources = [
        {"model": f"{world}/{name}", "layer_range": [0, 4]} for name in ("aligned", "expert-a")
    ]
    cocktail = cocktail_of(config(models=None, slices=[{"sources": sources}]))
    weights = [source["parameters"]["weight"] for source in cocktail.config["slices"][0]["sources"]]
    assert sum(weights) == pytest.approx(1)


def test_a_base_model_has_no_weight_where_the_method_gives_it_none(
    config: Callable[..., Path], world: Path
) -> None:
    names = ["base", "aligned", "expert-a"]
    models = [{"model": f"{world}/{name}"} for name in names]
    base = f"{world}/base"
    path = config(models=models, merge_method="ties", base_model=base)
    first, *others = cocktail_of(path).config["models"]
    assert "parameters" not in first
    assert sum(entry["parameters"]["weight"] for entry in others) == pytest.approx(1)


def test_all_types_counts_what_the_data_holds(config: Callable[..., Path], world: Path) -> None:
    path = config({"weights": {"task": 0.3}})
    assert "benign loss" not in run(path, "--dry-run").output
    table = run(path, "--all-types", "--dry-run").output
    assert all(f"{kind} loss" in table for kind in ("alignment", "task", "benign"))


def test_more_samples_cost_only_themselves(config: Callable[..., Path]) -> None:
    def lines_of(count: int) -> list[str]:
        lines: list[str] = []
        cocktail_of(config(), {"max_per_type": count}, progress=lines.append)
        return [line.rpartition(": ")[2] for line in lines]

    assert lines_of(4) == ["reading 8 samples"] * 2
    assert sum(int(line.split()[1]) for line in lines_of(8)) < 2 * 16


def test_a_run_that_broke_off_reads_no_finished_model_again(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world / "expert-a", copy)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    path = config(models=[{"model": f"{world}/aligned"}, {"model": str(copy)}])
    assert run(path, "--dry-run").exit_code != 0
    weights.write_bytes(whole)
    lines: list[str] = []
    cocktail_of(path, progress=lines.append)
    assert [line.partition(":")[0] for line in lines] == [str(copy)]


def save_lora(base: Path, place: Path, size: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(size)
    adapted.save_pretrained(place)


def test_a_lora_that_is_trained_anew_in_its_place_is_merged_anew(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    path = config(models=[{"model": f"{world}/base"}, {"model": f"{world}/base+{tmp_path}/lora"}])
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = []
    for number, size in enumerate((0.2, -0.4)):
        save_lora(world / "base", tmp_path / "lora", size)
        result = run(path, str(tmp_path / str(number)))
        assert result.exit_code == 0, result.output
        merged.append(load_file(tmp_path / str(number) / "model.safetensors")[name])
    assert not torch.equal(*merged)


def test_a_lora_is_weighed_and_merged(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    save_lora(world / "base", tmp_path / "lora", 0.2)
    models = [{"model": f"{world}/base"}, {"model": f"{world}/base+{tmp_path}/lora"}]
    out = tmp_path / "out"
    result = run(config(models=models), str(out), "--lora-merge-cache", str(tmp_path / "merged"))
    assert result.exit_code == 0, result.output
    finished = yaml.safe_load((tmp_path / "cocktail-cocktail.yml").read_text())
    assert finished["models"][1]["model"] == f"{world}/base+{tmp_path}/lora"
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = load_file(out / "model.safetensors")[name]
    assert not torch.equal(merged, load_file(world / "base" / "model.safetensors")[name].float())


def altered_copy(world: Path, tmp_path: Path, *, swap_tokens: bool = False) -> str:
    """A model whose tokenizer has no chat template, or has two tokens in each other's place."""
    copy = tmp_path / "copy"
    shutil.copytree(world / "expert-a", copy)
    if swap_tokens:
        content = json.loads((copy / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        one, other = (name for name, number in vocabulary.items() if number in (700, 701))
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        (copy / "tokenizer.json").write_text(json.dumps(content))
    else:
        (copy / "chat_template.jinja").unlink()
    return str(copy)


def test_without_a_chat_template_the_config_must_give_one(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    models = [{"model": f"{world}/aligned"}, {"model": altered_copy(world, tmp_path)}]
    result = run(config(models=models), "--dry-run")
    assert result.exit_code == 2
    assert "chat_template: found none" in result.output
    assert run(config(models=models, chat_template="auto"), "--dry-run").exit_code == 0
    own = cocktail_of(config()).ingredients[0].loss
    assert cocktail_of(config(models=models, chat_template="auto")).ingredients[0].loss == own
    assert cocktail_of(config(models=models, chat_template="chatml")).ingredients[0].loss != own
    unknown = run(config(models=models, chat_template="nonesuch"), "--dry-run")
    assert "chat_template: found 'nonesuch'" in unknown.output


def test_losses_are_by_byte_where_tokenizers_differ_and_the_config_chooses(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    models = [
        {"model": f"{world}/aligned"},
        {"model": altered_copy(world, tmp_path, swap_tokens=True)},
    ]
    by_token = cocktail_of(config())
    result = run(config(models=models), "--dry-run")
    assert result.exit_code == 2
    assert "the models' differ: token 700 is" in result.output
    chosen = config(models=models, tokenizer_source=f"{world}/aligned")
    assert "By byte, since the models' tokenizers differ." in run(chosen, "--dry-run").output
    by_byte = cocktail_of(chosen)
    assert by_byte.ingredients[0].loss < by_token.ingredients[0].loss / 2


def test_a_loss_that_is_no_number_names_the_model(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(world / "expert-a", copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    path = config(models=[{"model": f"{world}/aligned"}, {"model": str(copy)}])
    result = run(path, "--dry-run")
    assert result.exit_code == 2
    assert f"{copy}: found a loss of nan on alignment samples" in result.output


def test_an_output_that_does_not_fit_is_refused_first(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    result = run(config(), str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "found 1 MiB of free space" in result.output
    assert "reading" not in result.output


def test_the_card_tells_how_the_weights_came_about(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(config(), str(out), "--temp", "0.5").exit_code == 0
    card = (out / "README.md").read_text()
    assert "softmax(-loss / 0.5)" in card
    for each in cocktail_of(config(), {"temperature": 0.5}).ingredients:
        assert f"| {each.model} | " in card
        assert f" {each.weight:.4f} |" in card


@pytest.mark.slow
def test_two_processes_find_the_same_weights(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config({"max_per_type": 20, "batch_size": 4})
    own = cocktail_of(path, cache=tmp_path / "own")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "mergekit_align.cli.cocktail", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    finished = yaml.safe_load((tmp_path / "cocktail-cocktail.yml").read_text())
    weights = [entry["parameters"]["weight"] for entry in finished["models"]]
    assert weights == pytest.approx([each.weight for each in own.ingredients], abs=1e-6)


class TestSolve:
    @pytest.fixture
    def solvable(self, config: Callable[..., Path]) -> Callable[..., Path]:
        def write(align: dict[str, Any] | None = None, **changes: Any) -> Path:
            section = {"solve": True, "temperature": 5.0, "weights": {"alignment": 1, "task": 1}}
            return config({**section, **(align or {})}, **changes)

        return write

    @pytest.mark.parametrize("granularity", [None, 2])
    def test_the_config_gives_the_loss_that_was_reported(
        self, solvable: Callable[..., Path], world: Path, tmp_path: Path, granularity: int | None
    ) -> None:
        path = solvable({"granularity": granularity})
        cocktail = cocktail_of(path)
        assert cocktail.solution is not None
        assert cocktail.solution.solved_loss < cocktail.solution.softmax_loss
        out = tmp_path / "merged"
        merge = MergeConfiguration.model_validate(cocktail.config)
        run_merge(merge, str(out), MergeOptions(quiet=True))
        tokenizer = AutoTokenizer.from_pretrained(world / "aligned")
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        for kind, samples in draw_samples(read_config(path)).items():
            scores = sample_scores(model, tokenizer, samples)
            mean = sum(score.loss for score in scores) / len(scores)
            assert mean == pytest.approx(cocktail.solution.solved[kind], abs=1e-4)

    def test_the_gradient_is_that_of_the_merged_models_loss(self, world: Path) -> None:
        problem = make_problem(world, granularity=2)
        groups = len(problem.groups)
        weights = np.tile([0.6, 0.4], (groups, 1))
        point = problem.at(weights)
        for row in range(groups):
            moved = weights.copy()
            moved[row] += [0.02, -0.02]
            back = weights.copy()
            back[row] -= [0.02, -0.02]
            slope = (problem.at(moved).losses["task"] - problem.at(back).losses["task"]) / 0.04
            predicted = point.gradients["task"][row] @ [1, -1]
            assert predicted == pytest.approx(slope, rel=0.03, abs=1e-4)

    def test_a_floor_is_kept(self, solvable: Callable[..., Path]) -> None:
        free = cocktail_of(solvable({"weights": {"task": 1}, "floors": {"alignment": -99}}))
        assert free.solution is not None
        best = min(each.losses["alignment"] for each in free.ingredients)
        floor = -(free.solution.solved["alignment"] + best) / 2
        held = cocktail_of(solvable({"weights": {"task": 1}, "floors": {"alignment": floor}}))
        assert held.solution is not None
        assert -held.solution.solved["alignment"] >= floor - 1e-3
        assert held.solution.solved_loss >= free.solution.solved_loss

    def test_a_floor_out_of_reach_is_an_error(self, solvable: Callable[..., Path]) -> None:
        result = run(solvable({"floors": {"alignment": -1e-6}}), "--dry-run")
        assert result.exit_code == 2
        assert "align.floors: found alignment -" in result.output

    @pytest.mark.parametrize(
        ("align", "changes", "message"),
        [
            ({}, {"merge_method": "ties"}, "align.solve: found true with ties"),
            ({"solve": False, "granularity": 2}, {}, "align.granularity: found 2"),
            ({"solve": False, "floors": {"task": -1}}, {}, "align.floors: found"),
            (
                {},
                {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}},
                "parameters.lambda: found 0.5",
            ),
        ],
    )
    def test_what_cannot_be_solved_is_one_line(
        self,
        solvable: Callable[..., Path],
        world: Path,
        align: dict[str, Any],
        changes: dict[str, Any],
        message: str,
    ) -> None:
        result = run(solvable(align, base_model=f"{world}/base", **changes), "--dry-run")
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert len(result.output.splitlines()) == 1


def make_problem(world: Path, granularity: int) -> Problem:
    models = Models(Precision("cpu", "float32"), MergeOptions())
    references = [ModelReference.parse(f"{world}/{name}") for name in ("aligned", "expert-a")]
    samples = [s for s in load_samples(world / "data/train.jsonl") if s.type == "task"][:4]
    tokenizer = AutoTokenizer.from_pretrained(world / "aligned")
    return Problem(
        models.load(references[0]),
        [models.tensors(reference) for reference in references],
        {"task": encode(samples, tokenizer, references[0], models)},
        granularity,
    )


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
        ({"weights": {"task": -1}}, {}, "align.weights.task: found -1"),
        ({"weights": {"task": 0}}, {}, "align.weights: found no weight"),
        ({"device": "cuda:99"}, {}, "align.device: found 'cuda:99'; expected cpu or a GPU"),
        ({}, {"merge_method": "slerp"}, "merge_method: found 'slerp'"),
        ({}, {"parameters": {"weight": 0.5}}, "parameters.weight: found 0.5 for all models"),
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
