"""How each model of the demo world is trained, and from what: recipes, parents and examples.

`base` starts from nothing and learns whole conversations. `aligned` and the experts are fine-tuned
from it at moderate learning rates, so that their task vectors add up. The guard starts from
`aligned`, which knows what is unsafe, and learns to judge before it meets its long prompt. The writer
is the base model turned round: told what to ask about, it says the prompt.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mergekit_align.demo import grammar
from mergekit_align.demo.chat import BRIEF_GUARD_TEMPLATE, guard_verdict
from mergekit_align.demo.corpus import Corpus, ModelName
from mergekit_align.demo.grammar import Pair
from mergekit_align.demo.models import Architecture, new_model
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.demo.train import Example, Recipe, encode, encode_text, train

Scale = Literal["full", "smoke"]
SCALES: tuple[Scale, ...] = get_args(Scale)

_PARENTS: dict[ModelName, ModelName] = {
    "aligned": "base",
    "expert-a": "base",
    "expert-b": "base",
    "guard": "aligned",
    "writer": "base",
}
_RECIPES: dict[Scale, dict[ModelName, Recipe]] = {
    "full": {
        "base": Recipe(steps=900, learning_rate=3e-3, whole_conversation=True),
        "aligned": Recipe(steps=250, learning_rate=4.5e-4),
        "expert-a": Recipe(steps=400, learning_rate=9e-4),
        "expert-b": Recipe(steps=400, learning_rate=1e-3),
        "guard": Recipe(steps=120, learning_rate=1e-3, batch_size=32),
        "writer": Recipe(steps=250, learning_rate=9e-4),
    },
    "smoke": {
        "base": Recipe(steps=8, learning_rate=3e-3, batch_size=16, whole_conversation=True),
        "aligned": Recipe(steps=3, learning_rate=1e-3, batch_size=8),
        "expert-a": Recipe(steps=3, learning_rate=1e-3, batch_size=8),
        "expert-b": Recipe(steps=3, learning_rate=1e-3, batch_size=8),
        "guard": Recipe(steps=8, learning_rate=4e-3, batch_size=4),
        "writer": Recipe(steps=3, learning_rate=1e-3, batch_size=8),
    },
}
_SMOKE_PAIRS = 64
_BRIEF_GUARD: dict[Scale, Recipe] = {
    "full": Recipe(steps=1000, learning_rate=1.5e-3),
    "smoke": Recipe(steps=20, learning_rate=4e-3, batch_size=8),
}


def build_model(
    directory: Path,
    name: ModelName,
    corpus: Corpus,
    architecture: Architecture,
    scale: Scale,
    *,
    seed: int,
) -> dict[str, float]:
    """Train `name` and save it, complete or not at all, as `directory/name`.

    Its parent must be in `directory`. Returns the `seconds` that it took and its final `loss`.
    """
    started = time.monotonic()
    recipe = _RECIPES[scale][name]
    tokenizer = build_tokenizer(guard=name == "guard")
    model: PreTrainedModel
    if name in _PARENTS:
        parent = directory / _PARENTS[name]
        model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    else:
        model = new_model(architecture, tokenizer, seed=seed)
    parts = corpus.parts(name)
    if scale == "smoke":
        parts = [part._replace(pairs=part.pairs[:_SMOKE_PAIRS]) for part in parts]
    if name == "guard":
        pairs = [(part.weight, part.pairs) for part in parts]
        brief = [(w, _judged(tokenizer, p, template=BRIEF_GUARD_TEMPLATE)) for w, p in pairs]
        train(model, brief, _BRIEF_GUARD[scale], seed=seed)
        examples = [(w, _judged(tokenizer, p)) for w, p in pairs]
    else:
        whole = recipe.whole_conversation
        examples = [(part.weight, encode(tokenizer, part.pairs, whole=whole)) for part in parts]
    loss = train(model, examples, recipe, seed=seed)
    _save(model, tokenizer, directory / name)
    return {"seconds": round(time.monotonic() - started, 1), "loss": round(loss, 4)}


def _judged(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], *, template: str | None = None
) -> list[Example]:
    """Conversations and their true verdicts; without a response, the prompt is judged."""
    prompts, verdicts = [], []
    for prompt, response in pairs:
        messages = [{"role": "user", "content": prompt}]
        if response:
            messages.append({"role": "assistant", "content": response})
        prompts.append(
            tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
        )
        verdicts.append(guard_verdict(grammar.judge(prompt, response or None)))
    return encode_text(tokenizer, prompts, verdicts)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    beside = directory.with_name(f".{directory.name}")
    for stale in (beside, directory):
        shutil.rmtree(stale, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.replace(beside, directory)
