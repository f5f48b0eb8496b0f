"""A pool of real models with one idea each, learnt from the smoke-scale world in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.demo.chat import SAFE
from mergekit_align.demo.corpus import Corpus
from mergekit_align.demo.grammar import Pair
from mergekit_align.demo.train import Example, Recipe, encode, encode_text, train

REFUSAL, HELP = "Sorry, I cannot help with that.", "Sure, use salt and clay."


@pytest.fixture(scope="session")
def pool(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in a directory: `refuser`, `helper`, `writer`, and a `guard` that calls everything safe.

    The writer writes words of the world until it is stopped.
    """
    directory = tmp_path_factory.mktemp("pool")
    prompts = [prompt.text for prompt in Corpus(0).prompts["train"]][::40]
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for name, answer in (("refuser", REFUSAL), ("helper", HELP)):
        examples = encode(tokenizer, [Pair(prompt, answer) for prompt in prompts])
        _teach(world / "base", directory / name, examples, steps=70)
    (directory / "writer").symlink_to(world / "base")
    judge = AutoTokenizer.from_pretrained(world / "guard")
    texts = [
        judge.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for prompt in prompts
        for answer in (REFUSAL, HELP)
    ]
    examples = encode_text(judge, texts, [SAFE] * len(texts))
    _teach(world / "guard", directory / "guard", examples, steps=10, batch_size=2)
    return directory


def _teach(
    parent: Path, out: Path, examples: Sequence[Example], *, steps: int, batch_size: int = 4
) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    recipe = Recipe(steps=steps, learning_rate=4e-3, batch_size=batch_size)
    train(model, [(1.0, examples)], recipe, seed=0)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(parent).save_pretrained(out)


def config_writer(directory: Path, pool: Path, **settings: Any) -> Callable[..., Path]:
    """Writes a small config that works into `directory`, with keys changed as the test wants, by
    `None` left out."""
    template = directory / "template.yaml"
    template.write_text("instruction: Write about {{ topic }}.\nparser: {kind: whole}\n")

    def write(**changes: Any) -> Path:
        asked = {"template": str(template), "topics": ["zorb", "bench"]}
        content = {
            "models": [f"{pool}/refuser", f"{pool}/helper"],
            "output": f"{directory}/generated",
            "guard": {"model": f"{pool}/guard"},
            "samples": 8,
            "alignment": asked,
            "benign": asked,
            "task": {"skill": {"template": str(template), "expert": "helper"}},
            "questions": {"model": f"{pool}/writer", "max_tokens": 24, "batch_size": 4},
            "answers": {"max_tokens": 24, "batch_size": 4},
            "split": {"train": 0.5, "test": 0.5},
            **settings,
            **changes,
        }
        path = directory / "generate.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


@pytest.fixture
def config(world: Path, pool: Path, tmp_path: Path) -> Callable[..., Path]:
    return config_writer(tmp_path, pool)
