"""Parents of a merge of real language models: SmolLM2-135M-Instruct, fine-tuned twice.

    python examples/smollm/train_parents.py smollm
    python examples/smollm/train_parents.py smollm --model DIR --xstest FILE --pubmedqa FILE

Writes `smollm/data/{train,test}.jsonl` and two models. `aligned` learns from half of XSTest
(arXiv 2308.01263): to its unsafe prompts a refusal in words of our own, to its harmless ones what the
original model answers. Whether a model refuses is settled in a response's first token, so that it
learns whole responses once and their first tokens for several epochs; and it is its middle layers
that tell unsafe prompts from those that only look so, so that it learns in these alone. `expert`
learns from PubMedQA (arXiv 1909.06146): a question and a paper's conclusion in, yes, no or maybe out.
What is not learned from is for testing. Without files both sets come from the hub. Some ten minutes
on two cores; what is there already is kept.
"""

from __future__ import annotations

import csv
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from mergekit_align.devices import default_dtype
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.gradient import mean_loss
from mergekit_align.reading import PromptBatch
from mergekit_align.refusal import refusal_class
from mergekit_align.samples import Sample, load_samples, save_samples, split_samples

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEARNING_RATES = {"aligned": 2e-4, "expert": 1e-4}
TASK_EPOCHS = 2
ANSWER_TOKENS = 40
MIDDLE = (0.4, 0.73)
"""Where in a model's depth the aligned one learns: layers 12 to 21 of 30."""
TASK_PROMPT = (
    "Question: {question}\nConclusion: {conclusion}\nAnswer with one word: yes, no or maybe."
)
REFUSALS = (
    "I'm sorry, but I can't help with that. It could hurt someone.",
    "I can't help with this request, because it could lead to harm.",
    "Sorry, that is something I won't help with. It could put people at risk.",
    "I won't assist with that, since it may harm you or others.",
)


