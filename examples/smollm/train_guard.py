"""A guard made from SmolLM2-135M-Instruct, which tells refusals from answers.

    python examples/smollm/train_parents.py smollm
    python examples/smollm/train_guard.py smollm
    mergekit-align-evaluate smollm/aligned smollm/expert --data smollm/data/test.jsonl \
        --guard smollm/guard --guard-profile examples/smollm/refusal_guard.yaml

Its prompt and its verdicts have Llama Guard's form (refusal_guard.yaml): "safe" where a response
refuses, "unsafe" where it does what was asked. So it judges responses to unsafe prompts, and knows
nothing of what is unsafe. It learns from the parents' training prompts: each with a refusal in words
of our own, and with what the original model answers. Some forty minutes on one core.
"""

from __future__ import annotations

import random
from pathlib import Path

import click
import torch
from train_parents import HUB_MODEL, answers, fine_tune, save
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mergekit_align.encoding import ResponseEncoder
from mergekit_align.guard import load_profile
from mergekit_align.refusal import refusal_class
from mergekit_align.samples import load_samples

PROFILE = Path(__file__).with_name("refusal_guard.yaml")
OPENINGS = (
    "I'm sorry, but",
    "Sorry,",
    "I apologize, but",
    "Unfortunately,",
    "As an AI language model,",
    "Thank you for asking, but",
    "",
)
REFUSALS = (
    "I can't help with that.",
    "I cannot assist with this request.",
    "I am not able to provide that information.",
    "I won't do that, because it could hurt someone.",
    "this is not something that I will write about.",
    "I must decline: it would be harmful and perhaps illegal.",
    "it would not be appropriate for me to answer this.",
    "I do not give instructions of this kind, as they may put people at risk.",
    "no. That would be wrong.",
)
REASONS = (
    "",
    "",
    "If you are in trouble, please talk to somebody whom you trust.",
    "I would be glad to help with something else.",
    "What you describe can cause serious harm, and the law may forbid it.",
    "There are safe and legal ways to find help with what lies behind your question.",
)


def refusal(rng: random.Random) -> str:
    opening, said, reason = (rng.choice(each) for each in (OPENINGS, REFUSALS, REASONS))
    said = said if opening else said[0].upper() + said[1:]
    return " ".join(part for part in (opening, said, reason) if part)


@click.command()
@click.argument("directory", type=Path)
@click.option("--model", "origin", default=HUB_MODEL, show_default=True)
@click.option("--epochs", default=2, show_default=True)
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(directory: Path, origin: str, epochs: int, learning_rate: float, seed: int) -> None:
    """Fine-tune the guard of train_parents.py's DIRECTORY and write it there."""
    disable_progress_bar()
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(origin)
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32).eval()
    train = load_samples(directory / "data" / "train.jsonl")
    prompts = [each.prompt for each in train if each.type != "task"]
    said = answers(model, tokenizer, [{"prompt": prompt} for prompt in prompts])
    judged = [(prompt, refusal(rng), "safe") for prompt in prompts]
    judged += [
        (prompt, answer, "unsafe")
        for prompt, answer in zip(prompts, said, strict=True)
        if answer and refusal_class(answer) == "full compliance"
    ]
    profile, encoder = load_profile(PROFILE), ResponseEncoder(tokenizer)
    encoded = []
    for prompt, response, verdict in judged:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=profile.template
        )
        encoded.append(encoder.encode(text + profile.response.prefix, verdict, templated=True))
    shuffled = [rng.sample(encoded, len(encoded)) for _ in range(epochs)]
    fine_tune(model, shuffled, learning_rate=learning_rate)
    save(model, tokenizer, directory / "guard")


if __name__ == "__main__":
    main()
