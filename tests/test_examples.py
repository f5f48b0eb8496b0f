"""The examples say what the schemas know, and those of the paper name models of the hub only."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import ROOT, check_genome_file, lay_out
from commands import command as click_command
from mergekit.config import MergeConfiguration
from mergekit.evo.config import EvolMergeConfiguration
from safetensors.torch import load_file

from mergekit_align.cocktail import read_config
from mergekit_align.demo.corpus import Corpus
from mergekit_align.generate import read_config as read_generated
from mergekit_align.generate.settings import ModelSettings, Settings
from mergekit_align.samples import load_samples
from mergekit_align.yaml_files import check_section, read_yaml_mapping

EXAMPLES = ROOT / "examples"
COCKTAILS = sorted(EXAMPLES.rglob("cocktail*.yml"))
MERGES = sorted(EXAMPLES.rglob("merge_*.yml"))
GENERATED = sorted(EXAMPLES.rglob("generate*.yml"))
CONFIGS = sorted(set(EXAMPLES.rglob("*.yml")) - set(COCKTAILS) - set(MERGES) - set(GENERATED))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_an_example_fits_the_schemas(file: Path) -> None:
    content = read_yaml_mapping(file)
    section = check_genome_file(content, file)
    assert section.data
    assert section.storage_path


@pytest.mark.parametrize("file", COCKTAILS, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_an_example_of_a_cocktail_fits_the_schemas(file: Path, world: Path, tmp_path: Path) -> None:
    here = tmp_path / "config.yml"
    text = file.read_text().replace("smollm/expert", f"{world}/expert-a")
    here.write_text(re.sub("demo-world|smollm(?=/aligned)", str(world), text))
    config = read_config(here)
    assert len(config.models) >= 2
    assert config.section.weights["alignment"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("file", MERGES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_the_commands_of_an_example_of_a_merge_run(
    file: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that its first lines give, on a small world, but for the one that makes the models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm" / "data").mkdir(parents=True)
    for name, place in (("aligned", "aligned"), ("expert", "expert-a")):
        (tmp_path / "smollm" / name).symlink_to(world / place)
    (tmp_path / "smollm" / "data" / "train.jsonl").symlink_to(world / "data" / "validation.jsonl")
    lay_out(tmp_path, world)
    text = file.read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(world / "base"))
    config = tmp_path / file.relative_to(EXAMPLES.parent)
    config.write_text(text)
    lines = re.sub(r"\\\n# +", "", text.partition("#\n")[0]).splitlines()
    _, *commands = [re.sub("^# *(Run: )?", "", line) for line in lines]
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command.replace("100", "2").replace("50", "2"))
        result = CliRunner().invoke(click_command(program), arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_parents_of_real_models_and_their_guard_are_made_from_files(
    world: Path, tmp_path: Path
) -> None:
    asked = [f"{word} a {thing}?" for word in ("paint", "sell") for thing in ("box", "mug", "hat")]
    rows = [{"prompt": p, "type": "t", "label": kind} for p in asked for kind in ("safe", "unsafe")]
    rows = [{**row, "prompt": f"{row['label']}: {row['prompt']}"} for row in rows]
    with (tmp_path / "xstest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "type", "label"])
        writer.writeheader()
        writer.writerows(rows)
    questions = {
        str(n): {"QUESTION": f"Is {n} odd?", "LONG_ANSWER": "So it is.", "final_decision": "yes"}
        for n in range(6)
    }
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "test.json").write_text(json.dumps({"1": "yes", "4": "yes"}))
    command = [
        *(sys.executable, EXAMPLES / "smollm" / "train_parents.py", "made"),
        *("--model", world / "base", "--xstest", "xstest.csv", "--pubmedqa", "questions.json"),
        *("--pubmedqa-test", "test.json", "--epochs", "1"),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    made = tmp_path / "made"
    parts = {part: load_samples(made / "data" / f"{part}.jsonl") for part in ("train", "test")}
    tasks = [each.prompt for each in parts["test"] if each.type == "task"]
    assert [prompt.partition("\n")[0] for prompt in tasks] == [
        f"Question: Is {n} odd?" for n in (1, 4)
    ]
    assert not {each.prompt for each in parts["train"]} & {each.prompt for each in parts["test"]}
    command = [sys.executable, EXAMPLES / "smollm" / "train_guard.py", "made"]
    subprocess.run([*command, "--model", world / "base", "--epochs", "1"], check=True, cwd=tmp_path)
    for parent in ("aligned", "expert", "guard"):
        weights = load_file(made / parent / "model.safetensors")
        base = load_file(world / "base" / "model.safetensors")
        assert any(not torch.equal(weights[name], base[name]) for name in base)


def test_the_example_of_generated_data_fits_the_demo_world(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    text = (EXAMPLES / "generate.yml").read_text()
    path = tmp_path / "generate.yml"
    path.write_text(
        text.replace("demo-world/writer", "demo-world/base").replace("demo-world", str(world))
    )
    config = read_generated(path)
    assert [asked.key for asked in config.asked] == ["alignment", "benign", "task.skill-a"]
    # What is asked is what the writer learns to be asked.
    learnt = {pair.prompt for part in Corpus(0).parts("writer") for pair in part.pairs}
    for asked in config.asked:
        assert asked.template is not None
        for topic in asked.topics:
            messages = asked.template.messages(
                topic, domain="", language="", examples=[], rng=random.Random(0)
            )
            assert messages[-1]["content"] in learnt


@pytest.mark.parametrize("file", sorted((EXAMPLES / "paper").iterdir()), ids=lambda file: file.name)
def test_a_paper_example_names_models_of_the_hub(file: Path) -> None:
    content = read_yaml_mapping(file)
    if file in GENERATED:
        settings = check_section(Settings, read_yaml_mapping(file), file, prefix="")
        named = [m.model for m in settings.models if isinstance(m, ModelSettings)]
        assert all(re.fullmatch(r"[\w-]+/[\w.-]+", name) for name in named)
        assert {domain.expert for domain in settings.task.values()} <= set(named)
        assert settings.guard is not None
        assert settings.decontaminate
        return
    if file in COCKTAILS:
        models = MergeConfiguration.model_validate(content).referenced_models()
    else:
        genome = EvolMergeConfiguration.model_validate(content).genome
        models = [*genome.models, genome.base_model]
    for model in models:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", model.model.path)
    assert len({model.model.path for model in models}) >= 2
