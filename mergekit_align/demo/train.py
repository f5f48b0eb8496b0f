"""One plain training loop: AdamW, warm-up, then a cosine schedule, on right-padded batches.

The same model, examples, recipe and seed give the same weights, bit for bit, on one machine.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mergekit_align.demo.chat import EOT
from mergekit_align.demo.grammar import Pair

_IGNORED = -100


class Example(NamedTuple):
    """A tokenized conversation; what comes before `start` is read, not learned."""

    tokens: list[int]
    start: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    steps: int
    """Optimizer steps."""
    learning_rate: float
    """At the top of the schedule."""
    batch_size: int = 64
    """Conversations a step."""
    whole_conversation: bool = False
    """Learn the prompts too: pretraining rather than fine-tuning."""


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], *, whole: bool = False
) -> list[Example]:
    """Chat-templated examples: what is learned is the response and its end, or the `whole`."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": pair.prompt}], tokenize=False, add_generation_prompt=True
        )
        for pair in pairs
    ]
    return encode_text(tokenizer, prompts, [pair.response for pair in pairs], whole=whole)


def encode_text(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    whole: bool = False,
) -> list[Example]:
    """Examples of rendered prompts and of responses without their end of turn."""
    heads = tokenizer(list(prompts))["input_ids"]
    tails = tokenizer([response + EOT for response in responses])["input_ids"]
    return [
        Example(head + tail, 1 if whole else len(head))
        for head, tail in zip(heads, tails, strict=True)
    ]


def train(
    model: PreTrainedModel,
    parts: Sequence[tuple[float, Sequence[Example]]],
    recipe: Recipe,
    *,
    seed: int,
) -> float:
    """Train `model` in place on examples drawn by the weight of their part.

    Returns the mean loss (nats/token) over the last tenth of the steps.
    """
    rng = random.Random(f"batches {seed}")
    weights = [weight for weight, _ in parts]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    losses = []
    model.train()
    for _ in range(recipe.steps):
        drawn = rng.choices([examples for _, examples in parts], weights, k=recipe.batch_size)
        loss = _loss(model, [rng.choice(examples) for examples in drawn])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-math.ceil(recipe.steps / 10) :]
    return sum(last) / len(last)


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _loss(model: PreTrainedModel, batch: Sequence[Example]) -> Tensor:
    width = max(len(example.tokens) for example in batch)
    tokens = torch.full((len(batch), width), model.config.pad_token_id)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, (ids, start) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, start - 1 : len(ids) - 1] = tokens[row, start : len(ids)]
    # Causal attention never looks at padding on the right, so that it needs no mask; logits are
    # computed only where something is learned.
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    learned = labels != _IGNORED
    logits = model.get_output_embeddings()(hidden[learned])
    return cross_entropy(logits, labels[learned])