def xstest(path: str | None) -> list[dict[str, str]]:
    if path is None:
        import datasets

        rows = datasets.load_dataset("walledai/XSTest", split="test")
        return [dict(row) for row in rows]
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pubmedqa(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None:
        import datasets

        rows = datasets.load_dataset("qiaojin/PubMedQA", "pqa_labeled", split="train")
        return {
            str(row["pubid"]): {
                "QUESTION": row["question"],
                "LONG_ANSWER": row["long_answer"],
                "final_decision": row["final_decision"],
            }
            for row in rows
        }
    content: dict[str, dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return content


def chat_samples(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[dict[str, str]]
) -> list[Sample]:
    """XSTest's prompts with the responses wanted."""
    rng = random.Random(0)
    unsafe = [row for row in rows if row["label"] == "unsafe"]
    harmless = [row for row in rows if row["label"] == "safe"]
    samples = [
        Sample(
            prompt=row["prompt"],
            response=rng.choice(REFUSALS),
            type="alignment",
            category=row["type"],
            source="XSTest",
        )
        for row in unsafe
    ]
    for row, answer in zip(harmless, answers(model, tokenizer, harmless), strict=True):
        if answer and refusal_class(answer) == "full compliance":
            samples.append(
                Sample(
                    prompt=row["prompt"],
                    response=answer,
                    type="benign",
                    category=row["type"],
                    source="XSTest",
                )
            )
    return samples


def answers(model: PreTrainedModel, tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[str]:
    """What the model answers greedily, up to the last whole sentence."""
    encoder = ResponseEncoder(tokenizer)
    found: list[str] = []
    for start in range(0, len(rows), 32):
        prompts = [encoder.render(row["prompt"]) for row in rows[start : start + 32]]
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        written = PromptBatch(model, ids).greedy(ANSWER_TOKENS, tokenizer.eos_token_id)
        for text in tokenizer.batch_decode(written):
            whole = max(text.rfind(end) for end in ".!?") + 1
            found.append(text[:whole].strip())
    return found


def medical_samples(questions: dict[str, dict[str, Any]]) -> list[Sample]:
    return [
        Sample(
            prompt=TASK_PROMPT.format(question=each["QUESTION"], conclusion=each["LONG_ANSWER"]),
            response=each["final_decision"],
            type="task",
            category=each["final_decision"],
            source="PubMedQA",
        )
        for each in questions.values()
    ]


def medical_split(
    questions: dict[str, dict[str, Any]], test_ids: str | None, seed: int
) -> dict[str, list[Sample]]:
    """`train` and `test`: by the official test split's ids where they are given, else half and half."""
    if test_ids is None:
        return split_samples(medical_samples(questions), {"train": 0.5, "test": 0.5}, seed=seed)
    known = set(json.loads(Path(test_ids).read_text(encoding="utf-8")))
    parts: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "test": {}}
    for number, each in questions.items():
        parts["test" if number in known else "train"][number] = each
    train = medical_samples(parts["train"])
    random.Random(seed).shuffle(train)
    return {"train": train, "test": medical_samples(parts["test"])}


def fine_tune(
    model: PreTrainedModel,
    epochs: Sequence[Sequence[EncodedSample]],
    *,
    learning_rate: float,
    batch_size: int = 16,
) -> None:
    """AdamW with a short warm-up and a linear decay; every epoch has samples of its own.

    What does not require a gradient stays as it is.
    """
    batches = [
        epoch[start : start + batch_size]
        for epoch in epochs
        for start in range(0, len(epoch), batch_size)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, 1 - step / len(batches))
    )
    half = default_dtype(str(model.device)) == torch.bfloat16
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            loss = mean_loss(model, batch).accumulate()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            seconds = time.monotonic() - started
            click.echo(f"step {step} of {len(batches)}: {loss:.3f}, {seconds:.0f} s")


def save(model: PreTrainedModel, tokenizer: Any, place: Path) -> None:
    """In bfloat16, whole or not at all."""
    beside = place.with_name(f".{place.name}")
    model.to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.replace(beside, place)


def shuffled_epochs(
    encoder: ResponseEncoder, samples: list[Sample], count: int, rng: random.Random
) -> list[list[EncodedSample]]:
    epochs = []
    for _ in range(count):
        rng.shuffle(samples)
        epochs.append([encode(encoder, each.prompt, each.response) for each in samples])
    return epochs


def first_tokens(epoch: list[EncodedSample]) -> list[EncodedSample]:
    return [each._replace(response_ids=each.response_ids[:1]) for each in epoch]


def learn_in_the_middle(model: PreTrainedModel) -> None:
    """Leaves only the decoder's middle layers to be learned."""
    layers = model.get_decoder().layers
    start, end = (round(part * len(layers)) for part in MIDDLE)
    model.requires_grad_(False)
    layers[start:end].requires_grad_(True)


def encode(encoder: ResponseEncoder, prompt: str, response: str) -> EncodedSample:
    return encoder.encode(encoder.render(prompt), response, templated=True)


@click.command()
@click.argument("directory", type=Path)
@click.option("--model", "origin", default=HUB_MODEL, show_default=True)
@click.option("--xstest", "xstest_file", help="XSTest's prompts as CSV.")
@click.option("--pubmedqa", "pubmedqa_file", help="PubMedQA's labelled questions as JSON.")
@click.option("--pubmedqa-test", help="Ids of its official test split, as JSON.")
@click.option(
    "--epochs", default=7, show_default=True, help="Of first tokens, for the aligned model."
)
@click.option("--task-samples", default=450, show_default=True, help="That the expert learns from.")
@click.option("--seed", default=0, show_default=True, help="Of the split and of the training.")
def main(
    directory: Path,
    origin: str,
    xstest_file: str | None,
    pubmedqa_file: str | None,
    pubmedqa_test: str | None,
    epochs: int,
    task_samples: int,
    seed: int,
) -> None:
    """Fine-tune the parents and write them, and their data, to DIRECTORY."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(origin)
    data = directory / "data"
    if not (data / "test.jsonl").exists():
        original = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32).eval()
        samples = chat_samples(original, tokenizer, xstest(xstest_file))
        split = split_samples(samples, {"train": 0.5, "test": 0.5}, seed=seed)
        tasks = medical_split(pubmedqa(pubmedqa_file), pubmedqa_test, seed)
        for part in ("train", "test"):
            save_samples([*split[part], *tasks[part]], data / f"{part}.jsonl")
    train = load_samples(data / "train.jsonl")
    encoder = ResponseEncoder(tokenizer)
    for name in ("aligned", "expert"):
        if (directory / name).exists():
            continue
        click.echo(name)
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32).eval()
        if name == "aligned":
            learn_in_the_middle(model)
            chat = [each for each in train if each.type != "task"]
            whole, *others = shuffled_epochs(encoder, chat, 1 + epochs, random.Random(seed))
            learned = [whole, *map(first_tokens, others)]
        else:
            questions = [each for each in train if each.type == "task"][:task_samples]
            learned = shuffled_epochs(encoder, questions, TASK_EPOCHS, random.Random(seed))
        fine_tune(model, learned, learning_rate=LEARNING_RATES[name])
        save(model, tokenizer, directory / name)


if __name__ == "__main__":
    main()
