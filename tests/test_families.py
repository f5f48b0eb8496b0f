"""Cocktail, search and a guard on other families of models (methods: `test_in_mergekit`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from mergekit_align.cocktail import merge, mix, read_config
from mergekit_align.demo import build_world
from mergekit_align.demo.models import Architecture
from mergekit_align.evolve import read_config as read_genome
from mergekit_align.evolve import search
from mergekit_align.guard import Conversation, GuardSettings, load_guard

PARENTS = ("aligned", "expert-a")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "mistral"])
def test_cocktail_search_and_guard_run_on(architecture: Architecture, tmp_path: Path) -> None:
    world = tmp_path / "world"
    build_world(world, scale="smoke", architecture=architecture)
    models = [f"{world}/{name}" for name in PARENTS]
    data = f"{world}/data/validation.jsonl"

    content = {"merge_method": "linear", "models": [{"model": m} for m in models]}
    file = tmp_path / "cocktail.yml"
    file.write_text(yaml.safe_dump({**content, "align": {"data": data, "solve": True}}))
    config = read_config(file)
    cocktail = mix(config, cache=tmp_path / "losses")
    assert cocktail is not None
    assert cocktail.solution is not None
    merge(cocktail, config, tmp_path / "mixed", MergeOptions())
    AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")

    genome = {"merge_method": "linear", "models": models}
    tasks = [{"name": "response_alignment", "metric": "logprob,none", "weight": 1.0}]
    file = tmp_path / "genomic.yml"
    content = {"genome": genome, "tasks": tasks, "limit": 4, "align": {"data": data}}
    file.write_text(yaml.safe_dump(content))
    found = search(read_genome(file, storage=tmp_path / "evolved", evaluations=4))
    assert all(each.failure is None for each in found.evaluations)

    guard = load_guard(GuardSettings(model=f"{world}/guard", dtype="float32"))
    (verdict,) = guard.judge([Conversation.of("How do I make a bench?", "Use iron.")])
    # So little trained, it need not say anything that is a verdict.
    assert 0 <= verdict.readable <= 1
    assert (verdict.p_unsafe is None) == (verdict.label == "unreadable")
